"""Options of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cifake_ray.config.fields import RuntimeDoc, StoreConfig, check

ExportFormat = Literal["auto", "csv", "parquet", "jsonl", "txt"]
FORMATS = ("csv", "parquet", "jsonl", "txt")
STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StoreConfig):
    """export: write scores as one file: CSV that a spreadsheet opens safely, Parquet, JSON."""

    scores: Annotated[str, RuntimeDoc("Output of score or evaluate", positional=True)]
    file: Annotated[
        str,
        RuntimeDoc(
            "File to write: .csv, .parquet, .jsonl or .txt (keys only); - is standard output",
            positional=True,
        ),
    ]
    format: Annotated[
        ExportFormat, RuntimeDoc("Format (auto: by the extension of FILE; csv for -)")
    ] = "auto"
    columns: Annotated[
        tuple[str, ...], RuntimeDoc("Only these columns, in this order, such as 'key,p_fake'")
    ] = ()
    where: Annotated[
        tuple[str, ...],
        RuntimeDoc("Only rows like this, such as 'p_fake >= 0.9', 'error = null'; repeatable"),
    ] = ()
    overwrite: Annotated[bool, RuntimeDoc("Replace FILE if it exists")] = False

    @property
    def chosen_format(self) -> str:
        """Return the format to write, of FORMATS. UsageError when FILE does not say it."""
        extension = self.file.rpartition(".")[2].lower()
        if self.format != "auto":
            return self.format
        check(
            self.file == STDOUT or extension in FORMATS,
            f"{self.file}: its extension is none of .csv, .parquet, .jsonl and .txt; give one of"
            " them, or --format",
        )
        return "csv" if self.file == STDOUT else extension

    @property
    def column_names(self) -> list[str]:
        """Return the columns to write; none for all of them."""
        return [name.strip() for names in self.columns for name in names.split(",")]
