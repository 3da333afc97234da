"""The sample's folder: the same again, and nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cifake_ray.config import SampleConfig
from cifake_ray.errors import UsageError
from cifake_ray.storage.datasets.sample_folder import write_sample


def write(out: Path, **options: Any) -> set[Path]:
    write_sample(SampleConfig(out=str(out), **{"images": 40, **options}))
    return {path for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mixed", [False, True])
def test_what_was_begun_is_finished(tmp_path: Path, mixed: bool) -> None:
    whole = write(tmp_path, mixed=mixed)
    min(whole).unlink()
    assert write(tmp_path, mixed=mixed) == whole
    assert len(whole) == 40


@pytest.mark.parametrize("options", [{"images": 60}, {"images": 20}, {"seed": 1}], ids=str)
def test_samples_are_not_mixed(tmp_path: Path, options: dict[str, int]) -> None:
    before = write(tmp_path)
    with pytest.raises(UsageError, match=r"holds other files, .* such as t"):
        write(tmp_path, **options)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
