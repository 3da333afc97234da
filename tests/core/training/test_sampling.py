"""How often an epoch has each image: by class, source and share of twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cifake_ray.config import POLICIES, TrainConfig
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.core.training.batches import Batches
from cifake_ray.core.training.pairs import count_coupled
from cifake_ray.core.training.sampling import draw_by_source
from cifake_ray.errors import UsageError

# The images of each class and source; behind them are twins of images of the REAL sources 1 and 2.
SIZES = {(REAL, 1): 60, (REAL, 2): 6, (REAL, 3): 1, (FAKE, 1): 20, (FAKE, 4): 5}
NUM_REAL, NUM_IMAGES = 67, 92
TWINS = [57, 58, 59, 60, 60, 60, 61, 62, 63]  # the image of each
PAIRED = sorted(set(TWINS))


class NumberedImages:
    """Images whose pixels are their number."""

    def __init__(self, *, with_twins: bool) -> None:
        keys = np.repeat(list(SIZES), list(SIZES.values()), axis=0)
        self.labels, self.source = keys.T
        if with_twins:
            self.labels = np.append(self.labels, [FAKE] * len(TWINS))
            self.source = np.append(self.source, self.source[TWINS])
            self.twin_of = np.append(np.full(NUM_IMAGES, -1), TWINS)

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.labels))

    def read(self, indices: np.ndarray) -> np.ndarray:
        return indices.astype(np.uint8)[:, None, None, None].repeat(3, axis=3)


def draw_steps(
    epoch: int = 0, rank: int = 0, num_ranks: int = 1, start: int = 0, **options: Any
) -> list[np.ndarray]:
    """Return the images of each step of an epoch."""
    config = TrainConfig(**{"shards": "s", "run": "r", "fit": "crops", "batch_size": 2, **options})
    images = NumberedImages(with_twins=config.twins is not None)
    batches = Batches(images, config, POLICIES["none"], "cpu", rank, num_ranks)
    batches._cut = lambda images, indices, draws: images.read(indices)  # type: ignore[attr-defined, method-assign]
    drawn = list(batches.draw(epoch, start))
    numbers = [batch.images[:, 0, 0, 0].numpy().astype(int) for batch in drawn]
    for step, batch in zip(numbers, drawn, strict=True):
        assert (images.labels[step] == batch.labels.numpy()).all()
    return numbers


def count_images(epoch: int = 0, **options: Any) -> np.ndarray:
    """Return how often an epoch has each image."""
    return np.bincount(np.concatenate(draw_steps(epoch, **options)), minlength=NUM_IMAGES)


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("crops", [1, 7])
def test_classes_sources_and_images_are_less_than_one_draw_off(balance: float, crops: int) -> None:
    seen = set()
    for epoch in range(3):
        counts = count_images(epoch, balance_sources=balance, crops_per_image=crops)
        half = NUM_IMAGES * crops // 2
        assert (counts[:NUM_REAL].sum(), counts.sum()) == (half, 2 * half)
        for (label, source), size in SIZES.items():
            weight = {key: n ** (1 - balance) for key, n in SIZES.items() if key[0] == label}
            expected = half * weight[label, source] / sum(weight.values())
            mine, counts = counts[:size], counts[size:]
            assert abs(mine.sum() - expected) < 1
            assert np.abs(mine - expected / size).max() < 1
            seen.add(mine.tobytes())
    assert len(seen) > 5, "each epoch draws anew"


def test_every_image_of_a_source_has_its_turn() -> None:
    rng, images = np.random.default_rng(0), np.arange(50, 70)
    source = np.repeat([7, 3], [60, 10])  # 10 images of the source 7, 10 of 3
    draws = [draw_by_source(images, 3, source, 1.0, rng) for _ in range(2000)]
    counts = np.bincount(np.concatenate(draws))[50:]
    assert counts.sum() == 6000
    assert np.abs(counts - 300).max() < 5 * 300**0.5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("balance", [None, 0.5])
@pytest.mark.parametrize("crops", [1, 5])
def test_a_share_of_the_pairs_are_twins_and_the_others_one_of_each_class(
    share: float, balance: float | None, crops: int
) -> None:
    options = {"twins": "t", "twin_share": share, "balance_sources": balance}
    couples = np.array(draw_steps(crops_per_image=crops, **options))
    twin_of = NumberedImages(with_twins=True).twin_of
    assert couples.size == count_coupled(twin_of) * crops, "as without a share"
    is_pair = couples[:, 1] >= NUM_IMAGES
    assert is_pair.sum() == round(share * len(couples))
    assert (twin_of[couples[is_pair, 1]] == couples[is_pair, 0]).all()
    owners = np.bincount(couples[is_pair, 0], minlength=NUM_REAL)[PAIRED]
    assert owners.sum() == is_pair.sum()
    others = couples[~is_pair]
    assert (others[:, 0] < NUM_REAL).all()
    assert (others[:, 1] >= NUM_REAL).all()
    fake = np.bincount(others[:, 1], minlength=NUM_IMAGES)[NUM_REAL:]
    if balance is None:
        assert np.ptp(owners) <= 1
        assert np.ptp(fake) <= 1, "genuine FAKE images are seen equally often"
    else:
        assert abs(owners[:3].sum() - is_pair.sum() * 3**0.5 / (3**0.5 + 4**0.5)) < 1
        assert abs(fake[:20].sum() - len(others) * 20**0.5 / (20**0.5 + 5**0.5)) < 1


def test_each_of_an_images_twins_is_drawn() -> None:
    steps = np.array(draw_steps(twins="t", twin_share=1.0, crops_per_image=5))
    of_60 = np.bincount(steps[steps[:, 0] == 60, 1] - NUM_IMAGES)[3:6]
    assert of_60.sum() == len(steps) / len(PAIRED) == 35
    assert of_60.min() > 4


@pytest.mark.parametrize(
    "options",
    [
        {"balance_sources": 0.5, "crops_per_image": 3},
        {"twins": "t", "twin_share": 0.4, "crops_per_image": 3},
        {"twins": "t", "twin_share": 0.4, "balance_sources": 1.0},
    ],
)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_see_what_one_sees_and_a_resumed_run_what_it_would_have(
    options: dict[str, Any], num_ranks: int
) -> None:
    options = {**options, "batch_size": 8, "seed": 3}
    whole = draw_steps(1, **options)
    ranks = [draw_steps(1, rank, num_ranks, **options) for rank in range(num_ranks)]
    for step, shares in zip(whole, zip(*ranks, strict=True), strict=True):
        assert sorted(step) == sorted(np.concatenate(shares))
        if "twins" in options:
            couples = {tuple(couple) for couple in step.reshape(-1, 2)}
            assert couples == {tuple(couple) for share in shares for couple in share.reshape(-1, 2)}
    resumed = draw_steps(1, start=2, **options)
    assert all((one == other).all() for one, other in zip(whole[2:], resumed, strict=True))
    other_seed = draw_steps(1, **{**options, "seed": 4})
    assert not all((one == other).all() for one, other in zip(whole, other_seed, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance_sources": 1.5}, "--balance-sources is 1.5; give 0 to 1"),
        ({"balance_sources": float("nan")}, "--balance-sources is nan; give 0 to 1"),
        ({"twins": "t", "twin_share": -0.1}, "--twin-share is -0.1; give 0 to 1"),
        ({"twin_share": 0.5}, "--twin-share needs --twins"),
        ({"twins": "t", "balance_sources": 0.5}, "with --twins needs --twin-share"),
        ({"train_size": 64}, "--train-size needs --fit crops"),
        ({"train_size": 4, "fit": "crops"}, "--train-size is 4; give 8 to 4096"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(shards="s", run="r", **options)
