"""--grid: the built-in grid, files, text, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifake_ray.config import EvaluateConfig
from cifake_ray.config.grid import Grid
from cifake_ray.errors import UsageError
from cifake_ray.storage.presets.grid import read_grid


def read(grid: str | None) -> Grid | None:
    return read_grid(EvaluateConfig(shards="shards", out="out", grid=grid))


def test_the_default_grid_has_what_images_meet() -> None:
    grid = read("default")
    assert grid is not None
    done = {name for cell in grid.values() for name in cell}
    assert {"jpeg", "webp", "blur", "noise", "rescale", "crop", "brightness", "contrast"} <= done
    assert {"saturation", "text", "logo", "resize", "max_side"} <= done
    assert grid["web"] == {"max_side": 768, "jpeg": 60}
    qualities = [cell["jpeg"] for cell in grid.values() if list(cell) == ["jpeg"]]
    assert qualities == [95, 90, 75, 50, 30]


def test_a_file_and_its_text_are_one_grid_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("b: {max-side: 64, jpeg: 50.0}\na: {text: hello}\n")
    found = read(str(tmp_path / "my.yaml"))
    assert found == read('{"b": {"max_side": 64, "jpeg": 50}, "a": {"text": "hello"}}')
    assert found is not None
    assert list(found) == ["b", "a"]
    assert type(found["b"]["jpeg"]) is int
    assert read(None) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "0 cells"),
        ("{a: {}}", "holds no steps"),
        ("{a: 5}", "holds no steps"),
        ("{clean: {jpeg: 50}}", "always measured"),
        ("{A B: {jpeg: 50}}", "small letters"),
        ("{a: {jepg: 50}}", "no step 'jepg'"),
        ("{a: {jpeg: 0}}", "jpeg is 0; give a whole number, 1 to 100"),
        ("{a: {jpeg: 50.5}}", "whole number"),
        ("{a: {blur: .nan}}", "blur is nan"),
        ("{a: {blur: .inf}}", "blur is inf"),
        ("{a: {blur: true}}", "blur is True"),
        ("{a: {noise: '5'}}", "noise is '5'"),
        ("{a: {text: 5}}", "text is 5"),
        ('{a: {text: "a\\nb"}}', "printable"),
        ("{a: {jpeg: 50}, a: {jpeg: 60}}", "twice"),
        ("[a]", "no such file"),
    ],
)
def test_a_wrong_grid_is_named_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(text)
    assert str(caught.value).startswith("--grid ")
    assert said in str(caught.value)


def test_a_hundred_cells_are_enough(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("".join(f"c{n}: {{jpeg: 50}}\n" for n in range(101)))
    with pytest.raises(UsageError, match="101 cells; give 1 to 100"):
        read(str(tmp_path / "my.yaml"))
