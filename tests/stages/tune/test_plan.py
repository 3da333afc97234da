"""The options that all trials of a search share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cifake_ray.config import TuneConfig
from cifake_ray.errors import UsageError
from cifake_ray.stages.tune.plan import make_plan, read_space
from cifake_ray.storage.runs.tune_run import Trial

RECIPE = {
    **{"model": "small_cnn_w8_d1", "fit": "crops", "image_size": 64, "num_crops": 4},
    **{"crops_per_image": 2, "twins": "twins", "val_sources": ["pets", "art"], "augment": "wild"},
    "teacher": "cifake,wide",
}


def test_crops_twins_and_sources_of_a_recipe_are_those_of_every_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    Path("space.yaml").write_text("augment.downscale: [0.0, 0.5]\nconsistency: [0.0, 1.0]\n")
    config = TuneConfig(
        shards="shards", run="run", recipe="recipe.yaml", search=("space.yaml",), searcher="grid"
    )
    plan = make_plan(config)
    first = plan.to_train_config(Trial(0, {}))
    assert (first.fit, first.num_crops, first.crops_per_image) == ("crops", 4, 2)
    assert first.val_source_names == ["pets", "art"]
    assert first.twins == str(tmp_path / "twins"), "trials have another working folder"
    assert first.teacher == f"cifake,{tmp_path / 'wide'}"
    space = read_space(config, first)
    assert plan.find_baseline(space) == {"augment.downscale": 0.6, "consistency": 0.0}
    other = plan.to_train_config(Trial(1, {"augment.downscale": 0.0, "consistency": 1.0}))
    assert (other.policy.downscale, other.policy.downscale_share) == (0.0, 0.0)
    assert other.policy.webp_share == 0.2


@pytest.mark.parametrize("option", ["val_sources: [a, b]", "twins: [a, b]"])
def test_what_trials_are_compared_on_is_not_searched(tmp_path: Path, option: str) -> None:
    (tmp_path / "space.yaml").write_text(option)
    config = TuneConfig(shards="shards", run="run", search=(str(tmp_path / "space.yaml"),))
    with pytest.raises(UsageError, match=option.partition(":")[0]):
        read_space(config, make_plan(config).to_train_config(Trial(0, {})))
