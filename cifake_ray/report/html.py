"""Reports: one HTML page that needs nothing else, offline and for years.

Floor: report. Keys come from other people's file names, so the page has three fences: Jinja2
escapes everything, control characters are spelled out, and the page's own policy allows no script
and no request.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.report.text import (
    BLOCKS,
    KEY_METRICS,
    describe_result,
    format_interval,
    format_share,
    list_decisions,
)

# What a figure shows, by the names of figures.draw_figures: the caption and the alt text.
CAPTIONS = {
    "roc": "ROC: how many FAKE images are found for each share of REAL images accused.",
    "roc_log": "The same where it matters in bulk: few REAL images accused, on a log axis.",
    "confusion": "Confusion at 0.5: images by label and by what they were called.",
    "confusion_threshold": "Confusion at the threshold of the bundle.",
    "scores": "How p_fake spreads in each class, on log axes.",
    "reliability": (
        "Reliability before the bundle's temperature and after: on the dotted line, p_fake can be"
        " read as a probability."
    ),
    "loss": "Loss over the epochs of training.",
    "accuracy": "Accuracy on validation over the epochs of training.",
    "slices": "Accuracy at 0.5 per slice with 95% intervals, lowest first.",
}


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An image told wrong, for the contact sheet."""

    key: str
    """Any text; shown escaped, control characters spelled out."""
    label: int
    """REAL or FAKE."""
    p_fake: float
    """In [0, 1]."""
    png: bytes
    """The thumbnail, already encoded; small ones are shown larger, pixel by pixel."""


def render_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    figures: Mapping[str, bytes],
    mistakes: Sequence[Mistake],
    facts: Mapping[str, str],
    errors: Mapping[str, int],
    slices: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page as text, to be written as UTF-8.

    `metrics` and the values of `slices` are of `core.evaluation.metrics.compute_metrics`, `figures`
    (file stem -> PNG) from `figures.draw_figures`; `errors` counts images without a score by error
    class; `facts` (name -> value) are what a reader needs to get the same numbers again.
    """
    groups = []
    for label, called in ((REAL, FAKE), (FAKE, REAL)):
        # The surest mistakes first.
        chosen = [mistake for mistake in mistakes if mistake.label == label]
        chosen.sort(key=lambda mistake: (mistake.p_fake, mistake.key), reverse=label == REAL)
        groups.append((f"{LABEL_NAMES[label]} called {LABEL_NAMES[called]}", chosen))
    return render_page(
        "report.html.j2",
        title=title,
        sentence=describe_result(metrics),
        metrics=metrics,
        key_metrics=KEY_METRICS,
        blocks=BLOCKS,
        label_names=LABEL_NAMES,
        decisions=list_decisions(metrics),
        figures=figures,
        captions=CAPTIONS,
        slices=slices or {},
        errors={name: count for name, count in errors.items() if count},
        groups=groups,
        facts=facts,
        format_interval=format_interval,
        format_share=format_share,
    )


def render_page(template: str, **values: Any) -> str:
    """A page of this folder's templates, `page.html.j2` being what they have in common."""
    environment = Environment(
        loader=FunctionLoader(_read_template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_spell_out,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(encode_png=_encode_png, **values)


def _read_template(name: str) -> str:
    return files("cifake_ray.report").joinpath(name).read_text(encoding="utf-8")


def _spell_out(value: Any) -> Any:
    r"""A string with its control characters, line breaks and lone surrogates as \x1b or \u202e.

    Direction overrides would let a key rewrite the text around it; a lone surrogate, from a file
    name that is not UTF-8, could not be written at all.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value
    )


def _encode_png(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode("ascii")
