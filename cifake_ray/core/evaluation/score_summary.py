"""Summarise scores shard by shard: counts, histograms, and a few rows to look at.

Memory does not grow with the rows: counts, a histogram for each of MAX_SOURCES sources, and the
best rows of each selection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.evaluation.metrics import NUM_HISTOGRAM_BINS
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL

BAND_EDGES = np.array([0, 0.01, 0.1, 0.5, 0.9, 0.99, 1])  # of p_fake; sheets show a sample of each
MAX_SOURCES = 1000  # counted apart; the others are counted together
MAX_STRATA = 100  # sources that have a share of the uncertain ones of their own
MAX_UNCERTAIN = 200  # of a source, and in all
MAX_ERROR_KEYS = 5
UNSURE_FIRST = 1e6  # a margin, in log-odds, that no p_fake has
COUNTED = ("images", "scored", "called_fake", "labelled", "wrong")  # of a source
ROW_COLUMNS = [  # that a page shows of a row
    *("key", "p_fake", "is_fake", "label", "source", "width", "height", "format"),
]

Row = dict[str, Any]


def find_margin(p_fake: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    """Return float64[N], the distance of p_fake to the threshold in log-odds, 0 or more.

    Both are in [0, 1]; NaN where one is NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        score, limit = (
            np.log(p) - np.log1p(-p)
            for p in (p_fake.astype(np.float64), np.asarray(threshold, np.float64))
        )
        margin: np.ndarray = np.abs(score - limit)
    return margin


def _read_verdicts(decided: pa.Table) -> pa.ChunkedArray:
    """Return FAKE as true, REAL as false, and unsure as null."""
    verdict = decided.column("verdict")
    is_fake, is_real = pc.equal(verdict, LABEL_NAMES[FAKE]), pc.equal(verdict, LABEL_NAMES[REAL])
    return pc.if_else(pc.or_(is_fake, is_real), is_fake, pa.scalar(None, pa.bool_()))


class BestRows:
    """The rows of lowest priority, `size` of each stratum, in the order of their priority."""

    def __init__(self, size: int, num_strata: int) -> None:
        self.size = size
        self.rows: list[list[tuple[float, int, int, Row]]] = [[] for _ in range(num_strata)]
        self.limit = np.full(num_strata, np.inf)  # what is not below it comes too late

    def add(self, shard: int, rows: pa.Table, strata: np.ndarray, priority: np.ndarray) -> None:
        """Add rows of a shard, with the stratum int[N] and the priority float[N] of each."""
        candidates = np.flatnonzero(priority < self.limit[strata])
        order = np.lexsort((priority[candidates], strata[candidates]))
        candidates = candidates[order]
        found = strata[candidates]
        rank = np.arange(len(found)) - np.searchsorted(found, found)
        candidates = candidates[rank < self.size]
        chosen = rows.take(pa.array(candidates)).to_pylist()
        touched = set()
        for index, row in zip(candidates.tolist(), chosen, strict=True):
            stratum = int(strata[index])
            position = row.pop("position")
            self.rows[stratum].append((float(priority[index]), shard, position, row))
            touched.add(stratum)
        for stratum in touched:
            best = self.rows[stratum]
            best.sort(key=lambda item: item[:3])
            del best[self.size :]
            if len(best) == self.size:
                self.limit[stratum] = best[-1][0]

    def list_rows(self, stratum: int) -> list[ShownRow]:
        return [ShownRow(shard, position, row) for _, shard, position, row in self.rows[stratum]]

    def interleave(self) -> list[ShownRow]:
        """Return at most `size` rows: the best of each stratum, then the second, and so on."""
        ranked = [(rank, *item) for rows in self.rows for rank, item in enumerate(rows)]
        ranked.sort(key=lambda item: item[:4])
        return [ShownRow(shard, place, row) for *_, shard, place, row in ranked[: self.size]]


@dataclass(frozen=True)
class ShownRow:
    """A row to look at, and where it is: the position in its shard."""

    shard: int
    position: int
    row: Row


@dataclass
class ScoreSummary:
    """What is known of a run's scores; `add` takes its shards in order."""

    per_group: int  # rows to look at in each selection
    # Of scored rows, which are unlike the training images: by reason, and `any`.
    find_unlike: Callable[[pa.Table], dict[str, pa.ChunkedArray]] | None = None

    images: int = 0
    scored: int = 0
    called_fake: int = 0
    unsure: int = 0  # scored, without a verdict
    unlike: Counter[str] = field(default_factory=Counter)  # images by reason
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((2, 2), np.int64))
    errors: Counter[str] = field(default_factory=Counter)
    error_keys: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str | None, int] = field(default_factory=dict)  # its row in what is below
    thresholds: tuple[float, float] = (np.inf, -np.inf)  # the lowest and the highest
    verdicts: Counter[str] = field(default_factory=Counter)  # of decisions
    deciders: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.source_counts = np.zeros((MAX_SOURCES + 1, len(COUNTED)), np.int64)
        self.histograms = np.zeros((MAX_SOURCES + 1, NUM_HISTOGRAM_BINS), np.int64)
        self.band_counts = np.zeros(len(BAND_EDGES) - 1, np.int64)
        self.bands = BestRows(self.per_group, len(self.band_counts))
        self.uncertain = BestRows(min(self.per_group, MAX_UNCERTAIN), MAX_STRATA + 1)
        self.mistakes = BestRows(self.per_group, 2)  # by label, the most confident first
        self.unlike_rows = BestRows(self.per_group, 1)

    def add(
        self, shard: int, rows: pa.Table, threshold: float, decided: pa.Table | None = None
    ) -> None:
        """Add the rows of a shard, SCORE_FIELDS.

        Decisions on them, verdict, decided_by and threshold, take the place of `is_fake` and of
        `threshold`.
        """
        self._count_errors(rows)
        thresholds = np.full(rows.num_rows, threshold)
        is_settled = np.zeros(rows.num_rows, bool)
        if decided is not None:
            thresholds = decided.column("threshold").to_numpy()
            is_settled = self._count_decisions(decided)
            rows = rows.set_column(
                rows.schema.get_field_index("is_fake"), "is_fake", _read_verdicts(decided)
            )
        rows = rows.append_column("position", pa.array(np.arange(rows.num_rows)))
        is_scored = pc.is_valid(rows.column("p_fake"))
        codes = self._find_sources(rows.column("source"))
        self.images += rows.num_rows
        scored = rows.filter(is_scored)
        mask = is_scored.to_numpy()
        self._count_sources(codes, codes[mask], scored)
        shown = scored.select([*ROW_COLUMNS, "position"])
        p_fake = scored.column("p_fake").to_numpy()
        random = np.random.default_rng(shard).random(len(p_fake))
        band = np.clip(
            np.searchsorted(BAND_EDGES, p_fake, "right") - 1, 0, len(self.band_counts) - 1
        )
        self.band_counts += np.bincount(band, minlength=len(self.band_counts))
        self.bands.add(shard, shown, band, random)
        self.thresholds = (
            np.fmin(self.thresholds[0], np.fmin.reduce(thresholds, initial=np.inf)),
            np.fmax(self.thresholds[1], np.fmax.reduce(thresholds, initial=-np.inf)),
        )
        margin = find_margin(p_fake, thresholds[mask])
        margin[pc.is_null(scored.column("is_fake")).to_numpy()] -= UNSURE_FIRST
        margin[is_settled[mask]] = np.inf  # a person has looked at it
        self.uncertain.add(shard, shown, np.minimum(codes[mask], MAX_STRATA), margin)
        if self.find_unlike is not None:
            unlike = {
                name: mask.fill_null(False).to_numpy()
                for name, mask in self.find_unlike(scored).items()
            }
            self.unlike.update({name: int(mask.sum()) for name, mask in unlike.items()})
            one = np.zeros(len(p_fake), np.int64)
            self.unlike_rows.add(shard, shown, one, np.where(unlike["any"], random, np.inf))
        self._count_verdicts(shard, scored, shown, p_fake, codes[mask])

    def _count_errors(self, rows: pa.Table) -> None:
        failed = rows.filter(pc.is_valid(rows.column("error")))
        for error, key in zip(
            *(failed.column(n).to_pylist() for n in ("error", "key")), strict=True
        ):
            self.errors[error] += 1
            keys = self.error_keys.setdefault(error, [])
            if len(keys) < MAX_ERROR_KEYS:
                keys.append(key)

    def _count_decisions(self, decided: pa.Table) -> np.ndarray:
        """Count verdicts and who decided; return which rows a person has settled."""
        for name, counts in (("verdict", self.verdicts), ("decided_by", self.deciders)):
            for item in decided.column(name).value_counts().to_pylist():
                counts[str(item["values"])] += item["counts"]
        by_person = pc.invert(pc.starts_with(decided.column("decided_by"), "policy-"))
        is_settled: np.ndarray = by_person.fill_null(False).to_numpy()
        return is_settled

    def _find_sources(self, column: pa.ChunkedArray) -> np.ndarray:
        """Return int[N], the number of each row's source; MAX_SOURCES for those beyond."""
        encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
        numbers = []
        for source in encoded.dictionary.to_pylist():
            if source not in self.sources and len(self.sources) < MAX_SOURCES:
                self.sources[source] = len(self.sources)
            numbers.append(self.sources.get(source, MAX_SOURCES))
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        found: np.ndarray = np.array(numbers, np.int64)[codes]
        return found

    def _count_sources(self, codes: np.ndarray, scored_codes: np.ndarray, scored: pa.Table) -> None:
        p_fake = scored.column("p_fake").to_numpy()
        bins = np.nan_to_num(p_fake * NUM_HISTOGRAM_BINS).clip(0, NUM_HISTOGRAM_BINS - 1)
        np.add.at(self.histograms, (scored_codes, bins.astype(np.int64)), 1)
        self._count("images", codes)
        self._count("scored", scored_codes)

    def _count(self, name: str, codes: np.ndarray) -> None:
        self.source_counts[:, COUNTED.index(name)] += np.bincount(codes, minlength=MAX_SOURCES + 1)

    def _count_verdicts(
        self, shard: int, scored: pa.Table, shown: pa.Table, p_fake: np.ndarray, codes: np.ndarray
    ) -> None:
        has_verdict = pc.is_valid(scored.column("is_fake")).to_numpy()
        is_fake = scored.column("is_fake").fill_null(False).to_numpy()
        label = scored.column("label").fill_null(-1).to_numpy()
        self.scored += len(p_fake)
        self.called_fake += int(is_fake.sum())
        self.unsure += int((~has_verdict).sum())
        is_labelled = has_verdict & np.isin(label, (REAL, FAKE))
        is_wrong = is_labelled & (label != is_fake)
        np.add.at(self.confusion, (label[is_labelled], is_fake[is_labelled].astype(np.int64)), 1)
        confidence = np.where(label == REAL, -p_fake, p_fake)  # the worst first
        self.mistakes.add(
            shard, shown, np.clip(label, REAL, FAKE), np.where(is_wrong, confidence, np.inf)
        )
        for name, mask in (
            ("called_fake", is_fake),
            ("labelled", is_labelled),
            ("wrong", is_wrong),
        ):
            self._count(name, codes[mask])

    def list_sources(self) -> list[tuple[str | None, dict[str, int], np.ndarray]]:
        """Return name, COUNTED and histogram of each source, the largest first.

        None is no source; `...` are all beyond MAX_SOURCES together.
        """
        names = [*self.sources, *["..."] * bool(self.source_counts[MAX_SOURCES].any())]
        numbers = [*self.sources.values(), MAX_SOURCES]
        found = [
            (
                name,
                dict(zip(COUNTED, self.source_counts[n].tolist(), strict=True)),
                self.histograms[n],
            )
            for name, n in zip(names, numbers, strict=False)
        ]
        return sorted(found, key=lambda item: -item[1]["images"])
