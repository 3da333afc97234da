"""Render a report as one self-contained HTML page.

Keys come from untrusted file names, so Jinja2 escapes everything, control characters are spelled
out, and the page's security policy allows no scripts and no requests.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.report.grid import GRID_CAPTIONS, describe_grid, list_grid_rows
from cifake_ray.report.numbers import format_interval, format_share
from cifake_ray.report.svg import inline_svg
from cifake_ray.report.text import BLOCKS, KEY_METRICS, describe_result, list_decisions

# Captions and alt texts, by the names of figures.draw_figures.
CAPTIONS = {
    "roc": "ROC: share of FAKE images found against share of REAL images called FAKE.",
    "roc_log": "The same at low false positive rates, which matter in bulk, on a log axis.",
    "scores": "Distribution of p_fake in each class, on log axes.",
    "reliability": (
        "Reliability before and after the bundle's temperature: on the dotted line, p_fake equals"
        " the share of FAKE."
    ),
    "loss": "Loss while the detector was trained, on its own images, not those of this report.",
    "accuracy": "Accuracy while the detector was trained, on its own validation images.",
    "slices": "Accuracy at 0.5 per source with 95% intervals, lowest first.",
}


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A misclassified image, for the contact sheet."""

    key: str  # any text; shown escaped, control characters spelled out
    label: int  # REAL or FAKE
    p_fake: float  # in [0, 1]
    png: bytes  # the encoded thumbnail; small ones are enlarged without smoothing


def render_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    figures: Mapping[str, bytes],
    mistakes: Sequence[Mistake],
    facts: Mapping[str, str],
    errors: Mapping[str, int],
    slices: Mapping[str, Mapping[str, Any]] | None = None,
    unlike: str = "",
    grid: Mapping[str, Any] | None = None,
    grid_figures: Mapping[str, bytes] | None = None,
) -> str:
    """Return the page as text, to be written as UTF-8.

    `metrics` and the values of `slices` are from `core.evaluation.metrics.compute_metrics`,
    `figures` (file stem -> SVG) from `figures.draw_figures`; `errors` counts images without a score
    by error class; `facts` (name -> value) are needed to reproduce the numbers; `unlike` says how
    many images are unlike those that the detector was trained on. `grid` is from
    `core.evaluation.grid.measure_grid`, its figures from `grid.draw_grid_figures`.
    """
    groups = []
    for label, called in ((REAL, FAKE), (FAKE, REAL)):
        # The most confident mistakes first.
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
        captions=CAPTIONS | GRID_CAPTIONS,
        slices=slices or {},
        unlike=unlike,
        grid=grid,
        grid_figures=grid_figures or {},
        describe_grid=describe_grid,
        list_grid_rows=list_grid_rows,
        errors={name: count for name, count in errors.items() if count},
        groups=groups,
        facts=facts,
        format_interval=format_interval,
        format_share=format_share,
    )


def render_page(template: str, **values: Any) -> str:
    """Render one of this folder's templates; they share `page.html.j2`."""
    environment = Environment(
        loader=FunctionLoader(_read_template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_spell_out,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "encode_png": _encode_png,
        "find_headings": _find_headings,
        "inline_svg": lambda svg, title: inline_svg(svg, _spell_out(title)),
    }
    return environment.get_template(template).render(**values)


def _find_headings(content: Markup) -> list[tuple[str, Markup]]:
    """Return anchor and text of each heading `<h2 id="...">`, for the list of contents."""
    found = re.findall(r'<h2 id="([\w-]+)">(.*?)</h2>', content)
    return [(anchor, Markup(heading)) for anchor, heading in found]


def _read_template(name: str) -> str:
    return files("cifake_ray.report").joinpath(name).read_text(encoding="utf-8")


def _spell_out(value: Any) -> Any:
    r"""Replace control characters, line breaks and lone surrogates by \x1b or \u202e.

    Direction overrides would let a key reorder the text around it; a lone surrogate, from a file
    name that is not UTF-8, could not be encoded.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value
    )


def _encode_png(png: bytes) -> Markup:
    return Markup("data:image/png;base64,") + base64.b64encode(png).decode("ascii")
