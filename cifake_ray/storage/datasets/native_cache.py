"""Keep the native pixels of shards on a node's disk, images of all sizes behind each other.

The file has the pixels of each image, its windows before its scored crops, and at its end a table
of where they are. It is bounded: once it would be larger, none is kept and images are streamed.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass

import numpy as np

from cifake_ray.core.training.native_crops import NativeImage
from cifake_ray.errors import ImageError
from cifake_ray.storage.datasets.pixel_cache import (
    DAMAGE,
    Decoded,
    DecodedCache,
    Stored,
    compare_sum,
    create_unnamed,
)

# In the table, int64 for each image: where its windows start in the file, their number, height and
# width, and the number of its scored crops, which follow.
COLUMNS = 5


class NativeArray:
    """The images of a file that is mapped into memory."""

    def __init__(self, data: np.ndarray, num_images: int, size: int) -> None:
        """`data` uint8[bytes of the file], with scored crops of `size` pixels."""
        table = data[len(data) - num_images * COLUMNS * 8 :].tobytes()
        self.data, self.size = data, size
        self.table = np.frombuffer(table, np.int64).reshape(num_images, COLUMNS)

    def __getitem__(self, number: int) -> NativeImage:
        start, count, height, width, num_scored = self.table[number].tolist()
        middle = start + count * height * width * 3
        stop = middle + num_scored * self.size**2 * 3
        return NativeImage(
            self.data[start:middle].reshape(count, height, width, 3),
            self.data[middle:stop].reshape(num_scored, self.size, self.size, 3),
        )


class _TooLargeError(Exception):
    """The pixels go beyond the limit."""


@dataclass(frozen=True)
class NativeCache(DecodedCache):
    """Images of any size."""

    num_images: int
    size: int  # pixels: the side of scored crops
    suffix = ".native"

    def _is_filled(self) -> bool:
        if not self._errors_path.exists():
            return False
        try:
            over_bytes = json.loads(self._errors_path.read_bytes()).get("over_bytes", -1)
            return self._pixels_path.exists() or over_bytes >= self.max_bytes
        except DAMAGE:  # `read` says so
            return True

    def _store(self, decoded: Decoded) -> Stored:
        errors: dict[int, str] = {}
        try:
            with create_unnamed(self._pixels_path) as (file, _):
                return Stored(errors, {"pixels": self._write(file, decoded, errors)})
        except _TooLargeError:
            return Stored({}, {}, over_bytes=self.max_bytes)

    def _write(self, file: int, decoded: Decoded, errors: dict[int, str]) -> int:
        """Write the file and return its CRC-32. _TooLargeError once it is beyond its limit."""
        table = np.zeros((self.num_images, COLUMNS), np.int64)
        size_bytes = crc = 0
        with os.fdopen(os.dup(file), "wb") as stream:

            def write(data: bytes) -> None:
                nonlocal size_bytes, crc
                stream.write(data)
                size_bytes, crc = size_bytes + len(data), zlib.crc32(data, crc)

            for number, image in decoded:
                if isinstance(image, ImageError):
                    errors[number] = image.error
                    continue
                table[number] = size_bytes, *image.windows.shape[:3], len(image.scored)
                for pixels in image:
                    write(pixels.tobytes())
                if size_bytes + table.nbytes > self.max_bytes:
                    raise _TooLargeError
            write(table.tobytes())
        return crc

    def _map(self, sums: dict[str, int]) -> NativeArray | None:
        if not self._pixels_path.exists() or self._pixels_path.stat().st_size > self.max_bytes:
            return None
        data = np.memmap(self._pixels_path, np.uint8, "r")
        compare_sum(sums, "pixels", data.data)
        return NativeArray(data, self.num_images, self.size)
