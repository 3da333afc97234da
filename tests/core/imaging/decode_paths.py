"""The two ways to decode a JPEG, each by itself: libjpeg-turbo alone, and Pillow."""

from __future__ import annotations

import numpy as np

from cifake_ray.core.imaging import decode


def decode_fast(data: bytes) -> np.ndarray | None:
    stored = decode._decode_fast(decode._File(data), None)
    return None if stored is None else stored.to_array()


def decode_slow(data: bytes) -> np.ndarray:
    return decode._decode_slow(decode._File(data), None).to_array()
