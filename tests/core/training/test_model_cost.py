"""What `models` says of an architecture: counts that can be done by hand, and rates."""

from __future__ import annotations

import pytest
import torch

from cifake_ray.core.models.detector import build_detector, find_own_size
from cifake_ray.core.training.device_limits import (
    BATCH_MACS,
    choose_batch_size,
    choose_eval_batch_size,
)
from cifake_ray.core.training.model_cost import (
    LISTED_MODELS,
    MAX_BATCH,
    count_cost,
    list_models,
    measure_speed,
)


def test_the_baseline_costs_what_a_pencil_says() -> None:
    cost = count_cost("cnn")
    convolutions = 30 * 30 * 80 * 27 + 13 * 13 * 40 * 720 + 4 * 4 * 20 * 360
    assert cost.macs == convolutions + 80 * 10 + 10 * 2
    assert cost.num_parameters == 39_132
    assert cost.image_size == 32


def test_attention_is_counted_as_well_as_layers() -> None:
    tokens, width = 1 + (32 // 4) ** 2, 192
    patches = (tokens - 1) * 4 * 4 * 3 * width
    layers = tokens * (4 + 8) * width * width  # q, k, v, out; two of four times the width
    attention = 2 * tokens * tokens * width
    expected = patches + 12 * (layers + attention) + 2 * width
    assert count_cost("small_vit_tiny").macs == expected


def test_convolutions_cost_four_times_as_much_at_twice_the_size() -> None:
    head = 512 * 2
    small, large = (count_cost("resnet18", size) for size in (64, 128))
    assert large.macs - head == 4 * (small.macs - head)
    assert large.num_parameters == small.num_parameters
    assert (small.image_size, large.image_size) == (64, 128)


def test_a_network_that_passes_its_parameters_around_is_counted() -> None:
    assert count_cost("cait_xxs24_224").macs > 1e9  # its class token goes from layer to layer


def test_counting_draws_no_weights() -> None:
    before = torch.get_rng_state()
    count_cost("small_resnet18")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_parameters_are_those_of_the_network_that_is_trained() -> None:
    for name in ("cnn", "test_vit", "test_resnet"):
        assert count_cost(name).num_parameters == build_detector(name).num_parameters


def test_without_a_pattern_the_zoo_is_listed_each_with_its_results() -> None:
    results = [{"model": "resnet50", "epochs": n} for n in (1, 2)] + [{"model": "other"}]
    rows = list_models(None, results)
    assert tuple(row["model"] for row in rows) == LISTED_MODELS
    assert [row["problem"] for row in rows] == [None] * len(LISTED_MODELS)
    assert all(row["macs"] > 1e6 and row["num_parameters"] > 1e4 for row in rows)
    assert [row["image_size"] for row in rows] == [find_own_size(name) for name in LISTED_MODELS]
    assert {row["model"]: row["results"] for row in rows if row["results"]} == {
        "resnet50": results[:2]
    }
    assert all(row["speed"] is None for row in rows)


def test_a_long_list_has_names_and_sizes_only() -> None:
    rows = list_models("*resnet*")
    assert {"small_resnet18", "resnet18"} < {row["model"] for row in rows}
    assert {row["macs"] for row in rows} == {None}
    assert {row["model"]: row["image_size"] for row in rows}["small_resnet18"] == 32
    for flag, options in (("--measure", {"measure": True}), ("--image-size", {"image_size": 64})):
        with pytest.raises(ValueError, match=rf"{flag}: \d+ architectures match, .* narrower"):
            list_models("*resnet*", **options)  # type: ignore[arg-type]


def test_what_cannot_be_built_at_a_size_is_a_row_that_says_why() -> None:
    row, *others = list_models("cn[n]", image_size=48)
    assert others == []
    assert row["problem"] == "--image-size 48: cnn takes 32 only; leave it out"
    assert (row["image_size"], row["macs"]) == (48, None)


def test_nothing_that_matches_is_refused() -> None:
    with pytest.raises(ValueError, match="no architecture matches 'nothing-of-the-kind'"):
        list_models("nothing-of-the-kind")


@pytest.mark.parametrize("device", BATCH_MACS)
def test_large_networks_go_in_small_batches(device: str) -> None:
    assert choose_batch_size(1, device, 128) == 128
    assert choose_batch_size(10**13, device, 128) == 2  # one image is too few for a batch norm
    macs = int(BATCH_MACS[device]) // 20
    assert choose_batch_size(macs, device, 128) == 16


@pytest.mark.parametrize(("name", "size", "most"), [("cnn", 32, 256), ("resnet18", 512, 8)])
def test_what_is_validated_or_scored_at_once_follows_from_the_network(
    name: str, size: int, most: int
) -> None:
    """512 images of 512 pixels would take resnet18 18 GB."""
    detector = build_detector(name, image_size=size)
    chosen = choose_eval_batch_size(detector.network, size, "cpu")
    assert most / 4 <= chosen <= most


def test_speed_is_measured_and_stated_with_its_batch_and_threads() -> None:
    said: list[str] = []
    (row,) = list_models("cnn", measure=True, log=said.append)
    speed = row["speed"]
    assert [line for line in said if not line.endswith("...")] == ["models: measuring cnn, 1 of 1"]
    assert speed["batch_size"] == MAX_BATCH
    assert speed["num_threads"] == torch.get_num_threads()
    # A step of training is a forward pass, which is what scoring is, and twice as much again.
    assert speed["score_images_per_s"] > speed["train_images_per_s"] > 0


def test_speed_is_measured_at_the_size_that_is_asked_for() -> None:
    with pytest.raises(ValueError, match="--image-size 48: cnn takes 32 only"):
        measure_speed("cnn", 48)
