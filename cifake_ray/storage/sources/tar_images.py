"""Tell the images in a tar from what is beside them, and read their labels.

A sample of WebDataset is neighbours with the same name up to its first dot: an image
`000001.jpg` and its sidecars `000001.json`, `000001.txt`, `000001.cls`.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cifake_ray.core.labels import LabelReader
from cifake_ray.storage.sources.clutter import find_clutter
from cifake_ray.storage.sources.tar_members import Member, ReadAt, list_members

IMAGES = "jpg jpeg jpe jfif png webp gif bmp dib tif tiff avif heic heif jxl jp2 ppm pgm pbm pnm"
# Of WebDataset, beside what is a sidecar in folders too. With an image, all else is a sidecar.
SIDECARS = "cls cls2 id index inx text pyd pickle ten tenbin cbor msgpack mp"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in IMAGES.split())
SIDECAR_SUFFIXES = frozenset(f".{suffix}" for suffix in SIDECARS.split())
MAX_LABEL_BYTES = 2**16  # of a sidecar that is read
MAX_SAMPLE_MEMBERS = 64
ERRORS = {
    "cut": "truncated",
    "no end": "truncated",
    "damage": "decode_failed",
    "not whole": "format_not_allowed",
}
ReadLabel = Callable[[str, bytes], int | None]  # suffix and bytes of a sidecar


class TarImage(NamedTuple):
    """An image, or what may be one; without a name it is the tar itself that is wrong.

    At offset 0 this is no tar at all.
    """

    name: str | None
    offset: int
    size_bytes: int
    label: int | None = None
    error: str | None = None


def read_sidecar(suffix: str, data: bytes, labels: LabelReader, unused: Counter[str]) -> int | None:
    """Return the label that a `.cls` file, or the field `labels.column` of a `.json` file, names.

    Any `labels.column` but `label` was asked for: then nothing else is read (`cls` is that file),
    and 0 and 1 mean REAL and FAKE. Else numbers are classes of any kind, unless class names, and
    counted in `unused`.
    """
    is_cls, is_asked = suffix == ".cls", labels.column != "label"
    if is_asked and is_cls != (labels.column == "cls"):
        return None
    try:
        value = data.decode() if is_cls else json.loads(data)[labels.column]
    except (ValueError, LookupError, TypeError, RecursionError):  # no text, JSON or field
        return None
    if not is_asked and str(value).strip().lower() in labels.assumed:
        unused[suffix] += 1
        return None
    return labels.read(value)


def list_images(
    read_at: ReadAt, size_bytes: int, read_label: ReadLabel
) -> Iterator[TarImage | str]:
    """Yield the images of a tar of `size_bytes`, and the reason for each member that is none."""
    links: list[tuple[Member, int | None]] = []
    for sample, labels in _group_samples(read_at, size_bytes, read_label):
        suffixes = [_split_suffix(member.name)[1] for member in sample]
        has_image = not IMAGE_SUFFIXES.isdisjoint(suffixes)
        for member, suffix in zip(sample, suffixes, strict=True):
            is_other = has_image and suffix not in IMAGE_SUFFIXES
            clutter = find_clutter(member.name)
            label = _find_label(member.name, labels)
            error = ERRORS.get(member.kind)
            if member.kind in ("damage", "no end"):
                yield TarImage(None, member.offset, 0, error=error)
            elif member.kind == "other":
                yield "not a regular file"
            elif is_other or clutter or suffix in SIDECAR_SUFFIXES:
                yield clutter or "sidecar"
            elif member.target:
                links.append((member, label))
            else:
                yield TarImage(member.name, member.offset, member.size_bytes, label, error)
    if links:
        yield from _follow_links(links, list_members(read_at, size_bytes))


def _group_samples(
    read_at: ReadAt, size_bytes: int, read_label: ReadLabel
) -> Iterator[tuple[list[Member], dict[str, int]]]:
    """Yield the members of each sample, folders left out, and the labels that its sidecars name."""
    sample: list[Member] = []
    labels: dict[str, int] = {}
    name = ""
    for member in list_members(read_at, size_bytes):
        if member.kind == "other" and member.name.endswith("/"):
            continue
        folder, _, base = member.name.rpartition("/")
        dot = base.find(".", len(base) - len(base.lstrip(".")))
        of = f"{folder}/{base if dot < 0 else base[:dot]}"
        if sample and (of != name or len(sample) == MAX_SAMPLE_MEMBERS):
            yield sample, labels
            sample, labels = [], {}
        name = of
        sample.append(member)
        stem, suffix = _split_suffix(member.name)
        if suffix in (".cls", ".json") and member.size_bytes <= MAX_LABEL_BYTES:
            label = read_label(suffix, read_at(member.offset, member.size_bytes))
            labels |= {} if label is None else {stem: label}
    if sample:
        yield sample, labels


def _split_suffix(name: str) -> tuple[str, str]:
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()


def _find_label(name: str, labels: dict[str, int]) -> int | None:
    """Return the label of `a/b` for `a/b.left.jpg`, unless there is one of `a/b.left`."""
    while labels:
        name, suffix = _split_suffix(name)
        if not suffix or name in labels:
            return labels.get(name)
    return None


def _follow_links(
    links: list[tuple[Member, int | None]], members: Iterator[Member]
) -> Iterator[TarImage | str]:
    """Yield links as the images they lead to; see `list_images`."""
    waiting = defaultdict(list)
    for link, label in links:
        folder = posixpath.dirname(link.name) if link.kind == "symbolic link" else ""
        waiting[posixpath.normpath(posixpath.join(folder, link.target))].append((link, label))
    for member in members:
        if member.kind == "file" and posixpath.normpath(member.name) in waiting:
            for link, label in waiting.pop(posixpath.normpath(member.name)):
                yield TarImage(link.name, member.offset, member.size_bytes, label)
    for link, label in (each for some in waiting.values() for each in some):
        if link.kind == "hard link":
            yield TarImage(link.name, link.offset, 0, label, "not_found")
        else:  # perhaps to a folder, and of no image
            yield "link out of its tar"
