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

from cifake_ray.core.schema import LABEL_NAMES
from cifake_ray.report.evaluation import (
    describe_verdict,
    list_headlines,
    list_measures,
    list_operating_points,
    split_slices,
)
from cifake_ray.report.grid import GRID_CAPTIONS, describe_grid, list_grid_rows
from cifake_ray.report.numbers import format_interval, format_share
from cifake_ray.report.slices_text import describe_floor, describe_worst, find_worst_source
from cifake_ray.report.svg import inline_svg

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
}
SMALL_SIDE = 64  # pixels: smaller images are enlarged without smoothing


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image to look at, and what is known of it."""

    key: str  # any text; shown escaped, control characters spelled out
    p_fake: float  # in [0, 1]
    image: bytes  # PNG or WebP, perhaps smaller than the original
    width: int  # of the original, as the height
    height: int
    format: str | None = None
    jpeg_quality: int | None = None
    label: int | None = None  # REAL or FAKE
    source: str | None = None
    gradient_map: bytes | None = None  # PNG

    @property
    def verdict(self) -> str:
        """What it is, if known, and what it is called at 0.5."""
        called = f"called {LABEL_NAMES[self.p_fake >= 0.5]}"
        return called if self.label is None else f"{LABEL_NAMES[self.label]}, {called}"

    @property
    def description(self) -> str:
        quality = f" {self.jpeg_quality}" if self.jpeg_quality else ""
        size = f"{self.width:,} x {self.height:,}"
        return f"{size} {self.format or ''}{quality}".strip()

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) <= SMALL_SIDE


def render_report(
    *,
    title: str,
    context: Mapping[str, str],
    warnings: Sequence[str],
    metrics: Mapping[str, Any],
    figures: Mapping[str, bytes],
    examples: Mapping[str, Sequence[Example]],
    facts: Mapping[str, str],
    errors: Mapping[str, int],
    grid_figures: Mapping[str, bytes] | None = None,
) -> str:
    """Return the page as text, to be written as UTF-8.

    `context` (name -> value) says which detector measured what, `warnings` why its numbers may not
    be believed. `metrics` are those of `metrics.json`; `figures` (file stem -> SVG) are from
    `figures.draw_figures`, those of a grid from `grid.draw_grid_figures`. `examples` are by
    heading, `errors` counts images without a score by error class, and `facts` are needed to
    reproduce the numbers.
    """
    return render_page(
        "report.html.j2",
        title=title,
        sentence=describe_verdict(metrics),
        context=context,
        warnings=warnings,
        remarks=[
            describe_worst(find_worst_source(metrics["slices"])),
            describe_floor(metrics["real_vs_real"]),
        ],
        metrics=metrics,
        headlines=list_headlines(metrics),
        measures=list_measures(metrics),
        points=list_operating_points(metrics),
        figures=figures,
        captions=CAPTIONS | GRID_CAPTIONS,
        slices=split_slices(metrics["slices"]),
        floor=metrics["real_vs_real"],
        grid=metrics.get("grid"),
        grid_figures=grid_figures or {},
        describe_grid=describe_grid,
        list_grid_rows=list_grid_rows,
        errors={name: count for name, count in errors.items() if count},
        examples=examples,
        has_maps=any(e.gradient_map for chosen in examples.values() for e in chosen),
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
        "encode_image": _encode_image,
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


def _encode_image(image: bytes) -> Markup:
    kind = "png" if image.startswith(b"\x89PNG") else "webp"
    return Markup(f"data:image/{kind};base64,") + base64.b64encode(image).decode("ascii")
