"""The papers of a training run: `_run.json`, checkpoint, history, bundle, `_SUCCESS`.

Floor: storage.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import BundleError, RunMismatch, StorageError
from cifake_ray.storage.io.files import (
    create_bytes,
    encode_json,
    exists,
    hash_json,
    read_bytes,
    read_if_exists,
    read_json,
    write_bytes,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.run import check_settings
from cifake_ray.version import __version__


def claim_folder(
    path: AnyPath,
    command: str,
    settings: dict[str, Any],
    config: dict[str, Any],
    is_begun: Callable[[], bool],
) -> None:
    """Put `_run.json` into a folder. RunMismatch when work has begun there with other settings."""
    settings = {"command": command, "schema_version": SCHEMA_VERSION, **settings}
    record = {
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "command": command,
        "fingerprint": hash_json(settings),
        "settings": settings,
        "config": config,
    }
    papers = path / "_run.json"
    if not create_bytes(papers, encode_json(record)):
        found = read_json(papers)
        if "settings" not in found:
            raise RunMismatch(f"{papers}: not a run of cifake-ray; choose a new folder")
        if found.get("command") != command or is_begun():
            check_settings(path, found["settings"], settings)
        else:  # refused or killed before it came to anything: there is nothing to lose
            write_json(papers, record)


def read_history(path: AnyPath) -> list[dict[str, Any]]:
    """One row per epoch of the training that made a bundle; BundleError when they are damaged."""
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
class TrainRun:
    """The folder RUN of `train`."""

    path: AnyPath

    @property
    def checkpoint_path(self) -> AnyPath:
        return self.path / "checkpoints" / "last.pt"

    @property
    def bundle_path(self) -> AnyPath:
        return self.path / "bundle"

    @property
    def history_path(self) -> AnyPath:
        return self.path / "history.jsonl"

    def open(self, settings: dict[str, Any], config: dict[str, Any]) -> None:
        """Claim the folder for these settings. RunMismatch when it belongs to others."""
        claim_folder(
            self.path,
            "train",
            settings,
            config,
            lambda: exists(self.checkpoint_path) or self.read_success() is not None,
        )

    def read_checkpoint(self) -> dict[str, Any] | None:
        """The latest checkpoint, or None before the first. StorageError when it is damaged."""
        import torch

        data = read_if_exists(self.checkpoint_path)
        if data is None:
            return None
        try:
            checkpoint: dict[str, Any] = torch.load(
                io.BytesIO(data), map_location="cpu", weights_only=True
            )
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise StorageError(
                f"{self.checkpoint_path}: damaged; delete the folder {self.path} to start again"
            ) from error
        return checkpoint

    def write_checkpoint(self, data: bytes) -> None:
        """Commit a checkpoint."""
        write_bytes(self.checkpoint_path, data)

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Show the history of a committed checkpoint: one row or more."""
        lines = "".join(json.dumps(row) + "\n" for row in history)
        write_bytes(self.history_path, lines.encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(history[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_bytes(self.path / "summary.csv", table.getvalue().encode())

    def read_history(self) -> list[dict[str, Any]]:
        """One row per finished epoch."""
        return read_history(self.path)

    def read_success(self) -> dict[str, Any] | None:
        """What the finished run said of itself, or None when it has not finished."""
        path = self.path / "_SUCCESS"
        return read_json(path) if exists(path) else None

    def write_success(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "_SUCCESS", {"schema_version": SCHEMA_VERSION, **summary})
