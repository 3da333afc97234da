"""Encode score rows for programs that show images: Label Studio, FiftyOne, Hugging Face."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.config import ExportConfig
from cifake_ray.core.schema import LABEL_NAMES, SHARD_FIELDS, datasets_metadata
from cifake_ray.errors import ImageError, UsageError
from cifake_ray.storage.io.files import encode_json
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.export_tables import Sink, Tables, encode_json_rows, list_rows
from cifake_ray.storage.runs.read_scores import Scores, find_image, take_listing
from cifake_ray.storage.runs.settings import name_detector
from cifake_ray.storage.sources.allowed_paths import is_uri
from cifake_ray.storage.sources.source import Source

GROUP_ROWS, GROUP_BYTES = 1024, 64 * 2**20  # of images in a row group
IMAGE_FIELD = SHARD_FIELDS[1]
# Fields that every sample of FiftyOne has, and those that are ours.
SAMPLE_NAMES = {
    *("id", "filepath", "tags", "metadata", "media_type", "created_at", "last_modified_at"),
    *("prediction", "ground_truth"),
}
NAME = re.compile(r"[A-Za-z]\w*", re.ASCII)

PREDICTION_COLUMNS = ["logit", "p_fake", "is_fake", "label"]


@dataclass(frozen=True)
class ImageFiles:
    """Where the images of a run are, and where the export goes."""

    root: str  # a path or URI: what the run has read
    source: Source | None  # to read images, where the format holds them
    base: str  # the folder of the file that is written; for stdout `root`
    prefix: str | None
    columns: list[str]  # none for all
    is_array: bool  # one JSON array, not lines
    model_version: str
    counts: Counter[str]

    def check_name(self, rows: pa.Table, added: str) -> None:
        """Raise UsageError when a column that is wanted has the name of one that is added."""
        if added in (self.columns or rows.column_names):
            raise UsageError(f"--columns: leave out {added!r}: the images get this name")

    @classmethod
    def find(
        cls, scores: Scores, config: ExportConfig, counts: Counter[str], file: AnyPath | None
    ) -> ImageFiles:
        """Find them. StorageError when the folder holds only score files."""
        holds_images = config.chosen_format == "parquet-images"
        return cls(
            root=scores.find_root(),
            source=scores.open_source(config.store, config.allow_prefix) if holds_images else None,
            base=scores.find_root() if file is None else str(file.parent),
            prefix=config.image_prefix,
            columns=config.column_names,
            is_array=config.file.lower().endswith(".json"),
            model_version=describe_model(scores),
            counts=counts,
        )

    def list_rows(self, tables: Tables, added: str = "") -> Iterator[_Row]:
        """Yield each row with the file that is its image.

        Rows that never had a file are left out and counted. UsageError for images inside Parquet
        files or tars, and for a column that has the name of one that is `added`.
        """
        for path, table in tables:
            rows, listing = take_listing(table)
            self.check_name(rows, added)
            columns = (
                list_rows(path, rows.select(self.columns or rows.column_names)),
                list_rows(path, rows.select(PREDICTION_COLUMNS)),
                listing.column("location").to_pylist(),
                listing.column("row").to_pylist(),
            )
            for values, facts, location, number in zip(*columns, strict=True):
                if number is not None:
                    raise UsageError(
                        f"{self.root}: its images are inside Parquet files or tars, which no other"
                        " program opens by name; use --format parquet-images"
                    )
                image = find_image(self.root, location, number)
                if image is None:
                    self.counts["without a file"] += 1
                    self.counts["rows"] -= 1
                    continue
                yield _Row(values, image, **facts)


@dataclass(frozen=True)
class _Row:
    values: dict[str, Any]  # of the columns that are wanted, as JSON has them
    image: str  # a path or URI
    logit: float | None
    p_fake: float | None
    is_fake: bool | None
    label: int | None

    @property
    def verdict(self) -> str | None:
        """FAKE or REAL; None without a score."""
        return None if self.is_fake is None else LABEL_NAMES[self.is_fake]

    @property
    def confidence(self) -> float | None:
        """The probability that the detector gives its verdict."""
        return self.p_fake if self.is_fake or self.p_fake is None else round(1 - self.p_fake, 9)


def describe_model(scores: Scores) -> str:
    """Return what names a detector and its precision, such as `run/bundle 3f2a9c0d1e4b int8`."""
    run = scores.require_run()
    name = "/".join(name_detector(run.config).rstrip("/").split("/")[-2:])
    facts = (str(run.settings.get("bundle"))[:12], str(run.settings.get("precision", "float32")))
    return " ".join((name, *facts))


def find_below(path: str, folder: str) -> str | None:
    """Return what follows a folder in a path or URI below it, else None."""
    start = folder.rstrip("/") + "/"
    return path[len(start) :] if path.startswith(start) else None


def encode_tasks(tables: Tables, files: ImageFiles) -> Iterator[bytes]:
    """Yield tasks of Label Studio with the verdict as a prediction of `<Choices name="verdict">`.

    Source: Label Studio, "Import pre-annotated data" and "Local storage".
    """
    tasks = (_make_task(row, files) for row in files.list_rows(tables, "image"))
    yield from _encode_array("[", tasks, "]") if files.is_array else map(_encode_line, tasks)


def _make_task(row: _Row, files: ImageFiles) -> dict[str, Any]:
    prediction = {
        "model_version": files.model_version,
        "score": row.confidence,
        "result": [
            {
                "from_name": "verdict",
                "to_name": "image",
                "type": "choices",
                "value": {"choices": [row.verdict]},
            }
        ],
    }
    return {
        "data": {**row.values, "image": _find_url(row.image, files)},
        "predictions": [prediction] if row.verdict else [],
    }


def _find_url(image: str, files: ImageFiles) -> str:
    """Return what Label Studio opens: https, its own local files below /, or a store's URI."""
    if files.prefix is not None:
        below = find_below(image, files.root)
        return files.prefix + quote(image.lstrip("/") if below is None else below)
    return image if is_uri(image) else f"/data/local-files/?d={quote(image.lstrip('/'))}"


def encode_samples(tables: Tables, files: ImageFiles) -> Iterator[bytes]:
    """Yield `samples.json` of a FiftyOneDataset, in the form without ids, which it still imports.

    Source: fiftyone 1.22, `fiftyone.utils.data.importers.FiftyOneDatasetImporter`.
    """
    samples = (_make_sample(row) for row in files.list_rows(tables))
    yield from _encode_array('{"samples": [', samples, "]}")


def _make_sample(row: _Row) -> dict[str, Any]:
    names = [
        name if NAME.fullmatch(name) and name not in SAMPLE_NAMES else f"column_{_simplify(name)}"
        for name in row.values
    ]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"--columns: FiftyOne would call more than one of them {twice[0]!r}")
    sample = {"filepath": row.image, **dict(zip(names, row.values.values(), strict=True))}
    if row.verdict is not None:
        sample["prediction"] = {
            "_cls": "Classification",
            "label": row.verdict,
            "confidence": row.confidence,
            "logits": [0.0, row.logit],  # of REAL and FAKE: their difference is the detector's
        }
    if row.label is not None:
        sample["ground_truth"] = {"_cls": "Classification", "label": LABEL_NAMES[row.label]}
    return sample


def _simplify(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII)


def describe_dataset(scores: Scores) -> bytes:
    """Return `metadata.json` of a FiftyOneDataset; it finds the fields in the samples."""
    run = scores.require_run()
    info = {
        "classes": list(LABEL_NAMES),
        "detector": describe_model(scores),
        "source": scores.find_root(),
        "run": run.identity,
    }
    return encode_json({"media_type": "image", "default_classes": list(LABEL_NAMES), "info": info})


def encode_imagefolder(tables: Tables, files: ImageFiles) -> Iterator[bytes]:
    """Yield `metadata.jsonl`, by which `load_dataset("imagefolder")` finds images and columns.

    Source: Hugging Face datasets, "Create an image dataset". UsageError for an image that is not
    below the folder of the file.
    """
    for row in files.list_rows(tables, "file_name"):
        name = find_below(row.image, files.base)
        if name is None:
            raise UsageError(
                f"{row.image} is not below {files.base}, where imagefolder looks; write the file to"
                f" {files.root}/metadata.jsonl, or use --format parquet-images"
            )
        yield _encode_line({"file_name": name, **row.values})


def encode_image_parquet(tables: Tables, files: ImageFiles) -> Iterator[bytes]:
    """Yield a Parquet file whose column `image` `load_dataset` decodes; null where it is gone."""
    sink, writer = Sink(), None
    for _, table in tables:
        rows, listing = take_listing(table)
        files.check_name(rows, IMAGE_FIELD.name)
        rows = rows.select(files.columns or rows.column_names)
        if writer is None:
            fields = [IMAGE_FIELD, *rows.schema]
            schema = pa.schema(fields, metadata=datasets_metadata(pa.schema(fields)))
            codecs = dict.fromkeys(rows.column_names, "zstd")  # images are compressed already
            writer = pq.ParquetWriter(sink, schema, compression=codecs, write_page_checksum=True)
        for start, images in _read_groups(listing, files):
            group = rows.slice(start, len(images))
            group = group.add_column(0, IMAGE_FIELD, pa.array(images, IMAGE_FIELD.type))
            writer.write_table(group.cast(writer.schema))
            yield sink.take()
    if writer is not None:
        writer.close()
    yield sink.take()


def _read_groups(
    listing: pa.Table, files: ImageFiles
) -> Iterator[tuple[int, list[dict[str, Any] | None]]]:
    """Yield the images of a row group, and the number of its first row."""
    assert files.source is not None
    images: list[dict[str, Any] | None] = []
    start = size = 0
    keys = listing.column("key").to_pylist()
    for key, data in zip(keys, files.source.read_images(listing), strict=True):
        if isinstance(data, ImageError):
            files.counts[f"image {data.error}"] += 1
            images.append(None)
        else:
            images.append({"bytes": data, "path": key})
            size += len(data)
        if len(images) == GROUP_ROWS or size >= GROUP_BYTES:
            yield start, images
            start, size, images = start + len(images), 0, []
    if images:
        yield start, images


def _encode_line(value: Mapping[str, Any]) -> bytes:
    return encode_json_rows([value])


def _encode_array(first: str, items: Iterable[Mapping[str, Any]], last: str) -> Iterator[bytes]:
    """Yield a JSON array, an item a line."""
    yield first.encode()
    for number, item in enumerate(items):
        yield f"{',' if number else ''}\n".encode() + _encode_line(item).rstrip(b"\n")
    yield f"\n{last}\n".encode()
