"""Name files that hold images or stand for them, by their first bytes, and say what to do."""

from __future__ import annotations

import re

from cifake_ray.errors import ImageError

HEAD_BYTES = 512
_LOAD_DATASETS = "export it with `datasets`: load_from_disk(FOLDER).to_parquet(FILE)"
_SIGNATURES = {
    rb"\s*+<(?i:!doctype html|html|head|body)[\s>]": "an HTML page, not the image: fetch it again",
    rb"version https://git-lfs": "a Git LFS pointer, not the image: run `git lfs pull`",
    rb"(\.\./)*(\.git)?/annex/objects/": "a git-annex pointer, not the image: run `git annex get`",
    rb"\x00\x05\x16[\x00\x07]": "a resource fork of macOS, not the image: delete it",
    rb"PK\x03\x04": "a ZIP archive: unpack it and give the folder (a spreadsheet: save it as CSV)",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it and give the folder",
    rb"Rar!\x1a\x07": "a RAR archive: unpack it and give the folder",
    rb".{257}ustar": "a tar archive: give the .tar itself, or unpack it and give the folder",
    rb"\x1f\x8b\x08": "gzip data: unpack it and give the folder",
    rb"BZh[1-9]1AY": "bzip2 data: unpack it and give the folder",
    rb"\xfd7zXZ\x00": "xz data: unpack it and give the folder",
    rb"\x28\xb5\x2f\xfd": "zstd data: unpack it and give the folder",
    rb"PAR1": "a Parquet file: name it .parquet and give its folder with --source-kind shards",
    rb"ARROW1": f"an Arrow file: {_LOAD_DATASETS}",
    rb"\xff{4}.{2}\x00\x00\x10\x00\x00\x00": f"an Arrow stream of save_to_disk: {_LOAD_DATASETS}",
    rb".{16}\xde\xc0\xef\xbe": "an LMDB database: export its values to files or to Parquet",
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file: export its images to files or to Parquet",
    rb"\x93NUMPY": "a NumPy array: export its images to files or to Parquet",
    rb"\x0a\x23\xd7\xce": "an MXNet RecordIO file: export its images to files or to Parquet",
    rb"SQLite format 3\x00": "an SQLite database: export its images to files or to Parquet",
}

_SUFFIXES = re.compile(
    r"\.(zip|tar|tgz|gz|bz2|xz|zst|7z|rar|parquet|arrow|mdb|tfrecords?|h5|hdf5|rec|bin|iso)"
    r"(-\d+-of-\d+)?$",
    re.IGNORECASE,
)


def explain_large(name: str, size_bytes: int, max_bytes: int) -> ImageError:
    """Return the error of a file that is too large to be read, from its name and size."""
    detail = f"{size_bytes} bytes; the limit is {max_bytes}"
    if found := _SUFFIXES.search(name):
        detail += f" (a .{found[1].lower()} file holds many images: unpack or export it first)"
    return ImageError("too_large", detail)


def name_container(data: bytes) -> str | None:
    """Return what a file is and the remedy, from its first HEAD_BYTES or more; None if unknown."""
    head = data[:HEAD_BYTES]
    for signature, name in _SIGNATURES.items():
        if re.match(signature, head, re.DOTALL):
            return name
    if len(head) >= 12 and _mask_crc(head[:8]) == int.from_bytes(head[8:12], "little"):
        return "a TFRecord file: export its images to files or to Parquet"
    return None


def _mask_crc(data: bytes) -> int:
    """Return the CRC-32C that TFRecord has behind each length, masked as TensorFlow does."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
