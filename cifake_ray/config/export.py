"""Options of `export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cifake_ray.config.fields import RuntimeDoc, WorkersConfig, check, check_least

ExportFormat = Literal[
    "auto",
    "csv",
    "parquet",
    "jsonl",
    "txt",
    "label-studio",
    "fiftyone",
    "imagefolder",
    "parquet-images",
    "onnx",
]
FORMATS = ("csv", "parquet", "jsonl", "txt", "onnx")  # that an extension names
FOLDER_FORMATS = ("csv", "parquet", "jsonl", "txt")  # that many files may hold
STDOUT = "-"
DIRECTIONS = {"asc": "ascending", "desc": "descending"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(WorkersConfig):
    """export: write scores as one file or many (CSV, Parquet, JSON), or a detector as ONNX."""

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
            "File to write: .csv, .parquet, .jsonl or .txt (keys only), .onnx for a detector; a"
            " folder for fiftyone; with / at the end a folder of files, such as scores.parquet/; -"
            " is standard output",
            positional=True,
        ),
    ]
    format: Annotated[
        ExportFormat,
        RuntimeDoc(
            "Format (auto: by the extension of FILE; csv for -). label-studio: tasks with"
            " predictions, .json or .jsonl; imagefolder: metadata.jsonl of Hugging Face, beside the"
            " images; parquet-images: with the images"
        ),
    ] = "auto"
    columns: Annotated[
        tuple[str, ...], RuntimeDoc("Only these columns, in this order, such as 'key,p_fake'")
    ] = ()
    where: Annotated[
        tuple[str, ...],
        RuntimeDoc("Only rows like this, such as 'p_fake >= 0.9', 'error = null'; repeatable"),
    ] = ()
    sort: Annotated[
        tuple[str, ...],
        RuntimeDoc(
            "Sort by this column, such as 'p_fake desc'; 'margin' is the distance of p_fake to the"
            " threshold in log-odds; repeatable"
        ),
    ] = ()
    top: Annotated[int | None, RuntimeDoc("Only the first N rows, after --sort")] = None
    by: Annotated[
        str | None,
        RuntimeDoc("--top N rows of each value of this column, such as source (default: of all)"),
    ] = None
    rows_per_file: Annotated[
        int, RuntimeDoc("In a folder of files: about so many rows a file, but whole shards")
    ] = 262_144
    image_prefix: Annotated[
        str | None,
        RuntimeDoc(
            "For label-studio: what stands before the path of an image below SRC, such as"
            " https://HOST/photos/ (default: s3://..., or /data/local-files/?d=...)"
        ),
    ] = None
    allow_prefix: Annotated[
        tuple[str, ...],
        RuntimeDoc("For parquet-images: as for `score`, where a list's images are; repeatable"),
    ] = ()
    overwrite: Annotated[bool, RuntimeDoc("Replace FILE if it exists")] = False
    allow_pickle: Annotated[
        bool, RuntimeDoc("Accept a bundle's weights in .bin .pt .pth .ckpt .pkl: tensors only")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "top", "rows_per_file")
        check(self.by is None or self.top is not None, "--by needs --top N: so many rows of each")
        check(
            self.image_prefix is None or self.format == "label-studio",
            "--image-prefix is for --format label-studio",
        )

    @property
    def chosen_format(self) -> str:
        """Return the format to write, of FORMATS.

        UsageError when FILE does not say it, or for options that the format does not have.
        """
        chosen: str = self.format
        if chosen == "auto":
            name = self.file.rstrip("/")
            chosen = "csv" if self.file == STDOUT else name.rpartition(".")[2].lower()
            check(
                chosen in FORMATS,
                f"{self.file}: its extension is none of .csv, .parquet, .jsonl, .txt and .onnx;"
                " give one of them, or --format",
            )
        is_choice = self.columns or self.where or self.sort or self.top
        check(
            chosen != "onnx" or not (is_choice or self.file == STDOUT),
            "--columns, --where, --sort, --top and - are for scores; a detector is written to an"
            " .onnx file",
        )
        check(
            chosen != "txt" or not self.columns,
            "--columns: a .txt file holds keys only; choose another format",
        )
        check(
            chosen not in ("fiftyone", "parquet-images") or self.file != STDOUT,
            f"--format {chosen} writes files; give a path instead of -",
        )
        return chosen

    @property
    def makes_folder(self) -> bool:
        """Return whether FILE becomes a folder of files. UsageError for options of one file."""
        chosen = self.chosen_format
        if not self.file.endswith("/") or chosen == "fiftyone":
            return False
        check(
            chosen in FOLDER_FORMATS,
            f"{self.file}: {chosen} is one file; give FILE without the / at its end",
        )
        check(
            not self.sort and self.top is None,
            f"{self.file}: --sort and --top compare all rows, which one process does; give FILE"
            " without the / at its end",
        )
        return True

    @property
    def column_names(self) -> list[str]:
        """Return the columns to write; none for all of them."""
        return [name.strip() for names in self.columns for name in names.split(",")]

    @property
    def sort_keys(self) -> list[tuple[str, str]]:
        """Return the columns to sort by and `ascending` or `descending`, the first first."""
        keys = []
        for text in (part.strip() for item in self.sort for part in item.split(",")):
            name, _, direction = text.rpartition(" ")
            if direction.lower() not in DIRECTIONS:
                name, direction = text, "asc"
            check(name.strip() != "", "--sort: give a column, such as 'p_fake desc'")
            keys.append((name.strip(), DIRECTIONS[direction.lower()]))
        return keys
