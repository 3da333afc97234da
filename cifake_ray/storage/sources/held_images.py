"""Rows of a Parquet file with images while they are in memory."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple

import pyarrow as pa

from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES
from cifake_ray.core.imaging.raw_pixels import encode_pixels
from cifake_ray.core.schema import IMAGE_ERRORS
from cifake_ray.errors import ImageError


def get_bytes(value: Any) -> bytes | None:
    """Return the encoded image in a value of a column of images. ImageError for raw pixels."""
    if isinstance(value, dict):
        value = value["bytes"] if "bytes" in value else encode_pixels(value)
    return bytes(value) if isinstance(value, list) else value


class HeldImages(NamedTuple):
    """Neighbouring rows of a file in memory."""

    location: str
    stamp: str | None  # of the rows of the file
    starts: list[int]  # rows of the file at which the pieces start
    stop: int
    pieces: list[pa.RecordBatch]
    image: str

    def covers(self, location: str, row: int, stamp: str | None) -> bool:
        """Return whether a row is held, of a file with that stamp, if one is given."""
        is_same = location == self.location and stamp in (None, self.stamp)
        return is_same and bool(self.starts) and self.starts[0] <= row < self.stop

    def get_image(self, row: int) -> bytes | ImageError:
        """Return the image in a row of the file, or what is wrong with it."""
        number = bisect_right(self.starts, row) - 1
        piece, index = self.pieces[number], row - self.starts[number]
        values = {name: piece.column(name)[index].as_py() for name in piece.schema.names}
        value, error = values[self.image], values.get("error")
        if error in IMAGE_ERRORS:
            return ImageError(error, values.get("error_detail") or "")
        try:
            data = get_bytes(value)
        except ImageError as problem:
            return problem
        if data is None:
            path = value.get("path") if isinstance(value, dict) else None
            beside = f", only the path {path!r}" if path else ""
            return ImageError("not_found", f"the row holds no image bytes{beside}")
        if len(data) > MAX_IMAGE_BYTES:
            return ImageError("too_large", f"{len(data)} bytes; the limit is {MAX_IMAGE_BYTES}")
        return data
