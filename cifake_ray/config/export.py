"""Options of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cifake_ray.config.fields import RuntimeDoc, StoreConfig, check

ExportFormat = Literal["auto", "csv", "parquet", "jsonl", "txt", "onnx"]
FORMATS = ("csv", "parquet", "jsonl", "txt", "onnx")
STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(StoreConfig):
    """export: write scores as one file (CSV, Parquet, JSON), or a detector as ONNX."""

    src: Annotated[
        str,
        RuntimeDoc(
            "Output of score or evaluate; for .onnx a bundle, or its RUN",
            positional=True,
        ),
    ]
    file: Annotated[
        str,
        RuntimeDoc(
            "File to write: .csv, .parquet, .jsonl or .txt (keys only), .onnx for a detector; - is"
            " standard output",
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
    allow_pickle: Annotated[
        bool, RuntimeDoc("Accept a bundle's weights in .bin .pt .pth .ckpt .pkl: tensors only")
    ] = False

    @property
    def chosen_format(self) -> str:
        """Return the format to write, of FORMATS.

        UsageError when FILE does not say it, or for options that the format does not have.
        """
        chosen: str = self.format
        if chosen == "auto":
            chosen = "csv" if self.file == STDOUT else self.file.rpartition(".")[2].lower()
        check(
            chosen in FORMATS,
            f"{self.file}: its extension is none of .csv, .parquet, .jsonl, .txt and .onnx; give"
            " one of them, or --format",
        )
        check(
            chosen != "onnx" or not (self.columns or self.where or self.file == STDOUT),
            "--columns, --where and - are for scores; a detector is written to an .onnx file",
        )
        return chosen

    @property
    def column_names(self) -> list[str]:
        """Return the columns to write; none for all of them."""
        return [name.strip() for names in self.columns for name in names.split(",")]
