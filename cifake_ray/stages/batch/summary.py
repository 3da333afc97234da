"""Count what the workers of a batch report, for its progress and its summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cifake_ray.errors import ExitCode, StorageError
from cifake_ray.stages.batch.shard_worker import ShardReport
from cifake_ray.storage.io.files import read_json
from cifake_ray.storage.io.paths import AnyPath
from cifake_ray.storage.io.records import parse_record
from cifake_ray.storage.runs.run import ShardStats


@dataclass(frozen=True)
class Progress:
    """Progress of a batch run."""

    done: int  # images, including those of resumed shards
    failed: int
    listed: int
    images_per_s: float  # in this process, since the first shard was started
    eta_s: float | None


@dataclass(frozen=True)
class BatchSummary:
    """Counts of a finished batch run: listed = done + failed."""

    command: str
    out: str
    listed: int
    done: int
    failed: int
    errors: dict[str, int]
    unlike_training: dict[str, int]  # images by reason; empty if no domain is known
    left_out: dict[str, int]
    shards_total: int
    shards_resumed: int
    shards_retried: int  # an earlier attempt was lost with its worker
    elapsed_s: float
    images_per_s: float
    steady_images_per_s: float
    ran_on: str = ""  # the workers; empty in outputs of earlier versions
    precision: str = ""  # of the detector; empty for convert and in outputs of earlier versions
    # What `is_fake` means, and how many images each threshold of the bundle calls FAKE.
    threshold: float | None = None
    policy: str = ""  # decides instead of a threshold, if there is one
    called_fake: dict[str, int] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, int] = field(default_factory=dict)  # images by claim; {} if not asked for
    labels: dict[str, int] = field(default_factory=dict)  # images listed; {} if not counted
    splits: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)  # new, changed, gone: of `--extend`

    def exit_code(self, max_error_rate: float) -> ExitCode:
        too_many = self.failed > max_error_rate * self.listed
        return ExitCode.TOO_MANY_ERRORS if too_many else ExitCode.OK


@dataclass
class Totals:
    """Adds up the reports of the workers."""

    listed: int
    shards: list[ShardStats] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    unlike_training: Counter[str] = field(default_factory=Counter)
    called_fake: Counter[str] = field(default_factory=Counter)
    provenance: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    resumed: int = 0
    retried: int = 0
    worked_rows: int = 0
    # By host, when its first shard was started and its last one ended: clocks are never compared.
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, report: ShardReport) -> None:
        self.shards.append(report.stats)
        self.errors.update(report.stats.errors)
        self.unlike_training.update(report.stats.unlike_training)
        self.called_fake.update(report.stats.called_fake)
        self.provenance.update(report.stats.provenance)
        self.rows += report.stats.rows
        self.resumed += not report.worked
        self.retried += report.retried
        if report.worked:
            self.worked_rows += report.worked
            first_s, last_s = self.spans.get(report.host, (report.started_s, report.finished_s))
            first_s, last_s = min(first_s, report.started_s), max(last_s, report.finished_s)
            self.spans[report.host] = first_s, last_s

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def rate(self) -> float:
        """Images per second from the start of the first shard to the last report; 0 before that."""
        elapsed_s = max((last_s - first_s for first_s, last_s in self.spans.values()), default=0.0)
        return self.worked_rows / elapsed_s if elapsed_s else 0.0

    def progress(self) -> Progress:
        rate, left = self.rate, self.listed - self.rows
        return Progress(
            done=self.rows - self.failed,
            failed=self.failed,
            listed=self.listed,
            images_per_s=rate,
            eta_s=left / rate if rate else None,
        )


def read_summary(out: AnyPath) -> BatchSummary:
    """Return the summary of a run that has finished. StorageError when it lacks something."""
    path = out / "_SUCCESS"
    record = read_json(path)
    try:
        return parse_record(BatchSummary, record)  # a field with a default may be newer than it
    except ValueError as error:
        raise StorageError(
            f"{path}: {error}; it was edited, or an older version wrote it: `cifake-ray repair`"
            " restores it"
        ) from error
