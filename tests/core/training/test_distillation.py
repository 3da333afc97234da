"""Distillation: the loss is the formula's, of the pixels that the student sees, and it teaches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_losses import CONFIG, NOISE
from test_trainer import (
    CPU,
    SIZE,
    ArrayImages,
    assert_equal,
    fit,
    make_detector,
    make_trainer,
    weights_of,
)
from torch import nn

from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.detector import HALF, Detector
from cifake_ray.core.training.device_limits import choose_precision
from cifake_ray.core.training.distillation import find_targets, resize_pixels, sum_divergences
from cifake_ray.core.training.losses import sum_differences, sum_losses
from cifake_ray.core.training.trainer import Trainer

TAUGHT = replace(CONFIG, teacher="t")


class Brightness(nn.Module):
    """Calls an image FAKE if it is lighter than noise of 110 of 255; remembers what it saw."""

    def __init__(self, slope: float = 20.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.dropout = nn.Dropout(0.5)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        fake = self.slope * (self.dropout(images).mean(dim=(1, 2, 3)) - (110 / 127.5 - 1))
        return torch.stack([torch.zeros_like(fake), fake], dim=1)


def make_teacher(slope: float = 20.0, size: int = SIZE, **options: Any) -> Detector:
    preprocessing = Preprocessing(image_size=size, fit="resize", mean=HALF, std=HALF, **options)
    return Detector("brightness", Brightness(slope), preprocessing).eval()


def make_taught(teacher: Detector, **settings: Any) -> Trainer:
    return make_trainer(teacher="t", teachers=[teacher], **settings)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_the_formula_written_out(temperature: float) -> None:
    student, teacher = make_detector().eval(), make_teacher()
    images = torch.from_numpy(ArrayImages(6).pixels)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    config = replace(TAUGHT, distill=0.7, distill_temperature=temperature, label_smoothing=0.1)
    found = sum_losses(student, student.network, images, None, labels, config, CPU, [teacher])
    expected = 0.0
    with torch.no_grad():
        pairs = zip(
            student(images).tolist(), teacher(images).tolist(), labels.tolist(), strict=True
        )
    for outputs, taught, label in pairs:

        def find_shares(z: list[float], t: float) -> list[float]:
            total = sum(math.exp(value / t) for value in z)
            return [math.exp(value / t) / total for value in z]

        smooth = [0.05 + 0.9 * (label == n) for n in (0, 1)]
        own = find_shares(outputs, 1.0)
        entropy = -sum(s * math.log(p) for s, p in zip(smooth, own, strict=True))
        p, q = find_shares(taught, temperature), find_shares(outputs, temperature)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected += 0.3 * entropy + 0.7 * temperature**2 * divergence
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_saturated_teacher_gives_a_finite_loss_and_gradient() -> None:
    outputs = torch.tensor([[40.0, -40.0], [0.0, 0.0]], requires_grad=True)
    loss = sum_divergences(outputs, torch.tensor([5000.0, -5000.0]), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(80 + math.log(2))
    assert outputs.grad is not None
    assert torch.allclose(outputs.grad, torch.tensor([[1.0, -1.0], [-0.5, 0.5]]))


def test_two_teachers_are_their_mean_and_flips_are_honoured() -> None:
    images = torch.from_numpy(ArrayImages(4).pixels)
    one, other = make_teacher(10.0), make_teacher(30.0)
    both = find_targets([one, other], images, CPU)
    assert not both.requires_grad
    assert torch.allclose(both, find_targets([make_teacher(20.0)], images, CPU), atol=1e-5)
    flipping = make_detector().eval()
    plain = find_targets([flipping], images, CPU)
    flipping.set_preprocessing(replace(flipping.preprocessing, test_time_flip=True))
    mirrored = find_targets([make_detector().eval()], images.flip(2), CPU)
    assert torch.allclose(find_targets([flipping], images, CPU), (plain + mirrored) / 2)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixels_are_resized_to_the_teachers_side(size: int, dtype: torch.dtype) -> None:
    ramp = (torch.arange(SIZE) * 32).to(dtype).expand(2, SIZE, SIZE)[..., None].repeat(1, 1, 1, 3)
    resized = resize_pixels(ramp, make_teacher(size=size))
    assert resized.shape == (2, size, size, 3)
    assert torch.allclose(resized[0, 0], resized[1, -1])
    # The middle of a ramp stays a ramp, whose pixels are as far apart as the sides say.
    middle = resized[0, 0, :, 0][size // 4 : -size // 4].diff()
    assert torch.allclose(middle, torch.full_like(middle, 32 * SIZE / size))
    assert resize_pixels(ramp, make_teacher()) is ramp


def test_no_pixel_is_lost_when_they_are_made_smaller() -> None:
    images = torch.zeros(1, SIZE, SIZE, 3)
    images[0, 0, 0] = 255
    assert resize_pixels(images, make_teacher(size=2))[0, 0, 0, 0] > 1


def test_each_view_has_its_own_target() -> None:
    student, teacher = make_detector().eval(), make_teacher()
    clean = torch.from_numpy(ArrayImages(4).pixels)
    images = 255 - clean
    labels = torch.tensor([0, 1, 0, 1])
    config = replace(TAUGHT, distill=1.0, consistency=2.0)
    found = sum_losses(student, student.network, images, clean, labels, config, CPU, [teacher])
    with torch.no_grad():
        views = torch.cat([images, clean])
        body, head = student.network[:-1], student.network[-1]
        normalised = (views.float() * student.scale + student.shift).permute(0, 3, 1, 2)
        features = body(normalised)
        outputs, targets = head(features), teacher.find_logit(views)
    expected = sum_divergences(outputs, targets, 1.0) / 2 + 2 * sum_differences(features, outputs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# --- the loop ------------------------------------------------------------------------------------


def test_without_weight_nothing_changes_bit_by_bit() -> None:
    options = {"augmentation": NOISE, "mixup": 0.5, "label_smoothing": 0.1}
    plain, taught = make_trainer(**options), make_taught(make_teacher(), distill=0.0, **options)
    assert fit(plain) == fit(taught)
    assert_equal(weights_of(plain), weights_of(taught))
    assert not taught.teachers[0].network.seen


@pytest.mark.parametrize("mix", [{}, {"mixup": 1.0}, {"cutmix": 1.0}])
def test_the_teacher_sees_the_very_pixels_of_the_student(mix: dict[str, Any]) -> None:
    teacher = make_teacher()
    trainer = make_taught(teacher, augmentation=NOISE, grad_accum=2, **mix)
    seen: list[torch.Tensor] = []
    trainer.detector.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for batch in trainer.batches.draw(0, 0):
        trainer.train_step(batch)
    assert len(seen) == 12
    assert_equal(seen, teacher.network.seen)


def test_a_student_learns_a_good_teacher_from_useless_labels() -> None:
    train = ArrayImages(200)
    is_fake = train.labels.copy()
    train.labels = np.random.default_rng(1).integers(0, 2, 200)
    options = {"train": train, "epochs": 10}
    plain, taught = make_trainer(**options), make_taught(make_teacher(), distill=1.0, **options)
    assert fit(plain)[-1]["val_accuracy"] < 0.8
    assert fit(taught)[-1]["val_accuracy"] > 0.95
    with torch.no_grad():
        pixels = torch.from_numpy(train.pixels)
        logit = taught.detector.eval().find_logit(pixels)
        assert ((logit > 0).numpy() == (is_fake == 1)).mean() > 0.95
        assert np.corrcoef(logit, make_teacher().find_logit(pixels))[0, 1] > 0.9


def test_the_teacher_is_neither_trained_nor_kept() -> None:
    """Its dropout is off; no checkpoint has it, and a resumed training ends as a whole one."""
    teacher = make_teacher().train()
    whole = make_taught(teacher, ema_decay=0.9)
    fit(whole)
    assert not teacher.training
    assert teacher.network.slope.item() == 20
    assert teacher.network.slope.grad is None
    part = make_taught(make_teacher(), ema_decay=0.9)
    saved: list[Any] = []

    class Killed(Exception):
        pass

    def kill() -> None:
        saved.append(part.to_checkpoint())
        raise Killed

    with pytest.raises(Killed):
        part.fit(kill)
    names = {*saved[0]["network"], *saved[0]["ema"]}
    assert names == set(part.detector.network.state_dict())
    resumed = make_taught(make_teacher(), ema_decay=0.9)
    resumed.resume(saved[0])
    fit(resumed)
    assert_equal(weights_of(whole), weights_of(resumed))


def test_pieces_of_a_batch_give_its_gradient() -> None:
    gradients = []
    for pieces in (1, 4):
        trainer = make_taught(make_teacher(), distill=0.5, grad_accum=pieces)
        trainer.detector.network[3].p = 0.0
        trainer._find_gradient(next(trainer.batches.draw(0, 0)))
        gradients.append([p.grad.clone() for p in trainer.detector.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_it_teaches_in_bf16() -> None:
    teacher = make_detector()
    dtypes = []
    teacher.network[0].register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    trainer = make_taught(teacher, epochs=1, numerics=choose_precision("cpu", "bf16"))
    trainer.fit(lambda: None)
    assert set(dtypes) == {torch.bfloat16}
