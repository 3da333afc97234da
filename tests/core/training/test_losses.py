"""The consistency loss: what it compares, that it pulls views together, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_trainer import CPU, ArrayImages, make_trainer, weights_of
from torch import nn

from cifake_ray.config import Augmentation, TrainConfig
from cifake_ray.core.models.detector import build_detector
from cifake_ray.core.training.device_limits import choose_precision
from cifake_ray.core.training.losses import sum_differences, sum_losses
from cifake_ray.errors import UsageError

NOISE = Augmentation(noise=60.0, noise_share=1.0)
CONFIG = TrainConfig(shards="s", run="r")


def test_it_is_the_cosine_distance_and_the_symmetric_divergence() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
    outputs = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 2.0], [1.0, -1.0]])
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 2.0]).softmax(0)
    divergence = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    assert sum_differences(features, outputs).item() == pytest.approx(1 + divergence.item())


@pytest.mark.parametrize("name", ["cnn", "small_cnn_w16_d1"])
def test_it_compares_what_enters_the_classifier_and_leaves_no_hook(name: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(name).eval()
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1])
    config = replace(CONFIG, consistency=2.0)
    plain = sum_losses(detector, detector.network, images, None, labels, CONFIG, CPU)
    same = sum_losses(detector, detector.network, images, images, labels, config, CPU)
    assert same.item() == pytest.approx(plain.item(), abs=1e-4)
    clean = images.flip(0)
    mixed = sum_losses(detector, detector.network, images, clean, labels, config, CPU)
    with torch.no_grad():
        head = [m for m in detector.network.modules() if isinstance(m, nn.Linear)][-1]
        inputs: list[torch.Tensor] = []
        hook = head.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
        outputs = detector(torch.cat([images, clean]))
        hook.remove()
    both = torch.cat([labels, labels])
    entropy = nn.functional.cross_entropy(outputs, both, reduction="sum") / 2
    expected = entropy + 2 * sum_differences(inputs[0], outputs)
    assert mixed.item() == pytest.approx(expected.item(), abs=1e-4)
    assert not any(module._forward_pre_hooks for module in detector.modules())


def test_a_network_without_one_classifier_is_refused() -> None:
    detector = build_detector("cnn")
    config = replace(CONFIG, consistency=1.0)
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    headless = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))  # not the network that is called
    with pytest.raises(UsageError, match="no single classifier"):
        sum_losses(detector, headless, images, images, torch.tensor([0, 1]), config, CPU)


def find_difference(weight: float) -> float:
    """How far two views of an image are apart after a training."""
    trainer = make_trainer(augmentation=NOISE, epochs=6, consistency=weight)
    trainer.fit(lambda: None)
    detector = trainer.detector.eval()
    clean = torch.from_numpy(ArrayImages(64, seed=5).pixels)
    noisy = (
        clean + 40.0 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(0, 255)
    with torch.no_grad():
        outputs = detector(torch.cat([clean.float(), noisy]))
    return (sum_differences(torch.ones(128, 2), outputs) / 64).item()


def test_training_with_it_brings_the_views_closer() -> None:
    assert find_difference(4.0) < 0.7 * find_difference(0.0)


def test_without_it_no_second_view_is_computed() -> None:
    seen: list[int] = []
    for weight in (0.0, 1.0):
        trainer = make_trainer(augmentation=NOISE, epochs=1, consistency=weight)
        trainer.detector.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        trainer.train_step(next(trainer.batches.draw(0, 0)))
    assert seen == [16, 32]


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"channels_last": True}])
def test_pieces_of_a_batch_give_its_gradient(options: dict[str, object]) -> None:
    """Without dropout, which each piece draws anew; the averaged weights keep no hook."""
    gradients = []
    for pieces in (1, 4):
        trainer = make_trainer(augmentation=NOISE, consistency=1.5, grad_accum=pieces, **options)
        trainer.detector.network[3].p = 0.0  # type: ignore[index]
        batch = next(trainer.batches.draw(0, 0))
        trainer._find_gradient(batch)
        gradients.append(
            [p.grad.clone() for p in trainer.detector.parameters() if p.grad is not None]
        )
        trainer.train_step(batch)
        assert not any(m._forward_pre_hooks for m in trainer.eval_model.modules())
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_it_trains_in_bf16() -> None:
    trainer = make_trainer(
        augmentation=NOISE, epochs=1, consistency=1.0, numerics=choose_precision("cpu", "bf16")
    )
    before = weights_of(trainer)
    trainer.fit(lambda: None)
    assert not torch.equal(before[0], weights_of(trainer)[0])
