"""Read the headers of a tar: where each member's bytes lie. Nothing is unpacked.

V7, ustar, GNU and PAX headers, as POSIX.1-2001 (pax) and the manual of GNU tar ("Basic Tar Format")
describe them. tarfile of the standard library takes 2.5 to 3 times as long, keeps every member in
memory, and does not tell a tar that was cut off from one that ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

BLOCK_BYTES = 512
MAX_HEADER_BYTES = 2**20  # of a long name or of PAX records
MAX_SIZE_BYTES = 2**62
MAX_ZERO_BLOCKS = 2**11  # behind more of them no other tar follows
CHECKSUM = slice(148, 156)
WITHOUT_DATA = b"123456V"  # links, devices, folders, FIFOs, the label of a volume
NOT_WHOLE = b"SM"  # GNU: sparse, continued from another volume

ReadAt = Callable[[int, int], bytes]  # offset and number of bytes; fewer come at the end
Kind = Literal[
    "file", "hard link", "symbolic link", "other", "not whole", "cut", "damage", "no end"
]


class Member(NamedTuple):
    """A member of a tar, or something wrong with the tar itself.

    `cut` is a file whose end is missing; `damage` are bytes that are no header; `no end` is a tar
    without the zeros that end one, which was probably cut off.
    """

    name: str  # as written; bytes that are not UTF-8 are lone surrogates
    kind: Kind
    offset: int  # of its first byte in the tar
    size_bytes: int
    target: str = ""  # of a link


class _Header(NamedTuple):
    name: bytes
    size_bytes: int
    type: bytes
    target: bytes
    is_extended: bool  # GNU: blocks with more of a sparse map follow


def list_members(read_at: ReadAt, size_bytes: int) -> Iterator[Member]:
    """Yield the members of a tar of `size_bytes`, in order, and what is wrong with it.

    If not even its first block is a header, a `damage` at offset 0 is all that is yielded.
    Otherwise reading goes on at the next header behind the damage, and behind zeros as well, so
    the members of tars that were concatenated are all found.
    """
    position = 0
    is_well, num_zeros = True, 0
    of_all: dict[bytes, bytes] = {}  # PAX records of a global header
    of_next: dict[bytes, bytes] = {}
    while position < size_bytes and num_zeros < MAX_ZERO_BLOCKS:
        start, block = position, read_at(position, BLOCK_BYTES)
        position += BLOCK_BYTES
        if block.count(0) == len(block):
            num_zeros += 1
            continue
        try:
            header = _parse_header(block)
            if header.type in b"xXgLK":
                if header.size_bytes > MAX_HEADER_BYTES:
                    raise ValueError("a header larger than any name")
                data = read_at(position, header.size_bytes)
                position += _pad(header.size_bytes)
                if header.type in b"xX":
                    of_next |= _parse_records(data)
                elif header.type == b"g":
                    of_all |= _parse_records(data)
                else:
                    name = b"path" if header.type == b"L" else b"linkpath"
                    of_next[name] = data.partition(b"\0")[0]
                continue
            records, of_next = of_all | of_next, {}
            size = int(records.get(b"size", header.size_bytes))
            if not 0 <= size < MAX_SIZE_BYTES:
                raise ValueError("a size that is none")
        except ValueError:
            of_next = {}
            if is_well:
                yield Member("", "damage", start, 0)
            if start == 0:
                return
            is_well = False
            continue
        num_zeros = 0
        more = header.is_extended
        while more:  # blocks with the rest of the map of a sparse file
            block = read_at(position, BLOCK_BYTES)
            position += BLOCK_BYTES
            more = len(block) == BLOCK_BYTES and block[504] != 0
        if header.type in WITHOUT_DATA:
            size = 0
        name = records.get(b"GNU.sparse.name") or records.get(b"path") or header.name
        kind = _find_kind(header.type, name, size, records)
        target = (records.get(b"linkpath") or header.target) if kind.endswith("link") else b""
        if kind == "file" and position + size > size_bytes:
            kind = "cut"
        yield Member(_decode(name), kind, position, size, _decode(target))
        position += _pad(size)
    if is_well and not num_zeros:
        yield Member("", "no end", size_bytes, 0)


def _find_kind(kind: bytes, name: bytes, size_bytes: int, records: dict[bytes, bytes]) -> Kind:
    if kind in NOT_WHOLE or any(record.startswith(b"GNU.sparse.") for record in records):
        return "not whole"
    if kind == b"1":
        return "hard link"
    if kind == b"2":
        return "symbolic link"
    # Before ustar a folder was a file with a slash at its end; D is a folder and its contents.
    if kind in WITHOUT_DATA or kind == b"D" or (name.endswith(b"/") and not size_bytes):
        return "other"
    return "file"


def _pad(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _parse_header(block: bytes) -> _Header:
    """Parse one block. ValueError when it is no header."""
    if len(block) < BLOCK_BYTES:
        raise ValueError("a header that ends early")
    written = _parse_number(block[CHECKSUM])
    total = sum(block) - sum(block[CHECKSUM]) + 8 * ord(" ")
    if written != total and written != total - 256 * sum(byte > 127 for byte in block):
        raise ValueError("a wrong checksum")  # not even by the old writers who took bytes as signed
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    kind, target = block[156:157].replace(b"\0", b"0"), block[157:257].partition(b"\0")[0]
    return _Header(
        name, _parse_number(block[124:136]), kind, target, kind == b"S" and block[482] != 0
    )


def _parse_number(field: bytes) -> int:
    """Parse octal digits, or GNU's big-endian numbers. ValueError for what is not 0 or more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    if number < 0:
        raise ValueError("a negative number")
    return number


def _parse_records(data: bytes) -> dict[bytes, bytes]:
    """Parse PAX records, `LENGTH NAME=VALUE\\n`. ValueError when they are none."""
    records = {}
    start = 0
    while start < len(data) and data[start]:
        space = data.index(b" ", start, start + 20)
        end = start + int(data[start:space])
        if end <= space or data[end - 1 : end] != b"\n":
            raise ValueError("a record of another length than it says")
        name, _, value = data[space + 1 : end - 1].partition(b"=")
        records[name] = value
        start = end
    return records
