"""Mixup and CutMix: the same batch for any number of ranks, labels in the shares of the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_trainer import ArrayImages, fit, make_trainer

from cifake_ray.config import POLICIES, TrainConfig
from cifake_ray.core.training.mixup import Mix, draw_mix, mix_images, mix_labels

MIXES = [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}]


def draw(seed: int, **alphas: float) -> Mix | None:
    return draw_mix(np.random.default_rng(seed), TrainConfig(shards="s", run="r", **alphas), 16)


def test_without_an_alpha_nothing_is_drawn() -> None:
    rng = np.random.default_rng(0)
    assert draw_mix(rng, TrainConfig(shards="s", run="r"), 16) is None
    assert rng.random() == np.random.default_rng(0).random()


def test_each_alpha_gives_its_kind_and_both_give_both() -> None:
    kinds = {
        name: {mix.box is None for seed in range(40) if (mix := draw(seed, **alphas))}
        for name, alphas in zip(("mixup", "cutmix", "both"), MIXES, strict=True)
    }
    assert kinds == {"mixup": {True}, "cutmix": {False}, "both": {True, False}}


def test_a_larger_alpha_mixes_more_evenly() -> None:
    spread = {}
    for alpha in (0.1, 10.0):
        kept = [mix.kept for seed in range(200) if (mix := draw(seed, mixup=alpha))]
        spread[alpha] = np.std(kept)
        assert np.mean(kept) == pytest.approx(0.5, abs=0.1)
    assert spread[10.0] < 0.2 < 0.4 < spread[0.1]


def test_the_share_of_a_box_is_that_of_its_pixels() -> None:
    black = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    for seed in range(40):
        mix = draw(seed, cutmix=1.0)
        assert mix is not None
        mixed = mix_images(black, torch.full_like(black, 255), mix)
        assert (mixed == 0).double().mean().item() == pytest.approx(mix.kept)
        label = mix_labels(torch.tensor([0]), torch.tensor([1]), mix)
        assert label[0].tolist() == pytest.approx([mix.kept, 1 - mix.kept])


def test_mixup_blends_in_the_share_it_drew() -> None:
    one, two = (torch.full((1, 4, 4, 3), v, dtype=torch.uint8) for v in (100, 200))
    assert (mix_images(one, two, Mix(0.25, None)) == 175).all()


@pytest.mark.parametrize("alphas", MIXES)
def test_ranks_are_dealt_the_mixed_batch_of_one(alphas: dict[str, float]) -> None:
    whole, *ranks = (make_trainer(augmentation=POLICIES["strong"], **alphas) for _ in range(3))
    for rank, trainer in enumerate(ranks):
        trainer.batches.rank, trainer.batches.num_ranks = rank, 2
    batches = zip(*(t.batches.draw(0, 0) for t in (whole, *ranks)), strict=True)
    for one, *shares in batches:
        for rank, share in enumerate(shares):
            assert torch.equal(one[0][rank::2], share[0])
            assert torch.equal(one[1][rank::2], share[1])


@pytest.mark.parametrize("alphas", MIXES)
def test_mixing_changes_batches_and_still_learns(alphas: dict[str, float]) -> None:
    plain = next(make_trainer().batches.draw(0, 0))
    mixed = next(make_trainer(**alphas).batches.draw(0, 0))
    assert mixed[1].shape == (16, 2)
    assert mixed[1].sum(dim=1).tolist() == pytest.approx([1.0] * 16)
    assert not torch.equal(plain[0].float(), mixed[0].float())
    assert fit(make_trainer(ArrayImages(200), epochs=10, **alphas))[-1]["val_accuracy"] > 0.9
