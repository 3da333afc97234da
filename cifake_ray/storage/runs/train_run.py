"""Read and write the folder of a training run: `_run.json`, checkpoint, history, `_SUCCESS`."""

from __future__ import annotations

import fcntl
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import BundleError, StorageError
from cifake_ray.storage.bundles.weights import UNPICKLING_ERRORS
from cifake_ray.storage.io.files import (
    MAX_JSON_BYTES,
    exists,
    make_folder,
    read_bytes,
    read_if_exists,
    read_json,
    remove_leftovers,
    write_bytes,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import PARQUET_ERRORS, check_columns, parse_record
from cifake_ray.storage.io.text_rows import encode_csv, encode_json_lines
from cifake_ray.storage.runs.links import check_links
from cifake_ray.storage.runs.run import claim_folder, read_record
from cifake_ray.storage.runs.settings import check_settings, identify_run

# What zipfile and torch raise for bytes that are not those that were written.
DAMAGE = (*UNPICKLING_ERRORS, zipfile.BadZipFile, zlib.error)
DIGEST_FIELDS = [pa.field("file", pa.string()), pa.field("digest", pa.uint64())]


@dataclass(frozen=True)
class AnyEpoch:
    """What a row of a history has in every version."""

    epoch: int


@dataclass(frozen=True)
class Epoch(AnyEpoch):
    """What a row of the history of a run has too."""

    step: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    val_auroc: float
    train_s: float
    images_per_s: float


@dataclass(frozen=True)
class _TrainSummary:
    epochs: int
    stopped: str
    bundle: str


@dataclass(frozen=True)
class _State:
    epoch: int
    step: int
    batch: int
    history: list[Epoch]
    patience: dict[str, Any]
    kept: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if len(self.history) != self.epoch or bool(self.kept) != bool(self.epoch):
            raise ValueError(f"{len(self.history)} epochs in its history, not {self.epoch}")


@dataclass(frozen=True)
class _Checkpoint:
    """What `Trainer.resume` reads; it checks the tensors."""

    network: dict[str, Any]
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    state: _State
    precision: str = ""


def read_history(path: AnyPath, kind: type[AnyEpoch] = AnyEpoch) -> list[dict[str, Any]]:
    """Return the history of a training, a row per epoch. BundleError when it is damaged."""
    history = path / "history.jsonl"
    if not exists(history):
        return []
    try:
        rows = [json.loads(line) for line in read_bytes(history, MAX_JSON_BYTES).splitlines()]
        for row in rows:
            parse_record(kind, row)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{history}: damaged ({error}); remove the file or copy the bundle again"
        ) from error
    return rows


@dataclass(frozen=True)
class RunFolder:
    """The folder RUN of `train` or `tune`, from `_run.json` to `_SUCCESS`."""

    path: AnyPath
    command: ClassVar[str]
    summary: ClassVar[type]  # what others read of `_SUCCESS`

    def has_begun(self) -> bool:
        """Return whether work is stored that belongs to the settings of `_run.json`."""
        raise NotImplementedError

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other commands out of a local folder meanwhile. StorageError when one is at work.

        The folder itself is locked, and the end of the process releases it. Stores have no locks.
        """
        check_links(self.path)
        if not isinstance(self.path, Path):
            yield
            return
        make_folder(self.path)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with suppress(OSError):  # not every file system locks folders
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise StorageError(
                        f"{self.path}: another `{self.command}` is at work in it; wait for its end,"
                        " or choose another folder"
                    ) from error
            yield
        finally:
            os.close(folder)

    def open(self, settings: dict[str, Any], config: dict[str, Any]) -> None:
        """Claim the folder for these settings. RunMismatch when it belongs to others."""
        settings = identify_run(self.command, settings)
        claim_folder(self.path, settings, config, has_begun=self.has_begun)

    def check_options(self, options: dict[str, Any], unread: Sequence[str]) -> dict[str, Any]:
        """Return the settings of a finished run. RunMismatch when it has other options.

        `unread` names settings that take reading rows or weights: those of `_run.json` are used.
        """
        found = read_record(self.path)["settings"]
        settings = {**options, **{name: found.get(name) for name in unread}}
        check_settings(self.path, found, identify_run(self.command, settings))
        return settings

    def read_success(self) -> dict[str, Any] | None:
        """Return the summary of a finished run, or None when it has not finished.

        RunMismatch when the folder is that of another verb.
        """
        check_links(self.path)
        path = self.path / "_SUCCESS"
        if not exists(path):
            return None
        record = read_json(path)
        verb = {"command": read_record(self.path)["settings"].get("command")}
        check_settings(self.path, verb, {"command": self.command})
        try:
            parse_record(self.summary, record)
        except ValueError as error:
            raise StorageError(
                f"{path}: not the summary of a {self.command} run ({error}); remove this file and"
                " run the same command again"
            ) from error
        return record

    def write_success(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished, and remove what killed processes left."""
        read_record(self.path)  # another folder may have taken its place
        remove_leftovers(self.path)
        write_json(self.path / "_SUCCESS", {"schema_version": SCHEMA_VERSION, **summary})
        read_record(self.path)


@dataclass(frozen=True)
class TrainRun(RunFolder):
    """The folder RUN of `train`."""

    command = "train"
    summary = _TrainSummary

    @property
    def checkpoint_path(self) -> AnyPath:
        return self.path / "checkpoints" / "last.pt"

    @property
    def bundle_path(self) -> AnyPath:
        return self.path / "bundle"

    @property
    def digests_path(self) -> AnyPath:
        return self.path / "digests.parquet"

    def has_begun(self) -> bool:
        return exists(self.checkpoint_path) or exists(self.path / "_SUCCESS")

    def read_checkpoint(self) -> dict[str, Any] | None:
        """Return the last checkpoint, None before the first. StorageError when it is damaged."""
        import torch

        data = read_if_exists(self.checkpoint_path)
        if data is None:
            return None
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:  # torch ignores the sums it has stored
                if file.testzip() is not None:
                    raise ValueError("its sum is another")
            checkpoint: dict[str, Any] = torch.load(
                io.BytesIO(data), map_location="cpu", weights_only=True
            )
            parse_record(_Checkpoint, checkpoint)
        except DAMAGE as error:
            raise self.refuse_checkpoint(error) from error
        return checkpoint

    def refuse_checkpoint(self, error: Exception) -> StorageError:
        """Return what to raise for a checkpoint that is not of this training."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return StorageError(
            f"{self.checkpoint_path}: damaged ({reason}); delete the folder {self.path} to start"
            " again"
        )

    def write_checkpoint(self, data: bytes) -> None:
        """Commit a checkpoint."""
        make_folder(self.checkpoint_path.parent, parents=False)
        write_bytes(self.checkpoint_path, data)

    def read_digests(self) -> dict[str, np.ndarray]:
        """Return the digests of images that were kept. StorageError when they are damaged."""
        data = read_if_exists(self.digests_path)
        if data is None:
            return {}
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            check_columns(table.schema, DIGEST_FIELDS)
            if any(column.null_count for column in table.columns):
                raise ValueError("values are missing")
            stamps = pa.concat_arrays(table.column("file").chunks or [pa.array([], pa.string())])
            stamps = stamps.dictionary_encode()
            numbers, digests = stamps.indices.to_numpy(), table.column("digest").to_numpy()
            counts = np.bincount(numbers, minlength=len(stamps.dictionary))
            parts = np.split(digests[np.argsort(numbers, kind="stable")], counts.cumsum())
            return dict(zip(stamps.dictionary.to_pylist(), parts, strict=False))
        except PARQUET_ERRORS as error:
            raise StorageError(
                f"{self.digests_path}: damaged ({error}); delete it, and the images are read again"
            ) from error

    def write_digests(self, digests: dict[str, np.ndarray]) -> None:
        """Keep the digests of images, so that neither ranks nor a resumed run read all of them."""
        numbers = np.repeat(np.arange(len(digests)), [len(each) for each in digests.values()])
        stamps = pa.array(list(digests), pa.string()).take(pa.array(numbers))
        values = pa.array(np.concatenate([*digests.values()]), pa.uint64())
        table = pa.Table.from_arrays([stamps, values], schema=pa.schema(DIGEST_FIELDS))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True)
        write_bytes(self.digests_path, sink.getvalue().to_pybytes())

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Write the history of a committed checkpoint, of at least one row."""
        write_bytes(self.path / "history.jsonl", encode_json_lines(history))
        write_bytes(self.path / "summary.csv", encode_csv(list(history[-1]), history))

    def read_history(self) -> list[dict[str, Any]]:
        """Return a row per finished epoch. StorageError when one is not as it was written.

        `summary.csv`, which is written after it and so read before it, has the same rows, but for
        the last when a kill came between them.
        """
        summary = read_if_exists(self.path / "summary.csv")
        try:
            history = read_history(self.path, Epoch)
            if summary is not None:
                names, *lines = summary.decode().splitlines()
                same = history[: len(lines)]
                if encode_csv(names.split(","), same) != summary:
                    raise ValueError("it differs from summary.csv")
        except (BundleError, ValueError) as error:
            raise StorageError(
                f"{self.path / 'history.jsonl'}: damaged, or summary.csv is; delete both, and"
                " _SUCCESS, and the same command writes them again from the checkpoint"
            ) from error
        return history
