"""Read pages of ListObjectsV2: columns of keys, sizes and etags, as strict as an XML parser.

A page has 1,000 keys, and ElementTree takes 7 us for each. So the entries of a page as S3 and its
kin write it are found by a regular expression, which must account for every byte of them, and only
what stands around them is parsed as XML. Any other page goes through ElementTree as a whole.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes
from xml.etree.ElementTree import Element

import numpy as np

from cifake_ray.storage.s3.errors import parse_xml

SIZE = re.compile("[0-9]{1,15}")
# Up to the first entry: the root, and elements of text alone in it. So what follows is an element
# of the root, and not part of a comment or of another element.
_HEAD = re.compile(
    rb'(?:<\?xml version="1\.0" encoding="(?i:utf-8)"\?>\s*)?'
    rb'<ListBucketResult(?: xmlns="[^"<]*")?>(?:<([A-Za-z]+)>[^<]*</\1>|<[A-Za-z]+/>)*'
)
_OTHERS = "(?:{}|<Owner>(?:{})*+</Owner>)*+".format(
    *(
        "|".join(f"<{name}>[^<]*+</{name}>" for name in names)
        for names in (
            ("LastModified", "StorageClass", "ChecksumAlgorithm", "ChecksumType"),
            ("ID", "DisplayName"),
        )
    )
)
_ENTRY = re.compile(
    f"<Contents><Key>([^<]++)</Key>{_OTHERS}<ETag>([^<]*+)</ETag>{_OTHERS}"
    f"<Size>({SIZE.pattern})</Size>{_OTHERS}</Contents>"
)
_START, _END = b"<Contents>", b"</Contents>"
_ENTITIES = {"&quot;": '"', "&#34;": '"', "&amp;": "&"}  # the ampersand last


class Page(NamedTuple):
    """Columns of one page. `keys` hold the bytes that are not UTF-8 as lone surrogates."""

    keys: list[str]
    sizes: list[int]  # bytes
    etags: list[str | None]
    token: str | None  # of the next page


def parse_page(data: bytes) -> Page:
    """Parse a page of ListObjectsV2. ValueError for anything else, such as a page of a website."""
    page = _parse_usual_page(data)
    return _parse_any_page(data) if page is None else page


def _parse_usual_page(data: bytes) -> Page | None:
    """Return the page that `_parse_any_page` would, or None where that is not certain."""
    start, end = data.find(_START), data.rfind(_END) + len(_END)
    if not 0 <= start < end or not _HEAD.fullmatch(data, 0, start):
        return None
    codes = np.frombuffer(data, np.uint8, end - start, start)
    if codes.min() < ord(" ") or codes.max() > ord("~"):
        return None
    num_opened, num_closed, num_entities = (np.count_nonzero(codes == ord(c)) for c in "<>&")
    if num_opened != num_closed:  # a text has a `>`
        return None
    texts = _ENTRY.split(data[start:end].decode("ascii"))
    if any(texts[::4]):  # between the entries
        return None
    keys, etags = texts[1::4], texts[2::4]
    if num_entities:
        joined = "<".join(etags)
        if num_entities != sum(map(joined.count, _ENTITIES)):  # not all in etags, or of other kinds
            return None
        for entity, char in _ENTITIES.items():
            joined = joined.replace(entity, char)
        etags = joined.split("<")
    try:
        root = _parse_root(data[:start] + data[end:])
        if root.find(_name_space(root) + "Contents") is not None:
            return None
        return _make_page(root, keys, [*map(int, texts[3::4])], etags)
    except ValueError:  # `_parse_any_page` says where
        return None


def _parse_any_page(data: bytes) -> Page:
    root = _parse_root(data)
    space = _name_space(root)
    key_tag, size_tag, etag_tag = (f"{space}{name}" for name in ("Key", "Size", "ETag"))
    keys, sizes, etags = list[str](), list[int](), list[str | None]()
    for content in root.iterfind(f"{space}Contents"):
        key, size_text = content.findtext(key_tag), content.findtext(size_tag) or ""
        if not key or not SIZE.fullmatch(size_text):
            raise ValueError(f"{key!r} has the size {size_text!r}")
        keys.append(key)
        sizes.append(int(size_text))
        etags.append(content.findtext(etag_tag))
    return _make_page(root, keys, sizes, etags)


def _parse_root(data: bytes) -> Element:
    root = parse_xml(data)
    if root.tag.rpartition("}")[2] != "ListBucketResult":
        raise ValueError(f"it is <{root.tag}>")
    return root


def _name_space(root: Element) -> str:
    space, brace, _ = root.tag.rpartition("}")
    return space + brace


def _make_page(root: Element, keys: list[str], sizes: list[int], etags: list[str | None]) -> Page:
    """Return a page whose entries are known; the rest stands in other elements of the root."""
    space = _name_space(root)
    if root.findtext(f"{space}EncodingType") == "url":
        keys = [_unquote(key) if "%" in key or "+" in key else key for key in keys]
    is_truncated = root.findtext(f"{space}IsTruncated")
    token = root.findtext(f"{space}NextContinuationToken") if is_truncated == "true" else None
    if is_truncated not in ("true", "false") or (is_truncated == "true" and not token):
        raise ValueError("it does not say how it goes on")
    return Page(keys, sizes, etags, token)


def _unquote(key: str) -> str:
    return unquote_to_bytes(key.replace("+", " ")).decode("utf-8", "surrogateescape")
