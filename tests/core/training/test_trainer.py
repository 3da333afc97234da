"""Training on arrays: deterministic, resumable, and the same on one rank and on two."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from cifake_ray.config import POLICIES, Augmentation, TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.models.detector import (
    HALF,
    Detector,
    build_cnn,
    build_detector,
    list_architectures,
)
from cifake_ray.core.processing.score import predict_logit
from cifake_ray.core.schema import FAKE
from cifake_ray.core.training import batches
from cifake_ray.core.training.batches import count_steps
from cifake_ray.core.training.device_limits import DevicePrecision, choose_precision
from cifake_ray.core.training.early_stopping import average_weights, explain_end
from cifake_ray.core.training.optimizer import make_optimizer
from cifake_ray.core.training.trainer import Trainer
from cifake_ray.errors import CifakeError

SIZE = 8
CPU = choose_precision("cpu", "float32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by sharing them out; and one thread adds up in one order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class ArrayImages:
    """Images of noise; FAKE ones are lighter. Remembers what was read."""

    def __init__(self, num_images: int, seed: int = 0, size: int = SIZE) -> None:
        rng = np.random.default_rng(seed)
        self.labels = np.arange(num_images, dtype=np.int64) % 2
        noise = rng.integers(0, 160, (num_images, size, size, 3))
        self.pixels = (noise + 60 * (self.labels == FAKE)[:, None, None, None]).astype(np.uint8)
        self.reads: list[np.ndarray] = []

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.labels))

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.reads.append(indices)
        return self.pixels[indices]


def make_detector() -> Detector:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(72, 2)
    )
    return Detector(
        "tiny", network, Preprocessing(image_size=SIZE, fit="resize", mean=HALF, std=HALF)
    )


def make_trainer(
    train: ArrayImages | None = None,
    val: ArrayImages | None = None,
    numerics: DevicePrecision = CPU,
    augmentation: Augmentation = POLICIES["flip"],
    teachers: Sequence[Detector] = (),
    **settings: Any,
) -> Trainer:
    values = {"epochs": 3, "batch_size": 16, "lr": 0.01, **settings}
    config = TrainConfig(shards="shards", run="run", **values)
    detector = make_detector()
    return Trainer(
        detector,
        detector,
        config,
        ArrayImages(100) if train is None else train,
        ArrayImages(40, seed=1) if val is None else val,
        numerics,
        augmentation,
        teachers,
    )


def fit(trainer: Trainer, save: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    trainer.fit(save)
    timings = {"train_s", "val_s", "images_per_s"}
    return [{k: v for k, v in row.items() if k not in timings} for row in trainer.state.history]


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    return [t.clone() for t in trainer.detector.network.state_dict().values()]


def assert_equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# --- the loop ------------------------------------------------------------------------------------


def test_training_learns() -> None:
    trainer = make_trainer(epochs=10)
    history = fit(trainer)
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["val_accuracy"] > 0.9
    assert [row["epoch"] for row in history] == list(range(1, 11))
    assert [row["step"] for row in history] == [6 * n for n in range(1, 11)]


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    one, two = make_trainer(seed=5), make_trainer(seed=5)
    torch.manual_seed(9)
    first = fit(one)
    torch.manual_seed(9)
    assert fit(two) == first
    assert_equal(weights_of(one), weights_of(two))


def test_another_seed_gives_other_weights() -> None:
    one, two = make_trainer(seed=5), make_trainer(seed=6)
    for trainer in (one, two):
        torch.manual_seed(9)
        fit(trainer)
    assert not torch.equal(weights_of(one)[0], weights_of(two)[0])


def save_to(checkpoints: list[bytes], trainer: Trainer) -> Callable[[], None]:
    def save() -> None:
        buffer = io.BytesIO()
        torch.save(trainer.to_checkpoint(), buffer)
        checkpoints.append(buffer.getvalue())

    return save


@pytest.mark.parametrize(
    ("settings", "stands_at"),
    [({}, [(1, 0), (2, 0), (3, 0)]), ({"checkpoint_steps": 4}, [(0, 4), (1, 0), (1, 4), (2, 0)])],
    ids=["between epochs", "within one"],
)
def test_going_on_from_a_checkpoint_equals_never_having_stopped(
    settings: dict[str, Any], stands_at: list[tuple[int, int]]
) -> None:
    """Dropout draws from torch's global generator, which each step seeds."""
    settings = {"ema_decay": 0.9, "keep_epochs": 2, **settings}
    whole = make_trainer(**settings)
    checkpoints: list[bytes] = []
    expected = fit(whole, save_to(checkpoints, whole))
    for checkpoint, (epoch, batch) in zip(checkpoints, stands_at, strict=False):
        images = ArrayImages(100)
        resumed = make_trainer(images, **settings)
        torch.manual_seed(77)
        with torch.no_grad():  # nothing of what it was born with may survive
            for parameter in resumed.detector.network.parameters():
                parameter.fill_(0.5)
        resumed.resume(torch.load(io.BytesIO(checkpoint), weights_only=True))
        assert (resumed.state.epoch, resumed.state.batch) == (epoch, batch)
        assert fit(resumed) == expected
        assert len(images.reads) == 18 - 6 * epoch - batch  # none twice, none left out
        assert_equal(weights_of(resumed), weights_of(whole))
        for again, kept in zip(resumed.state.kept, whole.state.kept, strict=True):
            assert (again.epoch, again.score) == (kept.epoch, kept.score)
            assert torch.equal(again.logit, kept.logit)
            assert_equal(list(again.weights.values()), list(kept.weights.values()))
        assert resumed.state.patience == whole.state.patience


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_rates_and_decay_are_those_of_the_options_and_the_rest_of_the_checkpoint(
    schedule: str,
) -> None:
    """Population based training gives a trial another one's weights, and rates of its own."""
    settings: dict[str, Any] = {"optimizer": "muon", "schedule": schedule}
    donor = make_trainer(lr=0.002, weight_decay=0.1, **settings)
    checkpoints: list[bytes] = []
    fit(donor, save_to(checkpoints, donor))
    taken = torch.load(io.BytesIO(checkpoints[0]), weights_only=True)
    rates: list[list[float]] = []
    for rate, decay in ((0.002, 0.1), (0.006, 0.3)):
        heir = make_trainer(lr=rate, weight_decay=decay, **settings)
        heir.resume(taken)
        assert {group["weight_decay"] for group in heir.optimizer.param_groups} == {decay, 0.0}
        rates.append([])
        while heir.schedule.last_epoch < 12:
            rates[-1].append(heir.optimizer.param_groups[0]["lr"])
            heir.optimizer.step()
            heir.schedule.step()
    assert rates[1] == pytest.approx([3 * rate for rate in rates[0]])


def test_saving_within_an_epoch_changes_nothing() -> None:
    plain, saved = make_trainer(), make_trainer(checkpoint_steps=2)
    checkpoints: list[bytes] = []
    assert fit(saved, save_to(checkpoints, saved)) == fit(plain)
    assert len(checkpoints) == 3 * 3  # after 2 and 4 steps, and at the end instead of after 6
    assert_equal(weights_of(saved), weights_of(plain))


def test_a_checkpoint_is_not_changed_by_training_on() -> None:
    trainer = make_trainer(epochs=2)
    histories: list[int] = []
    trainer.fit(lambda: histories.append(len(trainer.to_checkpoint()["state"]["history"])))
    assert histories == [1, 2]


def test_the_best_epoch_is_kept_not_the_last() -> None:
    """Validated on swapped labels, training makes every epoch worse than the one before."""
    val = ArrayImages(40, seed=1)
    val.labels = 1 - val.labels
    trainer = make_trainer(val=val, epochs=5)
    seen: list[tuple[float, list[torch.Tensor]]] = []

    def save() -> None:
        seen.append((trainer.state.history[-1]["val_accuracy"], weights_of(trainer)))

    fit(trainer, save)
    accuracy, weights = max(seen, key=lambda pair: pair[0])  # the first of the highest
    assert accuracy > seen[-1][0]
    assert_equal(list(trainer.state.kept[0].weights.values()), weights)
    assert trainer.state.kept[0].score == accuracy


def test_the_mean_of_the_best_epochs_is_kept_if_it_is_better() -> None:
    trainer = make_trainer(keep_epochs=2, epochs=4, monitor="val_loss")
    seen: list[dict[str, torch.Tensor]] = []

    def save() -> None:
        state = trainer.detector.network.state_dict()
        seen.append({name: tensor.clone() for name, tensor in state.items()})

    history = fit(trainer, save)
    order = sorted(range(4), key=lambda n: history[n]["val_loss"])
    assert [kept.epoch for kept in trainer.state.kept] == [n + 1 for n in order[:2]]
    best, averaged = trainer.choose_best()
    assert averaged == [best.epoch]  # the loss fell all the way: a mean lags behind
    # Where the last weights overshoot to both sides of a good place, their mean is that place.
    good = seen[order[0]]
    off = {
        name: 3 * torch.randn(t.shape, generator=torch.manual_seed(0)) for name, t in good.items()
    }
    sides = [{n: good[n] + sign * off[n] for n in good} for sign in (1, -1)]
    trainer.state.kept = [
        kept._replace(weights=weights, score=-9.0)
        for kept, weights in zip(trainer.state.kept, sides, strict=True)
    ]
    best, averaged = trainer.choose_best()
    assert averaged == sorted(n + 1 for n in order[:2])
    assert best.score == pytest.approx(-history[order[0]]["val_loss"], abs=1e-3)
    for name, tensor in good.items():
        assert torch.allclose(best.weights[name], tensor, atol=1e-5)


def test_a_mean_of_weights_that_is_no_detector_is_not_kept() -> None:
    trainer = make_trainer(keep_epochs=2, epochs=2)
    fit(trainer, lambda: None)
    best = trainer.state.kept[0]
    wild = {n: torch.full_like(t, 1e38) for n, t in best.weights.items()}
    trainer.state.kept[1] = trainer.state.kept[1]._replace(weights=wild)
    assert trainer.choose_best() == (best, [best.epoch])


def test_a_mean_of_weights_leaves_counters_alone() -> None:
    weights = [
        {"w": torch.tensor([1.0, 3.0]), "n": torch.tensor(7)},
        {"w": torch.tensor([3.0, 5.0]), "n": torch.tensor(9)},
    ]
    mean = average_weights(weights)
    assert mean["w"].tolist() == [2.0, 4.0]
    assert mean["n"].item() == 7


def test_the_test_time_flip_takes_the_mean_with_the_mirror_image() -> None:
    plain, flipped = make_detector(), make_detector()
    flipped.set_preprocessing(replace(flipped.preprocessing, test_time_flip=True))
    plain.eval(), flipped.eval()
    images = torch.from_numpy(ArrayImages(10).pixels)
    logit, mirrored = plain.find_logit(images), plain.find_logit(images.flip(2))
    assert not torch.allclose(logit, mirrored)
    assert torch.allclose(flipped.find_logit(images), (logit + mirrored) / 2)
    assert torch.equal(flipped(images), plain(images))  # training sees what it saw
    scored = predict_logit(flipped, images, "cpu")
    assert np.allclose(scored, flipped.find_logit(images).detach().numpy(), atol=1e-6)


def test_a_loss_that_is_no_number_ends_training_with_a_remedy() -> None:
    trainer = make_trainer(lr=1e30)
    saves: list[int] = []
    with pytest.raises(CifakeError, match=r"epoch \d; lower --lr"):
        trainer.fit(lambda: saves.append(1))
    assert len(saves) == trainer.state.epoch


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_shortest_run_there_is_trains(epochs: int) -> None:
    """The schedule divides by the length of its phases."""
    trainer = make_trainer(ArrayImages(4), ArrayImages(2), epochs=epochs, batch_size=16)
    assert len(fit(trainer)) == epochs


def test_the_rate_rises_then_falls_to_almost_nothing() -> None:
    trainer = make_trainer(epochs=10, lr=0.01, warmup=0.3)
    rates = [row["lr"] for row in fit(trainer)]
    peak = int(np.argmax(rates))
    assert max(rates) <= 0.01 + 1e-9
    assert 1 <= peak <= 4
    assert rates[-1] < 1e-4
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_decay_spares_biases_and_norms() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    config = TrainConfig(shards="s", run="r", weight_decay=0.1)
    groups = make_optimizer(network, config).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }


# --- stopping ------------------------------------------------------------------------------------


class Scripted(Trainer):
    """Trains as ever, but validation says what the script says."""

    script: tuple[float, ...] = ()

    def _measure(self, logit: torch.Tensor, train_loss: float) -> dict[str, Any]:
        row = super()._measure(logit, train_loss)
        return {**row, self.config.monitor: self.script[self.state.epoch]}


def make_scripted(*script: float, **settings: Any) -> Trainer:
    trainer = make_trainer(epochs=len(script), **settings)
    trainer.__class__ = Scripted
    trainer.script = script  # type: ignore[attr-defined]
    return trainer


@pytest.mark.parametrize(
    ("script", "settings", "epochs"),
    [
        ((0.5, 0.6, 0.6, 0.5, 0.7), {"patience": 2}, 4),
        ((0.5, 0.6, 0.6, 0.7, 0.7), {"patience": 2}, 5),
        ((0.5, 0.6, 0.6, 0.5, 0.7), {}, 5),
        ((0.5, 0.4, 0.9), {"patience": 1}, 2),
        ((0.5, 0.52, 0.54, 0.9), {"patience": 2, "min_delta": 0.05}, 3),
        ((0.5, 0.53, 0.56, 0.9), {"patience": 2, "min_delta": 0.05}, 4),
        ((0.5, 0.6, 0.7, 0.4), {"patience": 2, "monitor": "val_loss"}, 3),
        ((0.7, 0.6, 0.5, 0.4), {"patience": 1, "monitor": "val_loss"}, 4),
        ((0.7, 0.6, 0.8), {"patience": 1, "monitor": "val_auroc"}, 2),
    ],
)
def test_patience_ends_training_when_nothing_better_came(
    script: tuple[float, ...], settings: dict[str, Any], epochs: int
) -> None:
    trainer = make_scripted(*script, **settings)
    history = fit(trainer)
    assert len(history) == epochs
    all_done = epochs == len(script)
    end = explain_end(history, trainer.config)
    assert end == (
        f"all {epochs} epochs done"
        if all_done
        else f"{trainer.config.monitor} no better for {trainer.config.patience} epochs"
    )


@pytest.mark.parametrize(
    ("monitor", "best"), [("val_accuracy", 2), ("val_auroc", 2), ("val_loss", 3)]
)
def test_the_monitor_says_which_epoch_is_kept(monitor: str, best: int) -> None:
    trainer = make_scripted(0.5, 0.9, 0.3, 0.9, monitor=monitor)
    seen: list[list[torch.Tensor]] = []
    fit(trainer, lambda: seen.append(weights_of(trainer)))
    assert trainer.state.kept[0].epoch == best
    assert_equal(list(trainer.state.kept[0].weights.values()), seen[best - 1])


def test_a_resumed_wait_goes_on_counting_and_a_finished_one_stays_finished() -> None:
    settings = {"patience": 3}
    whole = make_scripted(0.8, 0.7, 0.7, 0.7, 0.9, **settings)
    checkpoints: list[bytes] = []

    def save() -> None:
        buffer = io.BytesIO()
        torch.save(whole.to_checkpoint(), buffer)
        checkpoints.append(buffer.getvalue())

    torch.manual_seed(3)
    expected = fit(whole, save)
    assert len(checkpoints) == 4
    for checkpoint in (checkpoints[1], checkpoints[3]):
        resumed = make_scripted(0.8, 0.7, 0.7, 0.7, 0.9, **settings)
        resumed.resume(torch.load(io.BytesIO(checkpoint), weights_only=True))
        assert fit(resumed) == expected
        assert_equal(weights_of(resumed), weights_of(whole))


def test_the_history_holds_the_area_under_the_curve() -> None:
    trainer = make_trainer()
    logit = torch.tensor(trainer.val_images.labels - 0.5, dtype=torch.float32)
    assert trainer._measure(logit, 0.0)["val_auroc"] == 1.0
    assert trainer._measure(-logit, 0.0)["val_auroc"] == 0.0


def test_outputs_that_are_no_numbers_end_training_with_a_remedy() -> None:
    trainer = make_trainer()
    with pytest.raises(CifakeError, match="outputs became infinite in epoch 1; lower --lr"):
        trainer._measure(torch.full((40,), torch.nan), 0.0)


def test_a_gain_without_patience_is_refused() -> None:
    with pytest.raises(ValueError, match="--min-delta needs --patience"):
        TrainConfig(shards="s", run="r", min_delta=0.1)


# --- batches -------------------------------------------------------------------------------------


def test_an_image_is_seen_at_most_once_per_epoch_in_whole_batches() -> None:
    images = ArrayImages(100)
    fit(make_trainer(images, batch_size=16, epochs=2))
    assert [len(indices) for indices in images.reads] == [16] * 12
    epochs = [np.concatenate(images.reads[:6]), np.concatenate(images.reads[6:])]
    for seen in epochs:
        assert len(set(seen.tolist())) == 96
    assert epochs[0].tolist() != epochs[1].tolist()


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    images = ArrayImages(10)
    fit(make_trainer(images, batch_size=64, epochs=1))
    assert [sorted(indices) for indices in images.reads] == [list(range(10))]
    assert count_steps(10, 64) == 1


def find_flips(trainer: Trainer) -> dict[bytes, bool]:
    """Which images of an epoch came mirrored, by their bytes."""
    source = trainer.batches.images
    assert isinstance(source, ArrayImages)
    flips = {}
    for images, *_ in trainer.batches.draw(trainer.state.epoch, 0):
        for given, number in zip(images.numpy(), source.reads[-1], strict=True):
            stored = source.pixels[number]
            assert np.array_equal(given, stored) or np.array_equal(given, stored[:, ::-1])
            flips[stored.tobytes()] = not np.array_equal(given, stored)
    return flips


def test_half_of_the_images_are_mirrored_anew_each_epoch() -> None:
    trainer = make_trainer()
    first = find_flips(trainer)
    trainer.state.epoch = 1
    second = find_flips(trainer)
    assert 0.3 < np.mean(list(first.values())) < 0.7
    both = first.keys() & second.keys()
    assert 0.3 < np.mean([first[image] != second[image] for image in both]) < 0.7


def test_no_image_is_mirrored_unless_asked() -> None:
    assert not any(find_flips(make_trainer(augmentation=POLICIES["none"])).values())


def draw_pixels(trainer: Trainer) -> torch.Tensor:
    """All images of the epoch, as the network would see them."""
    return torch.cat([batch[0] for batch in trainer.batches.draw(trainer.state.epoch, 0)])


def test_flips_are_those_of_the_epoch_generator() -> None:
    """The stream of numbers that makes an old recipe give its old weights."""
    trainer = make_trainer(seed=3)
    rng = np.random.default_rng((3, 0))
    order = trainer.batches.images.order_epoch(rng)
    mirrored = rng.random(len(order)) < 0.5
    pixels = trainer.batches.images.read(order[:96])
    pixels[mirrored[:96]] = pixels[mirrored[:96], :, ::-1]
    assert np.array_equal(draw_pixels(trainer).numpy(), pixels)


def test_each_epoch_and_seed_augments_anew_and_the_same_ones_alike() -> None:
    trainers = [make_trainer(augmentation=POLICIES["strong"], seed=seed) for seed in (1, 1, 2)]
    first = [draw_pixels(trainer) for trainer in trainers]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    trainers[1].state.epoch = 1
    assert not torch.equal(draw_pixels(trainers[1]), first[0])


def test_ranks_are_dealt_the_augmented_batch_of_one() -> None:
    whole, *ranks = (make_trainer(augmentation=POLICIES["strong"]) for _ in range(3))
    for rank, trainer in enumerate(ranks):
        trainer.batches.rank, trainer.batches.num_ranks = rank, 2
    batches = zip(*(t.batches.draw(0, 0) for t in (whole, *ranks)), strict=True)
    for one, left, right in batches:
        assert torch.equal(one[0][0::2], left[0])
        assert torch.equal(one[0][1::2], right[0])


def test_labels_stay_with_their_images() -> None:
    trainer = make_trainer()
    source = trainer.batches.images
    assert isinstance(source, ArrayImages)
    for _, labels, batch_size, _ in trainer.batches.draw(trainer.state.epoch, 0):
        assert labels.tolist() == source.labels[source.reads[-1]].tolist()
        assert batch_size == 16


# --- validation ----------------------------------------------------------------------------------


class MeanDetector(nn.Module):
    """Says FAKE for images lighter than 128 on average."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        lightness = images.mean(dim=(1, 2, 3))
        return torch.stack([-lightness, lightness], dim=1)


@pytest.mark.parametrize("num_images", [2, 3, 511, 512, 513, 1025])
def test_every_validation_image_counts_once(num_images: int) -> None:
    val = ArrayImages(num_images, seed=2)
    trainer = make_trainer(val=val)
    detector = trainer.detector
    detector.network = MeanDetector()
    logit = trainer.predict(val)
    pixels = torch.from_numpy(val.pixels)
    expected = torch.cat([to_logit_alone(detector, image[None]) for image in pixels])
    assert torch.allclose(logit, expected, atol=1e-5)
    assert sorted(np.concatenate(val.reads).tolist()) == list(range(num_images))
    row = trainer._measure(logit, 0.0)
    correct = int(((expected >= 0).numpy() == (val.labels == FAKE)).sum())
    assert row["val_accuracy"] == round(correct / num_images, 6)


def to_logit_alone(detector: Detector, image: torch.Tensor) -> torch.Tensor:
    outputs = detector(image)
    return outputs[:, 1] - outputs[:, 0]


def test_validation_leaves_the_detector_and_the_generator_alone() -> None:
    trainer = make_trainer()
    before, state = weights_of(trainer), torch.get_rng_state()
    trainer.predict(trainer.val_images)
    assert_equal(before, weights_of(trainer))
    assert torch.equal(state, torch.get_rng_state())


# --- precision -----------------------------------------------------------------------------------


def test_bf16_runs_on_the_cpu_and_keeps_weights_in_float32() -> None:
    numerics = choose_precision("cpu", "bf16")
    assert numerics.dtype is torch.bfloat16
    trainer = make_trainer(numerics=numerics, epochs=8)
    assert fit(trainer)[-1]["val_accuracy"] > 0.8
    assert {t.dtype for t in weights_of(trainer)} == {torch.float32}


def test_validation_computes_as_scoring_does_whatever_the_precision() -> None:
    trainer = make_trainer(numerics=choose_precision("cpu", "bf16"))
    images = trainer.val_images
    everything = torch.from_numpy(images.read(np.arange(len(images.labels))))
    with torch.inference_mode():
        scored = trainer.detector.eval().find_logit(everything)
    assert torch.allclose(trainer.predict(images), scored, rtol=0, atol=1e-5)


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="--precision fp16 needs a GPU"):
        choose_precision("cpu", "fp16")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({}, torch.float32),  # of another make
    ],
)
def test_auto_is_bf16_on_a_cpu_that_computes_it_fast(
    capabilities: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("cpu", "auto").dtype is dtype


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_fp16_on_a_gpu_that_only_emulates_bf16(
    is_native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or is_native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert choose_precision("cuda", "auto").dtype is dtype


# --- detectors -----------------------------------------------------------------------------------


def test_the_baseline_has_the_parameters_it_promises() -> None:
    assert build_detector("cnn").num_parameters == 39_132
    assert build_cnn()(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


def test_the_detector_normalises_as_its_preprocessing_says() -> None:
    detector = make_detector()
    detector.set_preprocessing(
        Preprocessing(image_size=SIZE, fit="resize", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    )
    detector.eval()
    images = torch.from_numpy(ArrayImages(3).pixels)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = detector.network(((images / 255 - mean) / std).permute(0, 3, 1, 2))
    assert torch.allclose(detector(images), expected, atol=1e-5)


def test_an_unknown_model_is_refused_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"--model xyz: .*`cifake-ray models`"):
        build_detector("xyz")
    for name, meant in (("est_resnet", "test_resnet"), ("small_cn", "small_cnn")):
        with pytest.raises(ValueError, match=rf"--model {name}: .*did you mean {meant}"):
            build_detector(name)


def test_a_size_that_the_baseline_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="--image-size 64: cnn takes 32 only"):
        build_detector("cnn", image_size=64)


def test_a_size_that_a_network_of_timm_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="--image-size"):
        build_detector("test_vit", image_size=40)


def test_a_network_of_timm_takes_another_size_than_its_own() -> None:
    for name, size in (("test_resnet", 32), ("test_vit", 64)):
        detector = build_detector(name, image_size=size).eval()
        assert detector(torch.zeros(2, size, size, 3, dtype=torch.uint8)).shape == (2, 2)
        assert detector.preprocessing.image_size == size


def test_architectures_are_listed_by_glob() -> None:
    assert list(list_architectures("cnn")) == ["cnn"]
    assert "test_resnet" in list_architectures("test_*")
    with pytest.raises(ValueError, match="no architecture matches"):
        list_architectures("nothing-of-the-kind")


def test_a_compiled_network_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    plain, compiled = make_trainer(epochs=1), make_trainer(epochs=1)
    for trainer in (plain, compiled):  # its random numbers are others
        trainer.detector.network[3].p = 0.0  # type: ignore[index, union-attr]
    compiled.detector.network.compile()
    counters.clear()
    expected = fit(plain)[0]
    assert not counters["stats"]["unique_graphs"]
    assert fit(compiled)[0]["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
    assert counters["stats"]["unique_graphs"] >= 1
    assert compiled.state.kept[0].weights.keys() == plain.state.kept[0].weights.keys()


# --- several ranks -------------------------------------------------------------------------------


def make_ddp_trainer(train: ArrayImages, val: ArrayImages, options: dict[str, Any]) -> Trainer:
    trainer = make_trainer(train, val, epochs=2, batch_size=15, label_smoothing=0.1, **options)
    trainer.detector.network[3].p = 0.0  # type: ignore[index, union-attr]
    trainer.wrapped = nn.parallel.DistributedDataParallel(trainer.detector)
    return trainer


def run_rank(rank: int, num_ranks: int, folder: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where the host's own name need not resolve
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{num_ranks}", rank=rank, world_size=num_ranks
    )
    try:
        train, val = ArrayImages(50), ArrayImages(31, seed=1)
        trainer = make_ddp_trainer(train, val, options)
        gradients: list[list[torch.Tensor]] = []
        step = trainer.optimizer.step

        def keep_gradients(*args: Any, **kwargs: Any) -> Any:
            parameters = trainer.detector.network.parameters()
            gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
            return step(*args, **kwargs)

        trainer.optimizer.step = keep_gradients  # type: ignore[method-assign]
        history = fit(trainer)
        result = {
            "reads": [indices.tolist() for indices in train.reads],
            "val_reads": [indices.tolist() for indices in val.reads],
            "gradients": gradients[0],
            "weights": weights_of(trainer),
            "logit": trainer.state.kept[0].logit,
            "history": history,
        }
        torch.save(result, f"{folder}/{num_ranks}-{rank}.pt")
        dist.barrier()  # gloo may abort when its peer leaves first
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grad_accum": 2, "grad_clip": 0.1, "ema_decay": 0.9, "freeze_epochs": 1, "patience": 1},
    ],
    ids=["plain", "all at once"],
)
def test_two_ranks_train_as_one_does(tmp_path: Path, options: dict[str, Any]) -> None:
    results: dict[int, list[dict[str, Any]]] = {}
    for num_ranks in (1, 2):
        torch.multiprocessing.spawn(run_rank, (num_ranks, str(tmp_path), options), nprocs=num_ranks)
        results[num_ranks] = [
            torch.load(tmp_path / f"{num_ranks}-{rank}.pt", weights_only=True)
            for rank in range(num_ranks)
        ]
    (one,) = results[1]
    a, b = results[2]
    for whole, left, right in zip(one["reads"], a["reads"], b["reads"], strict=True):
        assert sorted(left + right) == sorted(whole)
        assert not set(left) & set(right)
    read_by_two = [n for indices in a["val_reads"] + b["val_reads"] for n in indices]
    assert sorted(read_by_two) == sorted(n for indices in one["val_reads"] for n in indices)
    for expected, left, right in zip(one["gradients"], a["gradients"], b["gradients"], strict=True):
        assert torch.allclose(left, expected, atol=1e-6)
        assert torch.equal(left, right)
    assert_equal(a["weights"], b["weights"])
    assert torch.allclose(a["logit"], one["logit"], atol=1e-4)
    assert torch.equal(a["logit"], b["logit"])
    assert a["history"] == b["history"]
    for row, expected_row in zip(a["history"], one["history"], strict=True):
        assert math.isclose(row["train_loss"], expected_row["train_loss"], abs_tol=1e-4)
        assert row["val_accuracy"] == expected_row["val_accuracy"]


@pytest.mark.parametrize("ahead_bytes", [0, 1 << 30])
def test_batches_prepared_ahead_of_a_gpu_are_those_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, ahead_bytes: int
) -> None:
    """`elsewhere` stands for a GPU: what is prepared in threads is the same, in the same order."""
    monkeypatch.setattr(batches, "to_device", lambda tensor, device: tensor)
    monkeypatch.setattr(batches, "AHEAD_BYTES", ahead_bytes)
    torch.set_num_threads(3)
    config = TrainConfig(shards="shards", run="run", batch_size=16, mixup=0.4)
    drawn = []
    for device in ("cpu", "elsewhere"):
        images = ArrayImages(150)
        made = batches.Batches(images, config, POLICIES["strong"], device, 0, 1)
        drawn.append([(*batch[:2], torch.rand(3)) for batch in made.draw(epoch=1, start=2)])
    assert len(drawn[0]) == len(drawn[1]) == 7
    for one, other in zip(*drawn, strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))
    assert torch.get_num_threads() == 3


def test_a_batch_that_cannot_be_prepared_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ArrayImages):
        def read(self, indices: np.ndarray) -> np.ndarray:
            if len(self.reads) > 3:
                raise CifakeError("the cache is gone")
            return super().read(indices)

    monkeypatch.setattr(batches, "to_device", lambda tensor, device: tensor)
    config = TrainConfig(shards="shards", run="run", batch_size=16)
    made = batches.Batches(Broken(200), config, POLICIES["flip"], "elsewhere", 0, 1)
    with pytest.raises(CifakeError, match="the cache is gone"):
        list(made.draw(epoch=0, start=0))
