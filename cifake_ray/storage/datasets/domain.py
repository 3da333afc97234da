"""Find out from the headers in shards how large images are, and the domain of a detector."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.imaging.training_domain import (
    ANY_SIDE,
    DOMAIN_COLUMNS,
    TrainingDomain,
    find_domain,
)
from cifake_ray.storage.datasets.training_rows import TrainingRows
from cifake_ray.storage.datasets.training_set import ImageSet
from cifake_ray.storage.sources.image_table import ImageTable


def read_domain(images: ImageSet, preprocessing: Preprocessing) -> TrainingDomain | None:
    """Return the domain of images from the header columns of their rows; no image is read.

    A detector of crops sees all images alike that hold one; smaller ones are padded, which is
    unlike training unless images as small were in it.
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
    if preprocessing.fit == "crops":
        least = min(domain.sides[0], preprocessing.image_size)
        domain = replace(domain, sides=(least, ANY_SIDE))
    return domain


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
