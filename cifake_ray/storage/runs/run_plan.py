"""Find the run of an output folder, or freeze a new one there."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from cifake_ray.errors import (
    NothingToDo,
    RunMismatch,
    SourceChanged,
    StorageError,
    UsageError,
)
from cifake_ray.storage.io.files import (
    TEMPORARY_PREFIX,
    check_writable,
    discard,
    hash_json,
    list_folder,
    make_folder,
    write_json,
)
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.runs.links import check_links
from cifake_ray.storage.runs.list_parts import THIS_PROCESS, TaskPool, list_rows
from cifake_ray.storage.runs.listed_rows import FOLDER_PREFIX, ListedRows, remove_rows
from cifake_ray.storage.runs.manifest import OWN_NAME, Manifest, deal_manifest
from cifake_ray.storage.runs.run import (
    PRIVATE_PREFIX,
    RESULTS,
    Run,
    claim_folder,
    is_finished,
    lock_run,
    read_again,
    read_record,
    read_run,
    reopen_run,
)
from cifake_ray.storage.runs.settings import check_settings, describe_difference, identify_run
from cifake_ray.storage.sources.source import Listing, Source
from cifake_ray.version import __version__

# They decide `is_fake` of a stored p_fake, and nothing else.
VERDICT_SETTINGS = ("target_fpr", "policy")


def describe_listing(
    manifest: Manifest, listing: Listing, counts: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Return what `_run.json` holds of a listing."""
    return {
        "manifest": asdict(manifest),
        "left_out": {reason: n for reason, n in listing.left_out.items() if n},
        "counts": counts,
    }


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The settings of a run before it is frozen."""

    out: AnyPath
    command: str
    settings: dict[str, Any]
    config: dict[str, Any]
    list_source: Callable[[], Listing]
    shard_rows: int | None
    source: Source | None = None  # of which the workers list what `list_source` leaves
    workers: TaskPool = THIS_PROCESS
    needs_labels: bool = False  # say which images have none
    log: Callable[[str], None] = lambda message: None

    def find(self) -> Run | None:
        """Return the run of `out`, if any. RunMismatch when it has other settings.

        It may have other VERDICT_SETTINGS if it has finished: see `change_verdicts`.
        """
        run = read_run(self.out)
        if run is not None:
            self.check_run(run)
        return run

    def find_again(self) -> Run:
        """Return the run of `out`, which has been found, as it is now. RunMismatch as `find`."""
        run = read_again(self.out)
        self.check_run(run)
        return run

    def lock(self) -> AbstractContextManager[bool]:
        """Keep other commands from changing the run meanwhile, see `lock_run`; wait for them."""
        message = f"{self.command}: waiting for another command that changes this output ..."
        return lock_run(self.out, lambda: self.log(message))

    def check_run(self, run: Run) -> None:
        """Raise RunMismatch when a run has other settings than this plan; see `find`."""
        if not self.changes_verdicts(run):
            known: dict[str, Any] = {}  # what may differ, and need not be named
            with suppress(StorageError):  # of a damaged `_SUCCESS`, told to who may use it
                known = self._verdicts if is_finished(run) else {}
            check_settings(self.out, run.settings | known, self._settings)
        elif not is_finished(run):
            raise RunMismatch(
                f"{self.out}: this run has not finished"
                f" ({describe_difference(run.settings, self._settings)}); finish it with its own"
                " settings first, then the verdicts can be changed without scoring again"
            )

    def changes_verdicts(self, run: Run) -> bool:
        """Return whether this plan differs from a run in VERDICT_SETTINGS, and in nothing else."""
        verdicts = self._verdicts
        settings = run.settings | verdicts
        with suppress(RunMismatch):
            check_settings(self.out, settings, self._settings)
            return any(run.settings.get(name) != value for name, value in verdicts.items())
        return False

    def change_verdicts(self, run: Run) -> Run:
        """Give a run the VERDICT_SETTINGS of this plan, if it has others; its shards follow.

        Within `lock`, since an extension replaces the same record.
        `_run.json` is replaced first. It names the run before, so that nothing of it is taken for
        this one, wherever a kill comes.
        """
        if not self.changes_verdicts(run):
            return run
        record = read_record(self.out) | {
            "tool_version": __version__,
            "fingerprint": hash_json(self._settings),
            "settings": self._settings,
            "config": self.config,
            "earlier_identities": [*run.earlier_identities, *run.identities],
        }
        write_json(self.out / "_run.json", record)
        reopen_run(run)
        return read_again(self.out)

    def check_new(self) -> None:
        """Raise UsageError, RunMismatch or StorageError before a long listing, not after it."""
        if str(self.out).startswith("memory://"):
            raise UsageError(f"{self.out}: memory is that of one process, the workers are others")
        check_links(self.out)
        names = (f"{PRIVATE_PREFIX}attempts", RESULTS[self.command])
        folders = [self._manifest_folder, *(self.out / name for name in names)]
        foreign = [
            path
            for folder in folders
            for path in list_folder(folder)
            if not path.name.startswith(TEMPORARY_PREFIX)
            and not (folder == folders[0] and OWN_NAME.fullmatch(path.name))
        ]
        if foreign and self.find() is None:  # else another process has just frozen it
            raise RunMismatch(
                f"{foreign[0]} is where a run would write, but the folder holds no run; choose a"
                " new output folder"
            )
        check_writable(self.out)

    def freeze(self) -> Run:
        """List the source and freeze the run, or return one that was frozen meanwhile."""
        folder, run_id = self._manifest_folder, secrets.token_hex(4)
        make_folder(folder, parents=False)
        try:
            with self.list_rows(folder) as (listing, rows):
                workers, size = self.workers, self.shard_rows
                manifest = deal_manifest(folder, run_id, listing, rows, size, workers=workers)
                self.log_notes(listing)
                plan = {
                    **describe_listing(manifest, listing, listing.counts.to_dict()),
                    "has_private_folders": True,
                }
                claim_folder(self.out, self._settings, self.config, plan)
        except StorageError:
            if (run := self.find()) is None:
                raise  # else another process was first, and has removed what was listed
            return run
        run = read_again(self.out)
        if run.manifest != manifest:  # another process was first
            for file in manifest.files:
                discard(folder / file.name)
        return run

    @contextmanager
    def list_rows(
        self, manifest_folder: AnyPath, name: str | None = None
    ) -> Iterator[tuple[Listing, ListedRows]]:
        """List the source, see `list_rows`; remove the files of its rows at the end.

        They stay when the store or the workers fail, and after a kill: the next attempt goes on
        with what workers listed, unless it gives them another `name` (8 hexadecimal digits), and
        removes the rest at its end.
        """
        store = repr(getattr(self.source, "store", None))  # with its endpoint
        name = name or hash_json([self._settings, store, __version__])[:8]
        folder = manifest_folder / f"{FOLDER_PREFIX}{name}"

        def log(message: str) -> None:
            self.log(f"{self.command}: {message}")

        try:
            yield list_rows(
                self.list_source,
                self.source,
                folder,
                self.workers,
                log,
                describe=self.needs_labels,
            )
        except (UsageError, NothingToDo, RunMismatch, SourceChanged):
            remove_rows(folder)
            raise
        remove_rows(folder)

    def log_notes(self, listing: Listing) -> None:
        for note in listing.notes:
            self.log(f"{self.command}: {note}")

    def open(self) -> Run:
        """Resume the run of `out`, or list the source and freeze a new one."""
        run = self.find()
        if run is None:
            self.check_new()
            run = self.freeze()
        return run

    @property
    def _manifest_folder(self) -> AnyPath:
        return self.out / f"{PRIVATE_PREFIX}manifest"

    @property
    def _verdicts(self) -> dict[str, Any]:
        return {n: value for n, value in self._settings.items() if n in VERDICT_SETTINGS}

    @property
    def _settings(self) -> dict[str, Any]:
        return identify_run(self.command, self.settings)
