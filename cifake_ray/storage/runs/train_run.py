"""Read and write the folder of a training run: `_run.json`, checkpoint, history, `_SUCCESS`."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import BundleError, StorageError
from cifake_ray.storage.io.files import (
    encode_csv,
    encode_json_lines,
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
from cifake_ray.storage.runs.run import check_settings, claim_folder, identify_run, read_record

# What zipfile and torch raise for bytes that are not those that were written.
DAMAGE = (
    EOFError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_history(path: AnyPath) -> list[dict[str, Any]]:
    """Return the history of a training, a row per epoch. BundleError when it is damaged."""
    history = path / "history.jsonl"
    if not exists(history):
        return []
    try:
        return [dict(json.loads(line)) for line in read_bytes(history).splitlines()]
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{history}: damaged ({error}); remove the file or copy the bundle again"
        ) from error


@dataclass(frozen=True)
class RunFolder:
    """The folder RUN of `train` or `tune`, from `_run.json` to `_SUCCESS`."""

    path: AnyPath
    command: ClassVar[str]

    def has_begun(self) -> bool:
        """Return whether work is stored that belongs to the settings of `_run.json`."""
        raise NotImplementedError

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other commands out of a local folder meanwhile. StorageError when one is at work.

        The folder itself is locked, and the end of the process releases it. Stores have no locks.
        """
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
        """Return the summary of a finished run, or None when it has not finished."""
        path = self.path / "_SUCCESS"
        return read_json(path) if exists(path) else None

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

    @property
    def checkpoint_path(self) -> AnyPath:
        return self.path / "checkpoints" / "last.pt"

    @property
    def bundle_path(self) -> AnyPath:
        return self.path / "bundle"

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
        except DAMAGE as error:
            raise StorageError(
                f"{self.checkpoint_path}: damaged; delete the folder {self.path} to start again"
            ) from error
        return checkpoint

    def write_checkpoint(self, data: bytes) -> None:
        """Commit a checkpoint."""
        make_folder(self.checkpoint_path.parent, parents=False)
        write_bytes(self.checkpoint_path, data)

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
            history = read_history(self.path)
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
