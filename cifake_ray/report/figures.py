"""Draw the figures of a report: metrics in, SVG files out.

Matplotlib is imported on first use, since most commands draw nothing, and used through its object
API: pyplot keeps figures in a global list and is not thread-safe. Colours are Okabe and Ito's, safe
for colour-blind readers; REAL and FAKE also differ in line style or position. The same numbers give
the same bytes.

A figure opens alone in a browser, in Inkscape and in LaTeX. `svg.inline_svg` puts it into a page,
whose colours follow the reader's (`svg.PAGE_COLOURS`). So draw in the colours named here, also
paler by `alpha`, and no images (`imshow`). Texts of one line keep their place in any font.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cifake_ray.report.numbers import format_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Mapping[str, Any]

COLOURS = {"REAL": "#0072B2", "FAKE": "#D55E00"}
BEFORE = "#009E73"  # green: before calibration
INK, MUTED, GRID = "#1a1a1a", "#5a5a5a", "#d9d9d9"
WIDTH = 5.0  # inches, 360 units of SVG: a letter of 10 is 10 pixels high on a telephone


def draw_figures(
    metrics: Metrics,
    *,
    history: Sequence[Mapping[str, Any]] = (),
) -> dict[str, bytes]:
    """Draw every figure the numbers allow: file stem -> SVG, in the order of the report.

    `metrics` are from `core.evaluation.metrics.compute_metrics`. The ROC needs both classes;
    learning curves need at least one epoch.
    """
    figures = {}
    if metrics["roc_points"]:
        figures["roc"] = draw_roc(metrics)
        figures["roc_log"] = draw_roc(metrics, log_fpr=True)
    figures["scores"] = draw_score_histogram(metrics)
    figures["reliability"] = draw_reliability(metrics)
    if history:
        figures["loss"] = draw_loss(history)
        figures["accuracy"] = draw_accuracy(history)
    return figures


def draw_roc(metrics: Metrics, *, log_fpr: bool = False) -> bytes:
    """Draw the ROC on linear axes, or over log FPR with the 1% and 0.1% operating points."""
    figure, (axes,) = new_figure()
    fpr, tpr = metrics["roc_points"]["fpr"], metrics["roc_points"]["tpr"]
    # Steps, not slopes: the measured curve is constant between thresholds.
    axes.plot(fpr, tpr, color=INK, linewidth=1.8, drawstyle="steps-post")
    axes.set_xlabel("False positive rate (REAL called FAKE)")
    axes.set_ylabel("True positive rate (FAKE found)")
    axes.set_ylim(0, 1.02)
    if not log_fpr:
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1, label="chance")
        axes.set_xlim(-0.01, 1.01)
        axes.legend(loc="lower right")
        axes.set_title(f"ROC: AUROC {format_interval(metrics['auroc'])}")
        return encode_figure(figure)
    axes.set_xscale("log")
    axes.set_xlim(min(1e-3, 1 / metrics["num_real"]) / 2, 1)
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:.6%}".rstrip("0%").rstrip(".") + "%")
    reached = {name: metrics[f"tpr_at_fpr_{name}pct"]["value"] for name in ("1", "0.1")}
    for (name, value), marker in zip(reached.items(), "os", strict=True):
        if value is None:  # it would rest on too few images
            continue
        rate = float(name) / 100
        label = f"at {name}% FPR: {value:.1%} of FAKE found"
        axes.axvline(rate, color=MUTED, linestyle="--", linewidth=1)
        axes.plot(rate, value, marker, color=COLOURS["FAKE"], markersize=8, label=label)
    axes.set_title("ROC over log FPR")
    if reached["1"] is not None:
        axes.legend(loc="lower right" if reached["1"] > 0.3 else "upper left")
        found = format_interval(metrics["tpr_at_fpr_1pct"], percent=True)
        axes.set_title(f"ROC over log FPR: TPR {found} at 1% FPR")
    return encode_figure(figure)


def draw_reliability(metrics: Metrics) -> bytes:
    """Draw the share of FAKE against mean p_fake per bin, before and after the temperature.

    Below, the images per bin: an outline before, bars after.
    """
    figure, (upper, lower) = new_figure(height=4.2, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1.2)
    for suffix, when, style, colour in (
        ("_uncalibrated", "before: temperature 1", "s--", BEFORE),
        ("", f"after: temperature {metrics['temperature']:.4g}", "o-", INK),
    ):
        bins = [b for b in metrics[f"reliability_bins{suffix}"] if b["count"]]
        upper.plot(
            [b["p_fake"] for b in bins],
            [b["fake_fraction"] for b in bins],
            style,
            color=colour,
            linewidth=1.5,
            markersize=5,
            label=f"{when}\nECE {format_interval(metrics[f'ece{suffix}'])}",
        )
    upper.set_ylabel("Share that is FAKE")
    upper.set_ylim(-0.03, 1.03)
    upper.legend(loc="best", fontsize=9)
    before, after = metrics["ece_uncalibrated"]["value"], metrics["ece"]["value"]
    upper.set_title(f"ECE {before:.3f} before calibration, {after:.3f} after")
    edges = [b["low"] for b in metrics["reliability_bins"]]
    counts = [b["count"] for b in metrics["reliability_bins"]]
    bars = lower.bar(edges, counts, width=0.9 / len(counts), align="edge", color=MUTED)
    before_counts = [b["count"] for b in metrics["reliability_bins_uncalibrated"]]
    lower.stairs(before_counts, [*edges, 1], color=BEFORE, linewidth=1.2, linestyle="--")
    texts = [_format_count(n) if n else "" for n in counts]
    lower.bar_label(bars, texts, fontsize=7, padding=1)
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylim(0, max(*counts, *before_counts) * 8)
    lower.set_ylabel("Images (log)")
    lower.set_xlabel("p_fake")
    for axes in (upper, lower):
        axes.set_xlim(-0.01, 1.01)
    return encode_figure(figure)


def draw_score_histogram(metrics: Metrics) -> bytes:
    """Draw p_fake per class, REAL upwards and FAKE downwards, with the threshold."""
    figure, (upper, lower) = new_figure(height=3.8, height_ratios=(1, 1))
    histogram = metrics["score_histogram"]
    highest = max(*histogram["REAL"], *histogram["FAKE"], 1)
    for axes, name in ((upper, "REAL"), (lower, "FAKE")):
        axes.stairs(histogram[name], histogram["edges"], fill=True, color=COLOURS[name])
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, highest * 2)
        axes.set_xlim(0, 1)
        axes.set_ylabel(f"{name} images (log)")
        axes.axvline(metrics["threshold"], color=INK, linestyle="--", linewidth=1.4)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel(f"p_fake (dashed: threshold {metrics['threshold']:.4g})")
    lower.invert_yaxis()
    wrong = metrics["at_threshold"]["confusion"]
    upper.set_title(f"{wrong[0][1]:,} REAL above the threshold, {wrong[1][0]:,} FAKE below")
    return encode_figure(figure)


def draw_loss(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw training and validation loss over epochs.

    Rows have `epoch` and any of `train_loss`, `val_loss`; other keys are ignored.
    """
    figure, (axes,) = new_figure()
    _plot_epochs(axes, history, "train_loss", "o--", color=COLOURS["REAL"], label="training")
    points = _plot_epochs(axes, history, "val_loss", "s-", color=INK, label="validation")
    axes.set_ylabel("Loss")
    axes.legend(loc="best")
    axes.set_title("Loss")
    if points:
        best, epoch = min((value, epoch) for epoch, value in points)
        axes.set_title(f"Loss: lowest on validation {best:.4f}, epoch {epoch:g}")
    return encode_figure(figure)


def draw_accuracy(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw validation accuracy over epochs, from `epoch` and `val_accuracy` of each row."""
    figure, (axes,) = new_figure()
    points = _plot_epochs(axes, history, "val_accuracy", "s-", color=INK, label="validation")
    axes.set_ylabel("Accuracy on validation")
    axes.set_title("Accuracy on validation")
    axes.yaxis.set_major_formatter("{x:.1%}")
    if points:
        best, epoch = max((value, -epoch) for epoch, value in points)
        axes.set_title(f"Accuracy on validation: best {best:.2%}, epoch {-epoch:g}")
        axes.axhline(best, color=MUTED, linestyle=":", linewidth=1.2)
    return encode_figure(figure)


def new_figure(
    height: float = 3.4, height_ratios: Sequence[float] = (1,)
) -> tuple[Figure, list[Axes]]:
    """Return a figure WIDTH wide, with one column and a row for each height ratio."""
    from matplotlib import rc_context, rcdefaults
    from matplotlib.figure import Figure

    with rc_context():
        rcdefaults()  # the user's matplotlibrc must not change the bytes
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
        grid = figure.subplots(len(height_ratios), squeeze=False, height_ratios=height_ratios)
    all_axes: list[Axes] = list(grid.flat)
    for axes in all_axes:
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set(fontsize=11)
    return figure, all_axes


def encode_figure(figure: Figure) -> bytes:
    """Return a figure as an SVG file whose text is text."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def label_epochs(axes: Axes) -> None:
    """Label the x-axis with whole epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _plot_epochs(
    axes: Axes, history: Sequence[Mapping[str, Any]], name: str, style: str, **look: Any
) -> list[tuple[float, float]]:
    points = [(row["epoch"], row[name]) for row in history if _is_number(row.get(name))]
    epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
    axes.plot(epochs, values, style, linewidth=1.6, markersize=5, **look)
    label_epochs(axes)
    return points


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _format_count(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"


def shorten(name: str) -> str:
    """Shorten a name to 32 characters that the font has, to avoid boxes and warnings."""
    # The font ends after Cyrillic.
    printable = "".join(c if c.isprintable() and c < "\u0530" else "?" for c in name)
    return printable if len(printable) <= 32 else printable[:15] + "…" + printable[-16:]
