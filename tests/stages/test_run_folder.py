"""The page of the run folder's format, held against folders that verbs wrote."""

from __future__ import annotations

import re
from pathlib import Path

import cifake_ray

PAGE = Path(cifake_ray.__file__).parent / "ARCHITECTURE.md"
# Gone when a run is complete, or only of some: extended ones, and trainings on files of others.
PASSING = {"_manifest/.listing-ID/", "_attempts/NNNNN.json", "_changes.parquet", "digests.parquet"}


def read_table(heading: str) -> list[str]:
    """Return the names in the first column of the first table after a line, in their order."""
    text = PAGE.read_text(encoding="utf-8").split(heading, 1)[1]
    rows = re.search(r"\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    assert rows is not None
    return re.findall(r"^\| `([^`]+)` \|", rows[1], re.MULTILINE)


def to_pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace("RUNID", "[0-9a-f]{8}").replace("NNNNN", r"\d{5}")
    return re.compile(escaped + (".+" if name.endswith("/") else ""))


def check_folder(folder: Path, names: list[str]) -> None:
    """Every file of the folder is on the page, and every file on the page is in the folder."""
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    patterns = {name: to_pattern(name) for name in names}
    unknown = [f for f in files if not any(p.fullmatch(f) for p in patterns.values())]
    missing = [n for n, p in patterns.items() if not any(p.fullmatch(f) for f in files)]
    assert unknown == []
    assert set(missing) <= PASSING


def test_a_batch_run_leaves_the_files_that_the_page_lists_in_that_order(shards: Path) -> None:
    names = read_table("Output of convert")
    check_folder(shards, names)
    order = [name for name in names if name not in PASSING]
    written_ns = []
    for name in order:
        pattern = to_pattern(name)
        files = [
            p for p in shards.rglob("*") if pattern.fullmatch(p.relative_to(shards).as_posix())
        ]
        written_ns.append((min(p.stat().st_mtime_ns for p in files), name))
    assert written_ns == sorted(written_ns)


def test_a_training_leaves_the_files_that_the_page_lists(bundle: Path) -> None:
    names = read_table("Output of train:")
    check_folder(bundle.parent, [*names, "summary.csv"])
