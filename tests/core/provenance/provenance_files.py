"""Images with metadata of origin, written byte by byte where no library here writes it."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from cifake_ray.core.imaging import formats as formats  # registers HEIF

IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TC260 = '{"Label":"1","ContentProducer":"001191110108","ProduceID":"7"}'
_TAIL = bytes.fromhex("00110010800000aa00389b71")
_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")


def encode(format: str, **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_xmp(content: str) -> bytes:
    """A packet with one description; `content` is its attributes, `>`, its elements."""
    names = {
        "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        "e": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
        "p": "http://ns.adobe.com/xap/1.0/",
        "TC260": "http://www.tc260.org.cn/ns/AIGC/1.0/",
    }
    spaces = " ".join(f'xmlns:{prefix}="{name}"' for prefix, name in names.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {spaces}><rdf:Description {content}'
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def make_exif(software: str = "", description: str = "", comment: bytes = b"") -> Image.Exif:
    exif = Image.Exif()
    exif[271] = "maker"  # Pillow's PNG leaves out a directory of directories alone
    if software:
        exif[305] = software
    if description:
        exif[270] = description
    if comment:
        exif.get_ifd(34665)[37510] = comment
    return exif


def make_box(kind: bytes, body: bytes) -> bytes:
    return (len(body) + 8).to_bytes(4, "big") + kind + body


def make_superbox(kind: bytes, label: str, *boxes: bytes) -> bytes:
    head = make_box(b"jumd", kind + _TAIL + b"\x03" + label.encode() + b"\0")
    return make_box(b"jumb", head + b"".join(boxes))


def make_text(text: str) -> bytes:
    """A text of CBOR."""
    size = len(text)
    head = (
        [0x60 + size] if size < 24 else [0x78, size] if size < 256 else [0x79, *divmod(size, 256)]
    )
    return bytes(head) + text.encode()


def make_actions(*source_types: str, is_json: bool = False) -> bytes:
    if is_json:
        found = ",".join(f'{{"digitalSourceType": "{value}"}}' for value in source_types)
        return make_superbox(b"json", "c2pa.actions", make_box(b"json", found.encode()))
    found = b"".join(
        b"\xa2" + make_text("action") + make_text("c2pa.created")
        + make_text("digitalSourceType") + make_text(value)
        for value in source_types
    )  # fmt: skip
    body = b"\xa1" + make_text("actions") + bytes([0x80 + len(source_types)]) + found
    return make_superbox(b"cbor", "c2pa.actions.v2", make_box(b"cbor", body))


def make_store(*manifests: bytes) -> bytes:
    """A manifest store; each manifest is the assertions it has."""
    made = [
        make_superbox(b"c2ma", f"urn:{n}", make_superbox(b"c2as", "c2pa.assertions", assertions))
        for n, assertions in enumerate(manifests)
    ]
    return make_superbox(b"c2pa", "c2pa", *made)


def add_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """Behind the header, where C2PA has it."""
    sum_ = zlib.crc32(kind + body).to_bytes(4, "big")
    return png[:33] + len(body).to_bytes(4, "big") + kind + body + sum_ + png[33:]


def add_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


def add_store(data: bytes, format: str, store: bytes, piece: int = 100) -> bytes:
    """An image with a manifest store; in a JPEG cut into segments of `piece` bytes."""
    if format == "PNG":
        return add_chunk(data, b"caBX", store)
    if format == "JPEG":
        pieces = [store[8:][n : n + piece] for n in range(0, len(store) - 8, piece)]
        for number, body in reversed(list(enumerate(pieces, 1))):
            data = add_segment(
                data, 0xEB, b"JP\2\x11" + number.to_bytes(4, "big") + store[:8] + body
            )
        return data
    if format == "WEBP":
        data += b"C2PA" + len(store).to_bytes(4, "little") + store + b"\0" * (len(store) % 2)
        return data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]
    if format == "TIFF":
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info.tagtype[52545], info[52545] = 7, store
        return encode("TIFF", tiffinfo=info)
    return data + make_box(b"uuid", _C2PA_UUID + bytes(4) + b"manifest\0" + bytes(8) + store)
