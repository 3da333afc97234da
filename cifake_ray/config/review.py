"""Options of `review`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cifake_ray.config.fields import RuntimeDoc, StoreConfig, check, check_least

MAX_IMAGES = 5_000  # on a page; it stays below 10 MB


@dataclass(frozen=True, kw_only=True)
class ReviewConfig(StoreConfig):
    """review: show scores on one page: shares, histograms, and images to look at."""

    src: Annotated[str, RuntimeDoc("Output of score", positional=True)]
    file: Annotated[str, RuntimeDoc("Page to write", positional=True)] = "review.html"
    decisions: Annotated[
        str | None, RuntimeDoc("Output of decide for these scores: show its verdicts")
    ] = None
    images: Annotated[
        int,
        RuntimeDoc("Images on the page, at most; more are smaller, so that it stays below 10 MB"),
    ] = 240
    allow_prefix: Annotated[
        tuple[str, ...],
        RuntimeDoc("Folder or URI that a list may refer to, as it was for score; repeatable"),
    ] = ()
    allow_pickle: Annotated[
        bool, RuntimeDoc("Accept a bundle's weights in .bin .pt .pth .ckpt .pkl: tensors only")
    ] = False
    overwrite: Annotated[bool, RuntimeDoc("Replace the page if it exists")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "images")
        check(self.file != "-", "FILE is -; give the page a name, such as review.html")
        check(
            self.images <= MAX_IMAGES,
            f"--images is {self.images:,}; a page holds {MAX_IMAGES:,}. For more use `export"
            " --format fiftyone` or `label-studio`",
        )
