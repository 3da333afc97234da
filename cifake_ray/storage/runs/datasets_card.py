"""Tell Hugging Face `load_dataset(OUT)` which files of a run are its rows, and their splits.

`.huggingface.yaml` instead of README.md, since pandas and pyarrow skip names that start with a dot
but take any other file of a folder for Parquet.
"""

from __future__ import annotations

from collections.abc import Sequence

from cifake_ray.core.schema import shard_name
from cifake_ray.errors import StorageError
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.manifest import ManifestFile, find_shards_by_split

CARD_NAME = ".huggingface.yaml"
# Names of Hugging Face; rows without a split beside others that have one are a split of their own.
SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test", None: "unsplit"}
CARD = """\
# For Hugging Face: load_dataset(FOLDER) reads this file. The column `split` has the split of a row;
# load_dataset(FOLDER, filters=[("split", "==", "test")]) reads the rows of one.
configs:
- config_name: default
  data_files:
"""


def encode_card(results: str, manifest_folder: AnyPath, files: Sequence[ManifestFile]) -> bytes:
    """Return the card of a run whose shards are all committed in the folder `results`."""
    try:
        shards = find_shards_by_split(manifest_folder, files)
    except StorageError:  # every row is committed; only the splits of the shards are not known
        shards = None
    lines = [CARD]
    if shards is None or len(shards) == 1:
        split = next(iter(shards)) if shards else None
        name = "mixed" if shards is None else SPLIT_NAMES[split or "train"]
        lines.append(f"  - split: {name}\n    path: {results}/part-*.parquet\n")
    else:
        for split, name in SPLIT_NAMES.items():
            if split in shards:
                lines.append(f"  - split: {name}\n    path:\n")
                lines += [f"    - {results}/{shard_name(n)}\n" for n in shards[split]]
    return "".join(lines).encode()
