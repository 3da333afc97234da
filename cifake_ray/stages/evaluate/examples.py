"""Choose images to show beside the numbers, and make their thumbnails."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from cifake_ray.core.imaging.decode import decode_image
from cifake_ray.core.imaging.preprocessing import fit_image
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.errors import ImageError
from cifake_ray.report.html import Mistake
from cifake_ray.storage.runs.manifest import read_manifest_shard
from cifake_ray.storage.runs.run import Run
from cifake_ray.storage.sources.source import Source

MAX_MISTAKES = 48  # on the contact sheet, half of each kind
THUMBNAIL_SIZE = 96  # pixels; smaller images stay as they are


def find_mistakes(run: Run, source: Source, scored: pa.Table) -> list[Mistake]:
    """Return the mistakes with the most extreme logits of each kind, with thumbnails."""
    label = scored.column("label").to_numpy()
    logit = scored.column("logit").to_numpy()
    is_wrong = label != (scored.column("p_fake").to_numpy() >= 0.5)  # as the report counts them
    chosen: list[int] = []
    for kind, sign in ((REAL, 1), (FAKE, -1)):
        wrong = np.flatnonzero((label == kind) & is_wrong)
        chosen += wrong[np.argsort(-sign * logit[wrong], kind="stable")][
            : MAX_MISTAKES // 2
        ].tolist()
    by_key = {row["key"]: row for row in scored.take(chosen).to_pylist()}
    mistakes = []
    for shard in range(run.manifest.num_shards):
        rows = read_manifest_shard(run.manifest_folder, run.find_file(shard), shard)
        rows = rows.filter(pc.is_in(rows.column("key"), pa.array(list(by_key), pa.string())))
        for key, data in zip(rows.column("key").to_pylist(), source.read_images(rows), strict=True):
            if isinstance(data, ImageError):
                continue  # the shards have changed since it was scored
            row = by_key[key]
            mistakes.append(
                Mistake(key=key, label=row["label"], p_fake=row["p_fake"], png=make_thumbnail(data))
            )
    return mistakes


def make_thumbnail(data: bytes) -> bytes:
    """Return a PNG of an image, resized to THUMBNAIL_SIZE if it is larger."""
    pixels = decode_image(data)
    if max(pixels.shape[:2]) > THUMBNAIL_SIZE:
        pixels = fit_image(pixels, size=THUMBNAIL_SIZE, fit="resize")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
