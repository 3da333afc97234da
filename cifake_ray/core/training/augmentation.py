"""Augment training images by a policy and by random numbers drawn beforehand.

The numbers are drawn for a whole global batch and then dealt to the ranks with the images, so they
depend on the seed, the epoch, the step and the position in the batch alone. One worker or two, and
a run that was killed and resumed, see the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch.nn import functional as F

from cifake_ray.config import POLICIES, Augmentation
from cifake_ray.core.imaging.perturbation import reencode
from cifake_ray.core.training.overlays import draw_overlay

DRAWN_FIRST = (
    *("rotation", "shift_x", "shift_y", "crop", "crop_x", "crop_y"),
    *("brightness", "contrast", "saturation", "rescale_share", "rescale", "blur_share", "blur"),
    *("noise_share", "noise", "jpeg_share", "jpeg", "move_share"),
)
# By a generator of their own, so that the numbers of earlier versions stay the same. `window`,
# `top` and `left` are where a native crop is cut.
DRAWN_LATER = (
    *("webp_share", "webp", "downscale_share", "downscale", "window", "top", "left"),
    *("redraw_share", "redraw", "redraw_strength", "overlay_share"),
)
DRAWN = DRAWN_FIRST + DRAWN_LATER


@dataclass(frozen=True)
class Draws:
    """The random numbers of each of B images."""

    mirrored: np.ndarray  # bool[B]
    uniform: dict[str, np.ndarray]  # float64[B] in [0, 1), by the names in DRAWN
    noise_seed: np.ndarray  # int64[B]

    def take(self, places: np.ndarray) -> Draws:
        """Return those of some images: `places` int64[N] in the batch."""
        return Draws(
            self.mirrored[places],
            {name: values[places] for name, values in self.uniform.items()},
            self.noise_seed[places],
        )


def draw_augmentation(rng: np.random.Generator, mirrored: np.ndarray) -> Draws:
    """Draw for a global batch; `mirrored` bool[B] has been drawn with the order of the epoch.

    Every number is drawn whatever the policy, so that another step leaves the others as they are.
    """
    count = len(mirrored)
    table = rng.random((len(DRAWN_FIRST), count))
    seeds = rng.integers(2**62, size=count)
    later = rng.spawn(1)[0].random((len(DRAWN_LATER), count))  # leaves `rng` where it is
    return Draws(mirrored, dict(zip(DRAWN, [*table, *later], strict=True)), seeds)


def mirror(images: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Mirror those of uint8[B, S, S, 3] that were drawn for it."""
    if not policy.flip:
        return images
    mirrored = torch.from_numpy(draws.mirrored).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def augment(images: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Mirror and degrade uint8[B, S, S, 3] on its device."""
    return degrade(mirror(images, policy, draws), policy, draws)


def degrade(images: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Do all that a policy does to images of the input's size but mirroring them."""
    if policy in (POLICIES["none"], POLICIES["flip"]):
        return images
    values = images.permute(0, 3, 1, 2).float()  # [B, 3, S, S], 0..255
    if policy.moves:
        chosen = _choose(draws, "move", policy.move_share)
        values[chosen] = _move(values[chosen], policy, draws.take(chosen))
    values = _change_colours(values, policy, draws)
    values = _redraw(values, policy, draws)
    values = _overlay(values, policy, draws)
    values = _rescale(values, policy, draws)
    values = _blur(values, policy, draws)
    values = _add_noise(values, policy, draws)
    pixels = values.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)
    return _compress(pixels.contiguous(), policy, draws)


def _both_ways(uniform: np.ndarray, reach: float) -> np.ndarray:
    """Map [0, 1) to [-reach, reach)."""
    spread: np.ndarray = (2 * uniform - 1) * reach
    return spread


def _to_column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Map float64[B] to float32[B, 1, 1, 1] on the device of `like`."""
    return torch.from_numpy(values.astype(np.float32)).to(like.device)[:, None, None, None]


def _move(values: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Rotate, shift and crop in one bilinear sampling; border pixels are repeated outside.

    Shifts are whole pixels, as in torchvision's RandomAffine: on their own they blur nothing. The
    border is that of Keras' ImageDataGenerator, fill_mode="nearest".
    """
    u, (count, _, size, _) = draws.uniform, values.shape
    angle = np.deg2rad(_both_ways(u["rotation"], policy.rotation))
    side = np.sqrt(1 - u["crop"] * policy.crop)  # of what is kept; 1 is the whole image
    offset_x, offset_y = (
        _both_ways(u[f"crop_{axis}"], 1.0) * (1 - side)
        + 2 / size * np.round(_both_ways(u[f"shift_{axis}"], policy.shift * size))
        for axis in "xy"
    )
    # Written out, not affine_grid's matrix product: that rounds by the size of the batch, which
    # is another one on two ranks.
    axis = (torch.arange(size, device=values.device) * 2 + 1) / size - 1
    x, y = axis[None, None, :, None], axis[None, :, None, None]
    cos, sin = (_to_column(f(angle) * side, values) for f in (np.cos, np.sin))
    grid_x = x * cos - y * sin + _to_column(offset_x, values)
    grid_y = x * sin + y * cos + _to_column(offset_y, values)
    grid = torch.cat([grid_x, grid_y], dim=3).expand(count, size, size, 2)
    return F.grid_sample(values, grid, padding_mode="border", align_corners=False)


def _change_colours(values: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Change brightness, contrast and saturation as torchvision's ColorJitter does."""
    for name in ("brightness", "contrast", "saturation"):
        if reach := getattr(policy, name):
            factor = _to_column(1 + _both_ways(draws.uniform[name], reach), values)
            base = _find_base(name, values)
            values = (factor * values + (1 - factor) * base).clamp(0, 255)
    return values


def _find_base(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return what is blended in: black, the mean grey, or each pixel's grey (ITU-R 601)."""
    if name == "brightness":
        return torch.zeros((), device=values.device)
    weights = torch.tensor([0.2989, 0.587, 0.114], device=values.device)[None, :, None, None]
    grey = (values * weights).sum(dim=1, keepdim=True)
    if name == "saturation":
        return grey
    # Whole numbers add up alike in any order, so for batches of any size.
    return grey.round().double().mean(dim=(1, 2, 3), keepdim=True).float()


def _choose(draws: Draws, step: str, share: float) -> np.ndarray:
    """Return int64[N], the images that a step changes."""
    return np.flatnonzero(draws.uniform[f"{step}_share"] < share)


def _redraw(values: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Redraw images: a third as pencil drawings, a third in flat colours, a third with both."""
    for i in _choose(draws, "redraw", policy.redraw_share):
        kind, strength = (
            int(3 * draws.uniform["redraw"][i]),
            float(draws.uniform["redraw_strength"][i]),
        )
        redrawn = redraw(_to_pixels(values[i]), strength, lines=kind != 1, colours=kind != 0)
        values[i] = torch.tensor(redrawn, device=values.device).permute(2, 0, 1)
    return values


def _overlay(values: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Draw text or a logo over images."""
    for i in _choose(draws, "overlay", policy.overlay_share):
        drawn = draw_overlay(_to_pixels(values[i]), int(draws.noise_seed[i]))
        values[i] = torch.tensor(drawn, device=values.device).permute(2, 0, 1)
    return values


def _to_pixels(values: torch.Tensor) -> np.ndarray:
    """Map float32[3, S, S] to uint8[S, S, 3]."""
    pixels = values.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    return pixels.contiguous().cpu().numpy()


def redraw(pixels: np.ndarray, strength: float, *, lines: bool, colours: bool) -> np.ndarray:
    """Return uint8[S, S, 3] redrawn with pencil lines, in flat colours, or in both.

    Details go first, by a median filter. Lines are where a pixel is darker than those around it
    ("colour dodge"), and nearly black or white with strength 1; flat colours are a palette of 24
    to 4 by median cut.
    """
    image = Image.fromarray(pixels).filter(ImageFilter.MedianFilter(5))
    flat = Image.new("RGB", image.size, "white")
    if colours:
        vivid = ImageEnhance.Color(image).enhance(1.5)
        flat = vivid.quantize(24 - round(20 * strength), dither=Image.Dither.NONE).convert("RGB")
    if not lines:
        return np.asarray(flat)
    grey, around = (
        np.asarray(shades, np.float32) + 1
        for shades in (image.convert("L"), image.convert("L").filter(ImageFilter.GaussianBlur(3)))
    )
    black, white = 0.4 + 0.3 * strength, 0.9 - 0.1 * strength  # shares of what is around
    ink = np.clip((grey / around - black) / (white - black), 0, 1)
    drawn: np.ndarray = (np.asarray(flat) * ink[:, :, None]).round().astype(np.uint8)
    return drawn


def _rescale(values: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Shrink with antialias and enlarge again, as happens to copies on web pages."""
    size = values.shape[-1]
    for i in _choose(draws, "rescale", policy.rescale_share):
        smaller = max(1, round(size * (1 - policy.rescale * float(draws.uniform["rescale"][i]))))
        small = F.interpolate(values[i : i + 1], smaller, mode="bilinear", antialias=True)
        values[i : i + 1] = F.interpolate(small, size, mode="bilinear", antialias=True)
    return values


def _blur(values: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Blur each image with its own deviation; the kernel ends at three of the largest."""
    chosen = _choose(draws, "blur", policy.blur_share)
    if not len(chosen):
        return values
    sigma = np.maximum(draws.uniform["blur"][chosen] * policy.blur, 1e-3)
    radius = int(np.ceil(3 * policy.blur))
    offsets = np.arange(-radius, radius + 1)
    kernels = np.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernels /= kernels.sum(axis=1, keepdims=True)
    struck, size = values[chosen], values.shape[-1]
    for axis in (2, 3):
        pad = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = F.pad(struck, pad, mode="replicate")
        struck = torch.zeros_like(struck)
        for k in range(len(offsets)):
            struck += _to_column(kernels[:, k], values) * padded.narrow(axis, k, size)
    values[chosen] = struck
    return values


def _add_noise(values: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Add Gaussian noise, drawn on the CPU so that a GPU trains on the same pixels."""
    for i in _choose(draws, "noise", policy.noise_share):
        rng = torch.Generator().manual_seed(int(draws.noise_seed[i]))
        noise = torch.randn(values.shape[1:], generator=rng).to(values.device)
        values[i] += noise * (policy.noise * float(draws.uniform["noise"][i]))
    return values


def _compress(pixels: torch.Tensor, policy: Augmentation, draws: Draws) -> torch.Tensor:
    """Encode and decode: JPEG by libjpeg-turbo at most files' half colour resolution, then WebP."""
    for i in _choose(draws, "jpeg", policy.jpeg_share):
        quality = _draw_quality(policy, policy.jpeg_quality, draws.uniform["jpeg"][i])
        rows = np.ascontiguousarray(pixels[i].cpu().numpy())
        data = simplejpeg.encode_jpeg(rows, quality, colorsubsampling="420")
        pixels[i] = torch.from_numpy(simplejpeg.decode_jpeg(data)).to(pixels.device)
    for i in _choose(draws, "webp", policy.webp_share):
        quality = _draw_quality(policy, policy.webp_quality, draws.uniform["webp"][i])
        image = Image.fromarray(pixels[i].cpu().numpy())
        decoded = np.array(reencode(image, "webp", quality))
        pixels[i] = torch.from_numpy(decoded).to(pixels.device)
    return pixels


def _draw_quality(policy: Augmentation, lowest: int, uniform: float) -> int:
    return lowest + int(uniform * (policy.best_quality + 1 - lowest))
