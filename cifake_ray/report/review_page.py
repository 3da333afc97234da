"""Render the page of `review`: what was scored, with what, and which images to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cifake_ray.core.evaluation.metrics import wilson_interval
from cifake_ray.core.evaluation.score_summary import BAND_EDGES, Row, ScoreSummary, ShownRow
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.report.figures import COLOURS, INK, MUTED, encode_figure, new_figure, shorten
from cifake_ray.report.html import render_page
from cifake_ray.report.numbers import format_interval

MAX_FIGURE_SOURCES = 8
MAX_OPEN_SOURCES = 20  # rows of the table; more unfold
MAX_TABLE_SOURCES = 200

Place = tuple[int, int]  # of a row: its shard, and its position in it


@dataclass(frozen=True)
class Group:
    """Images of one kind, to look at together; those of one section follow each other."""

    section: str
    heading: str  # inside the section; empty if it is alone there
    note: str
    rows: Sequence[ShownRow]


@dataclass(frozen=True)
class Picture:
    """A thumbnail, or the reason why there is none."""

    data: bytes | None  # WebP
    reason: str = ""
    side: int = 0  # pixels, the longer


def choose_groups(summary: ScoreSummary, max_rows: int) -> list[Group]:
    """Return what there is to look at, most worth looking at first, at most so many in all.

    No group gets more while another has rows left, but for what does not go round.
    """
    near = "Nearest to the threshold, of each source in turn."
    groups = [Group("Uncertain", "", near, summary.uncertain.interleave())]
    for label, called in ((REAL, FAKE), (FAKE, REAL)):
        heading = f"{LABEL_NAMES[label]} called {LABEL_NAMES[called]}"
        rows = summary.mistakes.list_rows(label)
        groups.append(Group("Mistakes", heading, "The most confident first.", rows))
    foreign = f"At random of {summary.unlike['any']:,}: by size, format or JPEG quality."
    rows = summary.unlike_rows.list_rows(0)
    groups.append(Group("Unlike the training images", "", foreign, rows))
    for band in reversed(range(len(BAND_EDGES) - 1)):
        heading = f"p_fake {BAND_EDGES[band]:g} to {BAND_EDGES[band + 1]:g}"
        note = f"At random of {summary.band_counts[band]:,}."
        groups.append(Group("By score", heading, note, summary.bands.list_rows(band)))
    most = max(len(group.rows) for group in groups)
    while sum(min(len(group.rows), most) for group in groups) > max_rows:
        most -= 1
    left = max_rows - sum(min(len(group.rows), most) for group in groups)
    chosen = []
    for group in groups:
        size = most + (left > 0 and len(group.rows) > most)
        left -= size > most
        chosen.append(replace(group, rows=group.rows[:size]))
    return [group for group in chosen if group.rows]


def draw_histograms(
    rows: Sequence[tuple[str, np.ndarray]], thresholds: tuple[float, float]
) -> bytes:
    """Draw p_fake of each source, counts on a log axis, as an SVG file.

    Where the lowest and the highest threshold are one, it shows what is called FAKE.
    """
    threshold, highest = thresholds
    is_one = threshold == highest
    figure, all_axes = new_figure(height=1 + 0.85 * len(rows), height_ratios=[1] * len(rows))
    for axes, (name, counts) in zip(all_axes, rows, strict=True):
        edges = np.linspace(0, 1, len(counts) + 1)
        axes.stairs(counts, edges, fill=True, color=COLOURS["REAL"] if is_one else MUTED)
        if is_one:
            fake = np.where(edges[1:] > threshold, counts, 0)
            axes.stairs(fake, edges, fill=True, color=COLOURS["FAKE"])
            axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, max(int(counts.max()), 1) * 2)
        axes.set_yticks([])
        axes.set_xlim(0, 1)
        axes.tick_params(labelbottom=axes is all_axes[-1])
        axes.set_title(f"{shorten(name)}: {counts.sum():,}", loc="left", parse_math=False)
    dashed = f" (dashed: threshold {threshold:.4g})" if is_one else ""
    all_axes[-1].set_xlabel(f"p_fake{dashed}; heights on a log axis")
    return encode_figure(figure)


def render_review(
    *,
    title: str,
    context: Mapping[str, str],
    queue: str,
    facts: Mapping[str, str],
    summary: ScoreSummary,
    groups: Sequence[Group],
    pictures: Mapping[Place, Picture],
    notes: Sequence[str] = (),
    has_decisions: bool = False,
) -> str:
    """Return the page as text.

    `context` says what was scored with what, `queue` is a command that exports the uncertain ones,
    `notes` are warnings, `pictures` are by shard and position.
    """
    sources = [(_name_source(name), counts, bins) for name, counts, bins in summary.list_sources()]
    overall = summary.histograms.sum(axis=0)
    figure_rows = [("all images", overall)]
    if len(sources) > 1:
        figure_rows += [(name, histogram) for name, _, histogram in sources[:MAX_FIGURE_SOURCES]]
    called = _find_share(summary.called_fake, summary.scored)
    right, labelled = int(summary.confusion.trace()), int(summary.confusion.sum())
    return render_page(
        "review.html.j2",
        title=title,
        sentence=(
            f"{format_interval(called, percent=True)} of {summary.scored:,} images are called FAKE."
        ),
        context=context,
        queue=queue,
        facts=facts,
        notes=notes,
        summary=summary,
        called=called,
        accuracy=_find_share(right, labelled),
        labelled=labelled,
        label_names=LABEL_NAMES,
        figures={"p_fake": draw_histograms(figure_rows, summary.thresholds)},
        captions={"p_fake": "Distribution of p_fake, of all images and of the largest sources."},
        sources=[
            (name, counts, _find_share(counts["called_fake"], counts["scored"]))
            for name, counts, _ in sources[:MAX_TABLE_SOURCES]
        ],
        num_sources=len(sources),
        max_open=MAX_OPEN_SOURCES,
        has_decisions=has_decisions,
        sections={
            name: [group for group in groups if group.section == name]
            for name in dict.fromkeys(group.section for group in groups)
        },
        describe_verdict=_describe_verdict,
        pictures=pictures,
        format_interval=format_interval,
    )


def _find_share(count: int, total: int) -> dict[str, float | None]:
    if not total:
        return {"value": None, "low": None, "high": None}
    return wilson_interval(count, total)


def _name_source(name: str | None) -> str:
    return "no source" if name is None else "all other sources" if name == "..." else name


def _describe_verdict(row: Row) -> str:
    """Return what an image is, if known, and what it is called, such as `REAL, called FAKE`."""
    called = "unsure" if row["is_fake"] is None else f"called {LABEL_NAMES[row['is_fake']]}"
    label = dict(enumerate(LABEL_NAMES)).get(row["label"])
    return called if label is None else f"{label}, {called}"
