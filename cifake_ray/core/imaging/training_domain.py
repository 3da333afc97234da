"""Find the domain of a detector, the ranges of its training images, and count images outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

Bounds = tuple[int, int]  # lowest and highest, both inside

DOMAIN_COLUMNS = ["width", "height", "format", "jpeg_quality"]  # of HEADER_FIELDS
QUALITIES = (1, 100)  # IJG
ANY_SIDE = 2**31 - 1  # pixels: more than an image has
MAX_ENLARGEMENT = 2  # images of up to so many times the largest side are like those of training


@dataclass(frozen=True, kw_only=True)
class TrainingDomain:
    """The ranges that the training images of a detector are in."""

    sides: Bounds  # pixels: the smallest and the largest width or height; of crops up to ANY_SIDE
    formats: tuple[str, ...]  # Pillow's names, sorted
    jpeg_qualities: Bounds | None  # see `estimate_quality`; None where no image was a JPEG

    def __post_init__(self) -> None:
        bounds = {"sides": self.sides, "jpeg_qualities": self.jpeg_qualities or QUALITIES}
        for name, (low, high) in bounds.items():
            if not 1 <= low <= high:
                raise ValueError(f"{name} from {low} to {high} must be 1 or more, in this order")
        if not all(isinstance(name, str) for name in self.formats):
            raise ValueError(f"formats {self.formats} must be names")

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        """Count scored images that are unlike the training images, by what differs.

        `rows` are SCORE_FIELDS; those with an error do not count. `any` counts each image once. An
        image that is no JPEG has no JPEG quality to be unlike.
        """
        unlike = self.find_unlike(rows.filter(pc.is_null(rows.column("error"))))
        return {reason: pc.sum(column).as_py() or 0 for reason, column in unlike.items()}

    def find_unlike(self, scored: pa.Table) -> dict[str, pa.ChunkedArray]:
        """Return which of the scored images are unlike the training images, by what differs."""
        width, height, name, quality = (scored.column(name) for name in DOMAIN_COLUMNS)
        unlike = {
            "size": pc.or_(_is_outside(width, self.sides), _is_outside(height, self.sides)),
            "format": pc.invert(pc.is_in(name, pa.array(self.formats, pa.string()))),
            "jpeg_quality": _is_outside(quality, self.jpeg_qualities or QUALITIES).fill_null(False),
        }
        unlike["any"] = pc.or_(pc.or_(unlike["size"], unlike["format"]), unlike["jpeg_quality"])
        return unlike

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingDomain:
        """Parse the config of a bundle. KeyError, TypeError or ValueError if malformed."""
        qualities = values["jpeg_qualities"]
        return cls(
            sides=tuple(values["sides"]),
            formats=tuple(values["formats"]),
            jpeg_qualities=qualities and tuple(qualities),
        )


def _is_outside(values: pa.ChunkedArray, bounds: Bounds) -> pa.ChunkedArray:
    low, high = bounds
    return pc.or_(pc.less(values, low), pc.greater(values, high))


def find_domain(headers: pa.Table) -> TrainingDomain:
    """Return the domain of images from their headers: DOMAIN_COLUMNS, at least one row."""
    width, height, name, quality = (headers.column(name) for name in DOMAIN_COLUMNS)
    sides = pc.min_max(pa.chunked_array([*width.chunks, *height.chunks])).as_py()
    qualities = pc.min_max(quality).as_py()
    return TrainingDomain(
        sides=(sides["min"], sides["max"]),
        formats=tuple(sorted(name.unique().to_pylist())),
        jpeg_qualities=None if qualities["min"] is None else (qualities["min"], qualities["max"]),
    )


def choose_detector(
    sides: Sequence[int], domains: Mapping[str, TrainingDomain | None]
) -> tuple[str, str]:
    """Return the detector whose training images are most like images of these sizes, and why.

    `sides` are the longer sides of a sample of images in pixels, `domains` those of the detectors
    by name. The detector of the smallest images is chosen if more than half of the sample is at
    most MAX_ENLARGEMENT times as large as those, then that of the next larger, else the last.
    """
    largest = {name: domain.sides[1] if domain else ANY_SIDE for name, domain in domains.items()}
    *smaller, last = sorted(domains, key=lambda name: (largest[name], name))
    reason = "the sizes of the images are not known"
    for name in smaller if sides else ():
        limit = MAX_ENLARGEMENT * largest[name]
        num_near = sum(side <= limit for side in sides)
        if 2 * num_near > len(sides):
            return name, f"{num_near} of {len(sides)} sampled images are at most {limit} pixels"
        num_larger = len(sides) - num_near
        reason = f"{num_larger} of {len(sides)} sampled images are larger than {limit} pixels"
    return last, reason
