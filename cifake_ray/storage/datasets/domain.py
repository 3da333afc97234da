"""Find out from the headers in shards how large images are, and the domain of a detector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.config import Fit
from cifake_ray.core.imaging.training_domain import DOMAIN_COLUMNS, TrainingDomain, find_domain
from cifake_ray.storage.datasets.training_rows import TrainingRows
from cifake_ray.storage.datasets.training_set import ImageSet
from cifake_ray.storage.sources.image_table import ImageTable


def read_domain(images: ImageSet, fit: Fit = "resize") -> TrainingDomain | None:
    """Return the domain of images from the header columns of their rows; no image is read.

    With `fit` "crops" it has no sides, since a detector of crops sees pixels of any image alike.
    None when a file is not of convert: these columns may mean something else there.
    """
    rows = images.rows
    groups, starts = np.unique(rows.group[images.positions], return_index=True)
    distinct = []
    for group, positions in zip(groups, np.split(images.positions, starts[1:]), strict=True):
        path, number = rows.groups[group]
        with ImageTable(path, path.name, rows.choice) as table:
            if not table.is_ours:
                return None
            headers = table.read([number], DOMAIN_COLUMNS)
        headers = headers.take(pa.array(rows.row[positions]))
        distinct.append(headers.group_by(DOMAIN_COLUMNS).aggregate([]))  # memory stays flat
    domain = find_domain(pa.concat_tables(distinct))
    return replace(domain, sides=None) if fit == "crops" else domain


def read_typical_side(rows: TrainingRows) -> int | None:
    """Return the median of the shorter sides in the first row group, in pixels.

    None when its file is not of convert.
    """
    path, number = rows.groups[0]
    with ImageTable(path, path.name, rows.choice) as table:
        if not table.is_ours:
            return None
        headers = table.read([number], ["width", "height"])
    sides = pc.min_element_wise(headers.column("width"), headers.column("height")).drop_null()
    return int(np.median(sides.to_numpy())) if len(sides) else None
