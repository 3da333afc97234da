"""Options of `compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cifake_ray.config.fields import RuntimeDoc, StoreConfig, check, check_least

CompareFormat = Literal["auto", "html", "csv", "json", "tex", "svg"]
FORMATS = ("html", "csv", "json", "tex", "svg")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(StoreConfig):
    """compare: compare detectors on the images that their reports share."""

    reports: Annotated[
        tuple[str, ...],
        RuntimeDoc(
            "Outputs of evaluate, or of score for labelled images; NAME=REPORT names one, and those"
            " of one name are seeds of one variant; of a bundle or RUN only its cost is known",
            positional=True,
        ),
    ]
    baseline: Annotated[
        str | None, RuntimeDoc("Name that the others are compared with (default: the first)")
    ] = None
    out: Annotated[
        str | None,
        RuntimeDoc("File to write: .html, .csv, .json, .tex (a table) or .svg (the figure)"),
    ] = None
    format: Annotated[CompareFormat, RuntimeDoc("Format of --out (auto: by its extension)")] = (
        "auto"
    )
    overwrite: Annotated[bool, RuntimeDoc("Replace the file if it exists")] = False
    price_per_hour: Annotated[
        float | None,
        RuntimeDoc("Price of an hour of the reports' machine; adds that of 1,000,000 images"),
    ] = None
    num_bootstrap: Annotated[int, RuntimeDoc("Bootstrap resamples for the 95% intervals")] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "price_per_hour")
        check_least(self, 10, "num_bootstrap")
        check(len(self.reports) > 0, "give the outputs of evaluate to compare")
        if self.out is not None:
            _ = self.chosen_format  # raises

    @property
    def chosen_format(self) -> str:
        """Return the format of `--out`, of FORMATS. UsageError when its name does not say it."""
        chosen: str = self.format
        if chosen == "auto":
            chosen = str(self.out).rpartition(".")[2].lower()
        check(
            chosen in FORMATS,
            f"{self.out}: its extension is none of .html, .csv, .json, .tex and .svg; give one of"
            " them, or --format",
        )
        return chosen

    @property
    def named_reports(self) -> list[tuple[str | None, str]]:
        """Return name and path of each report; None for one without a name.

        A name has no slash, colon or dot, so that `./a=b` and `s3://x/day=1` are paths.
        """
        found: list[tuple[str | None, str]] = []
        for report in self.reports:
            name, equals, path = report.partition("=")
            is_named = equals and name.strip() and path and not set(name) & set("/:.\\")
            found.append((name.strip(), path) if is_named else (None, report))
        return found
