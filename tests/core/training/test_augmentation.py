"""Augmentation: every step does what it says, to the images it should, and nothing else."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from cifake_ray.config import POLICIES, Augmentation, parse_augmentation
from cifake_ray.core.training import augmentation
from cifake_ray.core.training.augmentation import DRAWN, Draws, augment, draw_augmentation

SIZE = 16


def make_images(count: int = 12, size: int = SIZE) -> torch.Tensor:
    """Smooth coloured ramps with noise on top, so that every step changes something."""
    rng = np.random.default_rng(4)
    ramp = np.linspace(40, 200, size)[None, :, None, None] + np.linspace(-30, 30, size)[:, None]
    noise = rng.integers(-20, 20, (count, size, size, 3))
    tint = rng.integers(-20, 20, (count, 1, 1, 3))
    return torch.from_numpy((ramp + noise + tint).clip(0, 255).astype(np.uint8))


def make_draws(count: int = 12, seed: int = 1) -> Draws:
    return draw_augmentation(np.random.default_rng(seed), np.arange(count) % 2 == 0)


def set_draws(draws: Draws, **values: float) -> Draws:
    """The same value for every image."""
    uniform = {n: np.full(len(draws.mirrored), values.get(n, 0.5)) for n in DRAWN}
    return replace(draws, uniform=uniform)


STEPS: dict[str, dict[str, Any]] = {
    "flip": {"flip": 0.5},
    "rotation": {"rotation": 20},
    "shift": {"shift": 0.2},
    "crop": {"crop": 0.5},
    "move": {"rotation": 20, "move_share": 0.5},
    "brightness": {"brightness": 0.5},
    "contrast": {"contrast": 0.5},
    "saturation": {"saturation": 0.9},
    "redraw": {"redraw_share": 0.5},
    "overlay": {"overlay_share": 0.5},
    "rescale": {"rescale": 0.7, "rescale_share": 0.5},
    "blur": {"blur": 2.0, "blur_share": 0.5},
    "noise": {"noise": 20.0, "noise_share": 0.5},
    "jpeg": {"jpeg_quality": 10, "jpeg_share": 0.5, "best_quality": 90},
    "webp": {"webp_quality": 10, "webp_share": 0.5},
}
CUT = {"downscale", "downscale_share"}  # before images have the size of the input


def test_every_field_belongs_to_a_step() -> None:
    assert {name for values in STEPS.values() for name in values} | CUT == {
        field.name for field in fields(Augmentation)
    }


@pytest.mark.parametrize("step", STEPS)
def test_every_step_changes_pixels_and_not_its_input(step: str) -> None:
    images = make_images()
    before = images.clone()
    changed = augment(images, Augmentation(**STEPS[step]), make_draws())
    assert torch.equal(images, before)
    assert changed.dtype == torch.uint8
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)


@pytest.mark.parametrize("step", [s for s in STEPS if f"{s}_share" in STEPS[s]])
def test_a_share_strikes_the_images_it_was_drawn_for_and_no_others(step: str) -> None:
    images, drawn = make_images(), make_draws()
    shares = {f"{step}_share": drawn.uniform[f"{step}_share"]}
    draws = replace(drawn, uniform=set_draws(drawn, rotation=0.9).uniform | shares)
    struck = augment(images, Augmentation(**STEPS[step]), draws)
    expected = draws.uniform[f"{step}_share"] < 0.5
    assert 0 < expected.sum() < len(expected)
    assert (struck != images).flatten(1).any(dim=1).tolist() == expected.tolist()


def test_a_policy_of_nothing_gives_the_very_pixels() -> None:
    images = make_images()
    assert torch.equal(augment(images, POLICIES["none"], make_draws()), images)


def test_a_flip_mirrors_the_columns_of_the_images_it_was_drawn_for() -> None:
    images, draws = make_images(), make_draws()
    flipped = augment(images, POLICIES["flip"], draws)
    assert torch.equal(flipped[::2], images[::2].flip(2))
    assert torch.equal(flipped[1::2], images[1::2])


@pytest.mark.parametrize("name", POLICIES)
def test_two_ranks_see_the_pixels_that_one_sees(name: str) -> None:
    images, draws = make_images(13), make_draws(13)
    whole = augment(images, POLICIES[name], draws)
    for rank in (0, 1):
        share = augment(images[rank::2], POLICIES[name], draws.take(np.arange(rank, 13, 2)))
        assert torch.equal(share, whole[rank::2])


@pytest.mark.parametrize("step", STEPS)
def test_a_step_alone_is_the_same_on_two_ranks(step: str) -> None:
    images, draws, policy = make_images(13, 32), make_draws(13), Augmentation(**STEPS[step])
    whole = augment(images, policy, draws)
    for rank in (0, 1):
        assert torch.equal(
            augment(images[rank::2], policy, draws.take(np.arange(rank, 13, 2))), whole[rank::2]
        )


def test_the_same_draws_give_the_same_pixels_whatever_the_global_generators_say() -> None:
    images = make_images()
    torch.manual_seed(1)
    first = augment(images, POLICIES["strong"], make_draws())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(augment(images, POLICIES["strong"], make_draws()), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(images, POLICIES["strong"], make_draws(seed=2)), first)


def test_a_quarter_turn_is_a_quarter_turn() -> None:
    images = make_images()
    draws = set_draws(make_draws(), rotation=0.75)  # half of the reach
    turned = augment(images, Augmentation(rotation=180), draws)
    assert torch.equal(turned, torch.rot90(images, 1, (1, 2)))


def test_a_shift_moves_whole_pixels_and_repeats_the_border() -> None:
    images = make_images()
    draws = set_draws(make_draws(), shift_x=1.0)
    shifted = augment(images, Augmentation(shift=0.25), draws)
    assert torch.equal(shifted[:, :, : SIZE - 4], images[:, :, 4:])
    assert torch.equal(shifted[:, :, SIZE - 4 :], images[:, :, -1:].expand(-1, -1, 4, -1))


@pytest.mark.parametrize("size", [16, 31, 32, 224])
def test_a_shift_of_any_draw_blurs_nothing(size: int) -> None:
    images, draws = make_images(size=size), make_draws()
    shifted = augment(images, Augmentation(shift=0.1), draws)
    for i, image in enumerate(images):
        reach_x, reach_y = (2 * draws.uniform[f"shift_{axis}"][i] - 1 for axis in "xy")
        rows, columns = (
            (torch.arange(size) + round(reach * 0.1 * size)).clamp(0, size - 1)
            for reach in (reach_y, reach_x)
        )
        assert torch.equal(shifted[i], image[rows][:, columns])


def test_a_crop_stays_inside_the_image() -> None:
    """Of an image with one bright border, a crop of its middle shows none of it."""
    images = torch.full((3, SIZE, SIZE, 3), 50, dtype=torch.uint8)
    images[:, 0] = images[:, -1] = images[:, :, 0] = images[:, :, -1] = 255
    draws = set_draws(make_draws(3), crop=1.0)
    assert (augment(images, Augmentation(crop=0.75), draws) == 50).all()
    cornered = set_draws(make_draws(3), crop=1.0, crop_x=0.0, crop_y=0.0)
    shown = augment(images, Augmentation(crop=0.75), cornered)
    assert (shown[:, 0, :] == 255).all()
    assert (shown[:, -1, 4:] == 50).all()


def test_colours_are_blended_as_torchvision_does() -> None:
    from torchvision.transforms.v2 import functional as reference

    images = make_images()
    adjust = {
        "brightness": reference.adjust_brightness,
        "contrast": reference.adjust_contrast,
        "saturation": reference.adjust_saturation,
    }
    for name, function in adjust.items():
        draws = set_draws(make_draws(), **{name: 0.8})  # factor 1.3
        ours = augment(images, Augmentation(**{name: 0.5}), draws)
        theirs = function(images.permute(0, 3, 1, 2), 1.3).permute(0, 2, 3, 1)
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_the_blur_is_that_of_torchvision() -> None:
    from torchvision.transforms.v2.functional import gaussian_blur

    images = make_images(4, 32)
    draws = set_draws(make_draws(4), blur=0.5, blur_share=0.0)
    ours = augment(images, Augmentation(blur=2.0, blur_share=1.0), draws)
    theirs = gaussian_blur(images.permute(0, 3, 1, 2), [13, 13], [1.0, 1.0]).permute(0, 2, 3, 1)
    inner = slice(6, -6)  # the borders are continued differently
    difference = ours[:, inner, inner].int() - theirs[:, inner, inner].int()
    assert difference.abs().max() <= 1


def test_noise_has_the_deviation_that_was_drawn() -> None:
    images = torch.full((40, SIZE, SIZE, 3), 128, dtype=torch.uint8)
    draws = set_draws(make_draws(40), noise=0.5, noise_share=0.0)
    noisy = augment(images, Augmentation(noise=20.0, noise_share=1.0), draws).float()
    assert noisy.mean().item() == pytest.approx(128, abs=0.5)
    assert noisy.std().item() == pytest.approx(10, rel=0.05)
    assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize("step", ["jpeg", "webp"])
def test_a_lower_quality_loses_more(step: str) -> None:
    images = make_images()
    loss = []
    for drawn in (0.999, 0.5, 0.0):  # qualities 100, 55 and 10
        draws = set_draws(make_draws(), **{step: drawn, f"{step}_share": 0.0})
        policy = Augmentation(**{f"{step}_quality": 10, f"{step}_share": 1.0})
        struck = augment(images, policy, draws)
        loss.append((struck.float() - images.float()).abs().mean().item())
    assert 0 < loss[0] < loss[1] < loss[2]


@pytest.mark.parametrize(("step", "module"), [("jpeg", "simplejpeg"), ("webp", None)])
def test_qualities_reach_from_the_lowest_to_the_best(
    step: str, module: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = simplejpeg.encode_jpeg if module else augmentation.reencode

    def record(image: Any, name_or_quality: Any, quality: int = 0, **rest: Any) -> Any:
        seen.append(quality or name_or_quality)
        return encode(image, name_or_quality, *([quality] if quality else []), **rest)

    place: Any = simplejpeg if module else augmentation
    monkeypatch.setattr(place, "encode_jpeg" if module else "reencode", record)
    policy = Augmentation(
        **{f"{step}_quality": 93, f"{step}_share": 1.0, "best_quality": 95}  # type: ignore[arg-type]
    )
    augment(make_images(60, 8), policy, make_draws(60))
    assert set(seen) == {93, 94, 95}
    assert len(seen) == 60


def test_numbers_that_were_drawn_before_others_came_stay_the_same() -> None:
    """So policies of before keep their pixels, and what is drawn behind them its values."""
    mine, plain = np.random.default_rng(3), np.random.default_rng(3)
    draws = draw_augmentation(mine, np.zeros(5, bool))
    table = plain.random((18, 5))
    for name, row in (("rotation", 0), ("jpeg", 16), ("move_share", 17)):
        assert draws.uniform[name].tolist() == table[row].tolist()
    assert draws.noise_seed.tolist() == plain.integers(2**62, size=5).tolist()
    assert mine.random() == plain.random()
    later = [draws.uniform[name].tolist() for name in ("webp", "downscale", "top", "left")]
    assert len({tuple(values) for values in [*later, *table.tolist()]}) == 22


def test_rescaling_takes_detail_away_and_leaves_the_mean() -> None:
    images = make_images()
    draws = set_draws(make_draws(), rescale=1.0, rescale_share=0.0)
    struck = augment(images, Augmentation(rescale=0.5, rescale_share=1.0), draws).float()
    assert struck.std() < images.float().std()
    assert struck.mean().item() == pytest.approx(images.float().mean().item(), abs=1)


def test_one_step_more_leaves_the_draws_of_the_others() -> None:
    """A policy is compared with another by what it adds."""
    images, draws = make_images(), make_draws()
    turned = augment(images, Augmentation(rotation=10), draws)
    both = augment(images, Augmentation(rotation=10, blur=1.0, blur_share=0.5), draws)
    untouched = torch.from_numpy(draws.uniform["blur_share"] >= 0.5)
    assert torch.equal(both[untouched], turned[untouched])


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_survives_its_mapping(name: str) -> None:
    assert parse_augmentation(POLICIES[name].to_dict()) == POLICIES[name]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flips": 0.5}, "no step flips; it has flip, rotation"),
        ({3: 0.5}, "no step 3"),
        ({"flip": 1.5}, "flip is 1.5; give 0 to 1"),
        ({"flip": True}, "flip is True"),
        ({"flip": "half"}, "flip is half"),
        ({"rotation": -1}, "rotation is -1; give 0 to 180"),
        ({"blur": float("nan")}, "blur is nan"),
        ({"blur": 1.0}, "give blur and blur_share, or neither"),
        ({"noise_share": 0.5}, "give noise and noise_share, or neither"),
        ({"jpeg_quality": 50}, "give jpeg_quality and jpeg_share, or neither"),
        ({"jpeg_quality": 0, "jpeg_share": 0.5}, "jpeg_quality is 0; give 1 to 100"),
        ({"webp_share": 0.5}, "give webp_quality and webp_share, or neither"),
        ({"downscale": 0.5}, "give downscale and downscale_share, or neither"),
        (
            {"webp_quality": 96, "webp_share": 1, "best_quality": 95},
            "webp_quality is above best_quality",
        ),
        ({"jpeg_quality": 50.5, "jpeg_share": 0.5}, "jpeg_quality is 50.5; give 1 to 100"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_augmentation(values)


def test_lines_are_black_on_white_where_the_image_is_darker_than_around() -> None:
    pixels = np.full((32, 32, 3), (200, 120, 90), np.uint8)
    pixels[14:18] = 20
    drawn = augmentation.redraw(pixels, 0.5, lines=True, colours=False)
    assert (drawn[15] == 0).all()
    assert (drawn[:8] == 255).all()


@pytest.mark.parametrize(("strength", "most"), [(0.0, 24), (0.5, 14), (1.0, 4)])
def test_flat_colours_are_few(strength: float, most: int) -> None:
    pixels = make_images(1, 64)[0].numpy()
    flat = augmentation.redraw(pixels, strength, lines=False, colours=True)
    assert 2 <= len(np.unique(flat.reshape(-1, 3), axis=0)) <= most


def test_lines_and_flat_colours_are_drawn_over_each_other() -> None:
    pixels = make_images(1, 64)[0].numpy()
    lines, flat, both = (
        augmentation.redraw(pixels, 0.5, lines=lines, colours=colours).astype(float)
        for lines, colours in ((True, False), (False, True), (True, True))
    )
    assert np.abs(both - lines * flat / 255).max() <= 1
