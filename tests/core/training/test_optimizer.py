"""Optimisers, schedules and the other options of `train`: each changes what it says it does."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import ArrayImages, assert_equal, fit, make_trainer, weights_of
from torch import nn

from cifake_ray.config import TrainConfig
from cifake_ray.core.models.detector import build_cnn, build_detector, find_head
from cifake_ray.core.training.optimizer import (
    build_for_training,
    make_optimizer,
    make_schedule,
    sync_batch_norms,
)


def make_config(**settings: Any) -> TrainConfig:
    return TrainConfig(shards="s", run="r", **settings)


def list_rates(num_steps: int, **settings: Any) -> list[float]:
    """The rate of each step."""
    config = make_config(lr=0.1, **settings)
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# --- schedules -----------------------------------------------------------------------------------


def test_constant_rises_in_a_line_and_stays() -> None:
    rates = list_rates(10, schedule="constant", warmup=0.4)
    assert rates == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 7)
    assert list_rates(3, schedule="constant", warmup=0) == [0.1] * 3


def test_cosine_is_half_a_wave_after_the_warm_up() -> None:
    rates = list_rates(12, schedule="cosine", warmup=2 / 12)
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates[7] == pytest.approx(0.05)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.99])
def test_the_shortest_schedules_hold(schedule: str, num_steps: int, warmup: float) -> None:
    assert all(0 < r <= 0.1 for r in list_rates(num_steps, schedule=schedule, warmup=warmup))


# --- optimisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("adamw", "AdamW"), ("sgd", "SGD"), ("muon", "Muon")]
)
def test_every_optimizer_is_the_one_it_is_called_and_learns(optimizer: str, kind: str) -> None:
    lr = {"adamw": 0.01, "sgd": 0.1, "muon": 0.01}[optimizer]
    trainer = make_trainer(ArrayImages(200), optimizer=optimizer, lr=lr, epochs=10)
    assert type(trainer.optimizer).__name__ == kind
    assert fit(trainer)[-1]["val_accuracy"] > 0.9


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_momentum_reaches_every_optimizer(optimizer: str) -> None:
    for momentum in (0.5, 0.9):
        made = make_optimizer(build_cnn(), make_config(optimizer=optimizer, momentum=momentum))
        for group in made.param_groups:
            found = group["betas"][0] if optimizer == "adamw" else group["momentum"]
            assert found == momentum


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_every_optimizer_has_every_weight_once_and_decays_no_bias(optimizer: str) -> None:
    network = build_cnn()
    made = make_optimizer(network, make_config(optimizer=optimizer, weight_decay=0.1))
    decay = [(id(p), g["weight_decay"]) for g in made.param_groups for p in g["params"]]
    assert len(decay) == len(dict(decay)) == len(list(network.parameters()))
    for parameter in network.parameters():
        assert dict(decay)[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


def test_muon_leaves_the_head_to_adamw() -> None:
    trainer = make_trainer(optimizer="muon", epochs=1)
    fit(trainer)
    head = set(find_head(trainer.detector.network).parameters())
    by_muon = {p for p, state in trainer.optimizer.state.items() if state["use_muon"]}
    assert trainer.detector.network.get_submodule("0").weight in by_muon
    assert not by_muon & head


def test_layer_decay_slows_the_layers_before() -> None:
    config = make_config(layer_decay=0.5, lr=0.1)
    network = build_detector("test_vit").network
    optimizer = make_optimizer(network, config)
    make_schedule(optimizer, config, 100)
    peaks = {id(p): g["max_lr"] for g in optimizer.param_groups for p in g["params"]}
    rates = {name: peaks[id(p)] for name, p in network.named_parameters()}
    assert rates["head.weight"] == pytest.approx(0.1)
    blocks = sorted({name.split(".")[1] for name in rates if name.startswith("blocks.")})
    by_depth = [rates[f"blocks.{n}.mlp.fc1.weight"] for n in blocks]
    assert by_depth == sorted(set(by_depth))
    assert rates["patch_embed.proj.weight"] < by_depth[0] < 0.1


def test_layer_decay_is_refused_where_no_layers_are_known() -> None:
    with pytest.raises(ValueError, match="--layer-decay: timm knows no layers of cnn"):
        make_optimizer(build_cnn(), make_config(layer_decay=0.5))


@pytest.mark.parametrize("name", ["small_resnet18", "efficientnet_b0"])
def test_norms_are_shared_by_the_ranks_on_gpus_only(name: str) -> None:
    """timm's norms are classes of their own, with an activation inside."""
    network = build_detector(name, image_size=32).network
    names = list(network.state_dict())
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert sync_batch_norms(network, "cpu") is network
    assert [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == norms
    shared = sync_batch_norms(network, "cuda")
    assert len([m for m in shared.modules() if isinstance(m, nn.SyncBatchNorm)]) == len(norms)
    assert not [m for m in shared.modules() if isinstance(m, nn.BatchNorm2d)]
    assert list(shared.state_dict()) == names


# --- the loop ------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "muon"},
    {"schedule": "cosine"},
    {"schedule": "constant", "warmup": 0.0},
    {"momentum": 0.5},
    {"grad_clip": 0.01},
    {"ema_decay": 0.9},
    {"freeze_epochs": 1},
    {"mixup": 0.5},
    {"cutmix": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_each_option_changes_training_and_survives_a_kill(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    plain = fit(make_trainer(epochs=2))
    whole = make_trainer(epochs=2, **options)
    checkpoints: list[bytes] = []

    def save() -> None:
        buffer = io.BytesIO()
        torch.save(whole.to_checkpoint(), buffer)
        checkpoints.append(buffer.getvalue())

    torch.manual_seed(3)
    expected = fit(whole, save)
    assert expected != plain
    resumed = make_trainer(epochs=2, **options)
    torch.manual_seed(77)
    resumed.resume(torch.load(io.BytesIO(checkpoints[0]), weights_only=True))
    assert fit(resumed) == expected
    assert_equal(weights_of(resumed), weights_of(whole))
    kept, expected_kept = (list(t.state.kept[0].weights.values()) for t in (resumed, whole))
    assert_equal(kept, expected_kept)


def find_first_gradients(**settings: Any) -> list[torch.Tensor]:
    trainer = make_trainer(**settings)
    batch = next(trainer.batches.draw(trainer.state.epoch, 0))
    trainer.wrapped.eval()  # without dropout, which draws for each piece anew
    trainer._find_gradient(batch)
    return [p.grad for p in trainer.detector.parameters() if p.grad is not None]


@pytest.mark.parametrize("grad_accum", [2, 3, 16, 100])
def test_pieces_add_up_to_the_gradient_of_the_batch(grad_accum: int) -> None:
    whole = find_first_gradients(label_smoothing=0.1)
    pieces = find_first_gradients(label_smoothing=0.1, grad_accum=grad_accum)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_pieces_are_as_many_as_asked() -> None:
    trainer = make_trainer(epochs=1, grad_accum=4)
    sizes: list[int] = []

    def keep_size(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if module.training:
            sizes.append(len(inputs[0]))

    trainer.detector.register_forward_pre_hook(keep_size)
    fit(trainer)
    assert sizes == [4] * 24


def test_no_gradient_is_longer_than_the_clip() -> None:
    trainer = make_trainer(optimizer="sgd", grad_clip=0.001, epochs=1)
    norms: list[float] = []

    def keep_norm(*args: Any) -> None:
        gradients = [p.grad for p in trainer.detector.parameters() if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(gradients)))

    trainer.optimizer.register_step_pre_hook(keep_norm)
    fit(trainer)
    assert len(norms) == 6
    assert max(norms) <= 0.001 * 1.001


def test_a_frozen_body_stands_still_and_then_moves() -> None:
    trainer = make_trainer(freeze_epochs=2, epochs=3)
    seen = [weights_of(trainer)]
    fit(trainer, lambda: seen.append(weights_of(trainer)))
    body, head = slice(0, -2), -2
    for before, after in pairwise(seen[:3]):
        assert_equal(before[body], after[body])
        assert not torch.equal(before[head], after[head])
    assert not torch.equal(seen[2][0], seen[3][0])


def test_the_norms_of_a_frozen_body_stand_still_too() -> None:
    trainer = make_trainer(freeze_epochs=1, epochs=1)
    network = trainer.detector.network
    assert isinstance(network, nn.Sequential)
    network.insert(1, nn.BatchNorm2d(8))
    before = weights_of(trainer)
    fit(trainer)
    assert_equal(before[:-2], weights_of(trainer)[:-2])


def test_the_average_is_what_is_validated_and_kept() -> None:
    trainer = make_trainer(ema_decay=0.9, epochs=3)
    fit(trainer)
    assert trainer.ema is not None
    average = trainer.ema.module.network.state_dict()
    assert not torch.equal(average["0.weight"], weights_of(trainer)[0])
    logit = trainer.predict(trainer.val_images)
    trainer.detector.network.load_state_dict(average)
    images = torch.from_numpy(trainer.val_images.read(np.arange(40)))
    with torch.inference_mode():
        outputs = trainer.detector.eval()(images)
    assert torch.allclose(logit, outputs[:, 1] - outputs[:, 0], atol=1e-5)


def test_a_longer_average_moves_less() -> None:
    moved = {}
    for decay in (0.1, 0.9):
        trainer = make_trainer(ema_decay=decay, epochs=3)
        fit(trainer)
        gap = weights_of(trainer)[0] - trainer.eval_model.network.state_dict()["0.weight"]
        moved[decay] = float(gap.abs().mean())
    assert moved[0.1] < moved[0.9]


# --- networks ------------------------------------------------------------------------------------


def test_channels_last_changes_the_order_of_weights_and_no_output() -> None:
    images = torch.from_numpy(ArrayImages(2, size=32).pixels)
    outputs = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        detector = build_for_training(make_config(channels_last=channels_last)).eval()
        weight = detector.network.get_submodule("3").weight
        assert isinstance(weight, torch.Tensor)
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        outputs.append(detector(images))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


@pytest.mark.parametrize("how", ["resize", "crop"])
def test_a_new_detector_takes_large_jpegs_at_a_smaller_scale_if_it_resizes(how: str) -> None:
    for flip in (False, True):
        made = build_for_training(make_config(fit=how, test_time_flip=flip)).preprocessing
        assert (made.jpeg_scale, made.test_time_flip) == (how == "resize", flip)


def test_drop_path_reaches_the_network_and_leaves_its_weights_alike() -> None:
    plain = build_for_training(make_config(model="test_vit"))
    dropping = build_for_training(make_config(model="test_vit", drop_path=0.5))
    names, plain_names = (
        {type(module).__name__ for module in detector.network.modules()}
        for detector in (dropping, plain)
    )
    assert names - plain_names == {"DropPath"}
    assert plain.network.state_dict().keys() == dropping.network.state_dict().keys()


def test_drop_path_is_refused_where_there_are_no_paths() -> None:
    with pytest.raises(ValueError, match="--drop-path: cnn has no paths"):
        build_for_training(make_config(drop_path=0.5))
    with pytest.raises(ValueError, match=r"--drop-path 0.5: .*drop_path_rate"):
        build_for_training(make_config(model="vgg11", drop_path=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "--momentum is 1.0"),
        ({"grad_clip": 0.0}, "--grad-clip is 0.0; give a number above 0"),
        ({"grad_accum": 0}, "--grad-accum is 0"),
        ({"ema_decay": 1.0}, "--ema-decay is 1.0; give a number above 0, below 1"),
        ({"layer_decay": 0.0}, "--layer-decay is 0.0"),
        ({"mixup": -1.0}, "--mixup is -1"),
        ({"cutmix": float("nan")}, "--cutmix is nan"),
        ({"drop_path": 1.0}, "--drop-path is 1.0"),
        ({"freeze_epochs": 11}, "--freeze-epochs is 11 of 10 epochs"),
        ({"patience": 0}, "--patience is 0"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**settings)
