"""A page read fast is what ElementTree reads in it, or is refused as ElementTree refuses it."""

from __future__ import annotations

from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifake_ray.storage.s3.page import Page, _parse_any_page, _parse_usual_page, parse_page

NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'
TIME = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
OWNER = "<Owner><ID>1</ID><DisplayName>me</DisplayName></Owner>"
CLASS = "<StorageClass>STANDARD</StorageClass>"
CHECKSUM = (
    "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
)
# As AWS, MinIO, Ceph and SeaweedFS write an entry.
ENTRIES = (
    f"<Contents><Key>{{key}}</Key>{TIME}<ETag>{{etag}}</ETag>{CHECKSUM}<Size>{{size}}</Size>"
    f"{CLASS}</Contents>",
    f"<Contents><Key>{{key}}</Key>{TIME}<ETag>{{etag}}</ETag><Size>{{size}}</Size>{OWNER}{CLASS}"
    "</Contents>",
    f"<Contents><Key>{{key}}</Key>{TIME}<ETag>{{etag}}</ETag><Size>{{size}}</Size>{CLASS}{OWNER}"
    "</Contents>",
    f"<Contents><Key>{{key}}</Key><ETag>{{etag}}</ETag><Size>{{size}}</Size>{CLASS}{TIME}</Contents>",
)
ETAGS = ("&quot;{}&quot;", "&#34;{}&#34;", '"{}"', "{}")

NAMES = st.text(alphabet="ab/é+% &<\"'\x01\n\udcff", min_size=1, max_size=8)


@st.composite
def make_pages(draw: st.DrawFn) -> bytes:
    entry, etag = draw(st.sampled_from(ENTRIES)), draw(st.sampled_from(ETAGS))
    keys = draw(st.lists(NAMES, max_size=6))
    entries = "".join(
        entry.format(key=quote_key(key), etag=etag.format(f"e{n}"), size=n**9)
        for n, key in enumerate(keys)
    )
    token = draw(st.sampled_from(["", "t", "a/é&b", "1==+/%"]))
    facts = [
        "<Name>b</Name>",
        "<Prefix></Prefix>",
        "<MaxKeys>1000</MaxKeys>",
        "<Delimiter/>",
        "<EncodingType>url</EncodingType>",
        f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>",
        *([f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"] if token else []),
    ]
    facts = draw(st.permutations(facts))
    place = draw(st.integers(0, len(facts)))
    head, tail = "".join(facts[:place]), "".join(facts[place:])
    start = draw(st.sampled_from(["", DECLARATION])) + "<ListBucketResult"
    start += draw(st.sampled_from([">", f"{NAMESPACE}>"]))
    return f"{start}{head}{entries}{tail}</ListBucketResult>".encode()


def quote_key(key: str) -> str:
    """As S3 does with `encoding-type=url`."""
    return quote(key.encode("utf-8", "surrogateescape")).replace("%20", "+")


def read(parse: object, data: bytes) -> Page | str:
    try:
        return parse(data)  # type: ignore[operator]
    except ValueError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(make_pages())
def test_a_usual_page_is_read_without_parsing_all_of_it(data: bytes) -> None:
    page = _parse_any_page(data)
    assert _parse_usual_page(data) == (page if page.keys else None)


PIECES = [
    *(
        "<",
        ">",
        "&",
        "</",
        "/>",
        "]]>",
        "<!-- ",
        " -->",
        "<![CDATA[",
        "<?x ?>",
        "\n",
        "\x00",
        "\x7f",
    ),
    *("&lt;", "&gt;", "&amp;", "&apos;", "&quot;", "&#34;", "&#38;", "&#x3C;", "&x;", "&#0;"),
    *("<Key>", "</Key>", "<Size>", "</Size>", "<Size/>", "<ETag>", "<Contents>", "</Contents>"),
    *("<Contents/>", "<Contents >", "<Key>k</Key>", "<Size>2</Size>", "<ETag>x</ETag>", "-1", "9"),
    *("<IsTruncated>true</IsTruncated>", "<EncodingType>url</EncodingType>", "<Owner>", OWNER),
    *(' xmlns="x"', " xmlns:s='x'", "<s:Key>", "+", "%", "%FF", "%zz", "%E9", "é", "￿", "x" * 99),
    *("</ListBucketResult>", "<ListBucketResult>", "<!DOCTYPE l [<!ENTITY x 'y'>]>", DECLARATION),
]


def make_page(start: str = "", end: str = "") -> bytes:
    """A page of two entries, and what stands before and behind them."""
    entries = "".join(
        ENTRIES[0].format(key=f"a%2Fb+{n}", etag=f"&quot;{n}&quot;", size=n) for n in range(2)
    )
    return (
        f"{DECLARATION}<ListBucketResult{NAMESPACE}><Name>b</Name><Delimiter/>{start}{entries}{end}"
        "<IsTruncated>false</IsTruncated></ListBucketResult>"
    ).encode()


@pytest.mark.parametrize(
    ("start", "end"),
    [("<!-- ", " -->"), ("<![CDATA[", "]]>"), ("<Others>", "</Others>"), ("<?x ", "?>")],
)
def test_entries_inside_of_something_else_are_none(start: str, end: str) -> None:
    data = make_page(start, end)
    assert parse_page(data) == _parse_any_page(data) == Page([], [], [], None)


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_at_any_place_of_a_page_is_read_or_refused_as_before(piece: str) -> None:
    page = make_page()
    assert _parse_usual_page(page) is not None
    for place in find_borders(page):
        data = page[:place] + piece.encode() + page[place:]
        assert read(parse_page, data) == read(_parse_any_page, data), data


def find_borders(data: bytes) -> list[int]:
    """Where tags and entities begin and end, and what is one further."""
    borders = {
        place + step for place, byte in enumerate(data) if byte in b"<>&;" for step in (0, 1)
    }
    return [0, *sorted(borders - {0, len(data)}), len(data)]


@settings(max_examples=500, deadline=None)
@given(make_pages(), st.data())
def test_a_page_with_anything_in_it_is_read_or_refused_as_before(
    data: bytes, draws: st.DataObject
) -> None:
    for _ in range(draws.draw(st.integers(1, 3))):
        data = change_page(data, draws)
    assert read(parse_page, data) == read(_parse_any_page, data)


def change_page(data: bytes, draws: st.DataObject) -> bytes:
    """Cut a page, take a part out, write one twice or swap two, or put something in."""
    borders = st.sampled_from(find_borders(data))
    first, second, third = sorted(draws.draw(borders) for _ in range(3))
    a, b, c, d = data[:first], data[first:second], data[second:third], data[third:]
    return draws.draw(
        st.sampled_from([a, a + c + d, a + b + b + c + d, a + c + b + d])
        | st.sampled_from(PIECES).map(lambda piece: a + piece.encode() + b + c + d)
        | st.binary(max_size=3).map(lambda piece: a + piece + b + c + d)
    )
