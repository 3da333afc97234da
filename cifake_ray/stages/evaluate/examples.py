"""Choose images to show beside the numbers, and make their thumbnails."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import ImageError
from cifake_ray.report.html import SMALL_SIDE, Example
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.sources.source import Source

MAX_EXAMPLES = 12  # under each heading
THUMBNAIL_SIDE = 384  # pixels; smaller images stay as they are
RANDOM = "Random images"

DrawMaps = Callable[[Sequence[bytes]], Sequence[bytes]]  # encoded images -> PNG maps


def choose_examples(scored: pa.Table) -> dict[str, list[int]]:
    """Return rows by heading: the worst mistakes of each class, the uncertain, random ones."""
    label, logit = (scored.column(name).to_numpy() for name in ("label", "logit"))
    p_fake = scored.column("p_fake").to_numpy()
    is_wrong = label != (p_fake >= 0.5)  # as the report counts them

    def take(rows: np.ndarray, order: np.ndarray) -> list[int]:
        return rows[np.argsort(order[rows], kind="stable")][:MAX_EXAMPLES].tolist()

    every_row = np.arange(len(label))
    shuffled = np.random.default_rng(0).permutation(len(label))
    return {
        "Worst mistakes: REAL called FAKE": take(every_row[is_wrong & (label == REAL)], -logit),
        "Worst mistakes: FAKE called REAL": take(every_row[is_wrong & (label == FAKE)], logit),
        "Most uncertain": take(every_row, np.abs(p_fake - 0.5)),
        RANDOM: take(every_row, shuffled),
    }


def find_examples(
    run: Run, source: Source, scored: pa.Table, draw_maps: DrawMaps | None = None
) -> dict[str, list[Example]]:
    """Return the images of `choose_examples`, with gradient maps for all but the random ones."""
    chosen = choose_examples(scored)
    rows = scored.take(sorted({row for rows in chosen.values() for row in rows})).to_pylist()
    images = _read_images(run, source, [row["key"] for row in rows])
    keys = {
        heading: scored.column("key").take(rows).to_pylist() for heading, rows in chosen.items()
    }
    mapped = {key for heading in keys if heading != RANDOM for key in keys[heading]} & set(images)
    maps: Mapping[str, bytes] = {}
    if draw_maps is not None:
        order = sorted(mapped)
        maps = dict(zip(order, draw_maps([images[key] for key in order]), strict=True))
    names = ("key", "p_fake", "width", "height", "format", "jpeg_quality", "label", "source")
    examples = {
        row["key"]: Example(
            **{name: row[name] for name in names},
            image=make_thumbnail(images[row["key"]]),
            gradient_map=maps.get(row["key"]),
        )
        for row in rows
        if row["key"] in images
    }
    return {
        heading: [examples[key] for key in found if key in examples]
        for heading, found in keys.items()
    }


def _read_images(run: Run, source: Source, keys: Sequence[str]) -> dict[str, bytes]:
    """Return the encoded images by key, without those that have changed since they were scored."""
    images: dict[str, bytes] = {}
    for shard in range(run.manifest.num_shards):
        rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
        rows = rows.filter(pc.is_in(rows.column("key"), pa.array(keys, pa.string())))
        for key, data in zip(rows.column("key").to_pylist(), source.read_images(rows), strict=True):
            if not isinstance(data, ImageError):
                images[key] = data
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
