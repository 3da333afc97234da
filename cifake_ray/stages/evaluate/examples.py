"""Choose images to show beside the numbers; make their thumbnails and gradient maps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.models.gradient_maps import attribute_logits
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import ImageError
from cifake_ray.report.gradient_image import draw_gradient_image
from cifake_ray.report.html import SMALL_SIDE, Example
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.sources.source import Source

if TYPE_CHECKING:
    from cifake_ray.core.models.detector import Detector

MAX_EXAMPLES = 12  # under each heading
THUMBNAIL_SIDE = 384  # pixels; smaller images stay as they are
RANDOM = "Random images"
EXAMPLE_COLUMNS = ("p_fake", "width", "height", "format", "jpeg_quality", "label", "source")


def choose_examples(scored: pa.Table) -> dict[str, list[int]]:
    """Return rows by heading: the worst mistakes of each class, the uncertain, random ones."""
    label, logit = (scored.column(name).to_numpy() for name in ("label", "logit"))
    p_fake = scored.column("p_fake").to_numpy()
    is_wrong = label != (p_fake >= 0.5)  # as the report counts them

    def take(rows: np.ndarray, order: np.ndarray) -> list[int]:
        found: list[int] = rows[np.argsort(order[rows], kind="stable")][:MAX_EXAMPLES].tolist()
        return found

    every_row = np.arange(len(label))
    shuffled = np.random.default_rng(0).permutation(len(label))
    return {
        "Worst mistakes: REAL called FAKE": take(every_row[is_wrong & (label == REAL)], -logit),
        "Worst mistakes: FAKE called REAL": take(every_row[is_wrong & (label == FAKE)], logit),
        "Most uncertain": take(every_row, np.abs(p_fake - 0.5)),
        RANDOM: take(every_row, shuffled),
    }


def find_examples(
    run: Run, source: Source, scored: pa.Table, detector: Detector | None = None
) -> dict[str, list[Example]]:
    """Return the images of `choose_examples`; given a detector, all but random ones get its map."""
    chosen = {
        heading: scored.take(pa.array(rows, pa.int64())).to_pylist()
        for heading, rows in choose_examples(scored).items()
    }
    images = _read_images(run, source, [row["key"] for rows in chosen.values() for row in rows])
    examples: dict[str, list[Example]] = {}
    for heading, rows in chosen.items():
        shown = [row for row in rows if row["key"] in images]
        maps: list[bytes] = []
        if detector is not None and heading != RANDOM:
            load = detector.preprocessing.load_image
            pixels = [load(images[row["key"]][0]) for row in shown]
            maps = [
                draw_gradient_image(*pair)
                for pair in zip(pixels, attribute_logits(detector, pixels), strict=True)
            ]
        examples[heading] = [
            Example(
                key=row["key"],
                image=images[row["key"]][1],
                gradient_map=maps[number] if maps else None,
                **{name: row[name] for name in EXAMPLE_COLUMNS},
            )
            for number, row in enumerate(shown)
        ]
    return examples


def _read_images(run: Run, source: Source, keys: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
    """Return image and thumbnail by key, without those that have changed since they were scored."""
    images = {}
    for shard in range(run.manifest.num_shards):
        rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
        rows = rows.filter(pc.is_in(rows.column("key"), pa.array(keys, pa.string())))
        for key, data in zip(rows.column("key").to_pylist(), source.read_images(rows), strict=True):
            with suppress(ImageError):
                if not isinstance(data, ImageError):
                    images[key] = data, make_thumbnail(data)
    return images


def make_thumbnail(data: bytes) -> bytes:
    """Return an image in at most THUMBNAIL_SIDE pixels: PNG of a small one, else WebP."""
    image = Image.fromarray(decode_image(data))
    buffer = io.BytesIO()
    if max(image.size) <= SMALL_SIDE:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
