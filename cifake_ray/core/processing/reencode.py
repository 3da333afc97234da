"""Encode images anew, all in the same way: convert with `--reencode`."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cifake_ray.config import SquareFit
from cifake_ray.core.imaging.decode import MAX_IMAGE_BYTES, decode_image, map_images
from cifake_ray.core.imaging.preprocessing import fit_image
from cifake_ray.errors import ImageError


@dataclass(frozen=True)
class Reencoder:
    """Turns images of any kind into images of one format, quality and, if asked, size."""

    encoding: str  # jpeg:QUALITY, webp:QUALITY or png
    size: int | None  # pixels: side of a square; None keeps the size
    fit: SquareFit

    def encode_images(self, images: Iterable[bytes | ImageError]) -> list[bytes | ImageError]:
        """Return each image encoded anew, or the error of one that cannot be."""
        return map_images(self.encode_image, images)

    def encode_image(self, data: bytes) -> bytes:
        """Return the pixels of an image, upright RGB, in the new encoding. Raises ImageError."""
        pixels = decode_image(data)
        if self.size is not None:
            pixels = fit_image(pixels, size=self.size, fit=self.fit)
        name, _, quality = self.encoding.partition(":")
        options: dict[str, Any] = {"quality": int(quality)} if quality else {}
        if name == "jpeg":
            options |= {"subsampling": "4:2:0"}
        buffer = io.BytesIO()
        try:
            Image.fromarray(pixels).save(buffer, name, **options)
        except (OSError, ValueError) as error:  # WebP and JPEG have a longest side
            raise ImageError("decode_failed", f"cannot be encoded as {name}: {error}") from error
        if buffer.tell() > MAX_IMAGE_BYTES:
            raise ImageError("too_large", f"{buffer.tell()} bytes as {name}")
        return buffer.getvalue()
