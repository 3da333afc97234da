"""Name files that are not decoded, by their first bytes, for people who wonder why."""

from __future__ import annotations

import re

_HEAD_BYTES = 4096

# Pictures and films; Pillow names further ones.
_FOREIGN = {
    "JPEG XL": rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n",
    "JPEG XR": rb"II\xbc\x01",
    "CR3 (camera raw)": rb".{4}ftypcrx ",
    "RAF (camera raw)": rb"FUJIFILMCCD-RAW",
    "ORF (camera raw)": rb"IIR[OS]\x08|MMOR",
    "RW2 (camera raw)": rb"IIU\x00",
    "X3F (camera raw)": rb"FOVb",
    "MRW (camera raw)": rb"\x00MRM",
    "SVG": (
        rb"(?:\xef\xbb\xbf)?(?:\s++|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+svg[^>\[]*(?:\[.*?\]\s*)?>)*+"
        rb"<(?:svg:)?svg[\s>/]"
    ),
    "PDF": rb"\s{0,4}%PDF-",
    "PSD": rb"8BPS",
    "XCF": rb"gimp xcf",
    "OpenEXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?R(?:ADIANC|GB)E",
    "DICOM": rb".{128}DICM",
    "DjVu": rb"AT&TFORM",
    "Matroska or WebM video": rb"\x1aE\xdf\xa3",
    "AVI video": rb"RIFF.{4}AVI ",
    "MPEG video": rb"\x00\x00\x01[\xba\xb3]|G.{187}G.{187}G",
    "Flash video": rb"FLV\x01",
    "Windows Media video": rb"0&\xb2u\x8ef\xcf\x11",
    "Ogg video": rb"OggS",
    "MP4 or QuickTime video": rb".{4}(?:ftyp|moov|mdat.{8}|wide)[\x00-\x7f]{4}",
}
# What lies beside pictures, or is delivered in their place.
_OTHERS = {
    "a Git LFS pointer; `git lfs pull` fetches the image": rb"version https://git-lfs",
    "an HTML page": rb"\s*+<(?i:!doctype html|html|head|body)[\s>]",
    "a ZIP archive; unpack it first": rb"PK\x03\x04",
    "a tar archive; unpack it first": rb".{257}ustar",
    "a gzip archive; unpack it first": rb"\x1f\x8b\x08",
    "a Parquet file": rb"PAR1",
}


def _find_name(patterns: dict[str, bytes], data: bytes) -> str | None:
    head = data[:_HEAD_BYTES]
    return next((name for name, p in patterns.items() if re.match(p, head, re.DOTALL)), None)


def name_foreign_format(data: bytes) -> str | None:
    """Return the name of a picture or film whose format is not read; None if it is none known."""
    return _find_name(_FOREIGN, data)


def name_file(data: bytes) -> str | None:
    """Return what a file is that is no image, and the remedy; None if nothing is known of it."""
    return _find_name(_OTHERS, data)
