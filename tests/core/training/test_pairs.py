"""Pairs: an image and its twin in one batch, on one rank, and augmented alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from cifake_ray.config import POLICIES, Augmentation, TrainConfig
from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.training.batches import Batch, Batches
from cifake_ray.core.training.native_crops import NativeImage
from cifake_ray.core.training.pairs import count_coupled, draw_couples

SIZE = 16
PREPROCESSING = Preprocessing(
    image_size=SIZE, fit="crops", num_crops=2, mean=(0.5,) * 3, std=(0.5,) * 3
)
# Images 0 to 9 are REAL; 0 to 5 have a twin, 0 and 1 two; 18 to 22 are FAKE and nobody's twin.
TWIN_OF = np.array([-1] * 10 + [0, 1, 2, 3, 4, 5, 0, 1] + [-1] * 5)


class TwinImages:
    """Images of noise of 40 x 50 pixels; a twin has the pixels of its image, or their negative."""

    def __init__(self, *, negative: bool) -> None:
        rng = np.random.default_rng(0)
        owner = np.where(TWIN_OF >= 0, TWIN_OF, np.arange(len(TWIN_OF)))
        self.pixels = rng.integers(0, 256, (len(TWIN_OF), 40, 50, 3), dtype=np.uint8)[owner]
        if negative:
            self.pixels[TWIN_OF >= 0] = 255 - self.pixels[TWIN_OF >= 0]
        self.labels = (np.arange(len(TWIN_OF)) >= 10).astype(np.int64)
        self.twin_of, self.preprocessing = TWIN_OF, PREPROCESSING
        self.reads: list[np.ndarray] = []

    def order_epoch(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self.labels))

    def read(self, indices: np.ndarray) -> np.ndarray:
        raise AssertionError("crops are cut")

    def map_native(
        self, indices: np.ndarray, cut: Callable[[NativeImage, int], np.ndarray]
    ) -> list[np.ndarray]:
        self.reads.append(indices)
        nothing = np.empty((0, SIZE, SIZE, 3), np.uint8)
        return [cut(NativeImage(self.pixels[i][None], nothing), n) for n, i in enumerate(indices)]


def make_batches(
    policy: Augmentation,
    rank: int = 0,
    num_ranks: int = 1,
    *,
    negative: bool = False,
    **options: int,
) -> tuple[Batches, TwinImages]:
    config = TrainConfig(
        shards="s",
        run="r",
        fit="crops",
        twins="t",
        batch_size=6,
        **options,  # type: ignore[arg-type]
    )
    images = TwinImages(negative=negative)
    return Batches(images, config, policy, "cpu", rank, num_ranks), images


def find_pairs(indices: np.ndarray) -> Iterator[int]:
    """Yield the places of images that are followed by their twin."""
    for place in range(0, len(indices), 2):
        if TWIN_OF[indices[place + 1]] == indices[place]:
            yield place


def test_each_epoch_has_every_image_once_with_one_twin() -> None:
    rng, seen = np.random.default_rng(0), Counter[int]()
    left_out = set[int]()
    for _ in range(40):
        drawn = draw_couples(rng.permutation(len(TWIN_OF)), TWIN_OF, rng)
        assert len(drawn) == count_coupled(TWIN_OF) == 20
        assert len(set(drawn.tolist())) == 20
        assert {int(drawn[place]) for place in find_pairs(drawn)} == set(range(6))
        twins = [int(i) for i in drawn if TWIN_OF[i] >= 0]
        assert sorted(TWIN_OF[twins].tolist()) == list(range(6))
        seen.update(drawn.tolist())
        left_out |= {i for i in range(len(TWIN_OF)) if i not in drawn and TWIN_OF[i] < 0}
    assert min(seen[10], seen[16]) > 8, "each of an image's twins has its turn"
    assert set(seen) == set(range(len(TWIN_OF)))
    assert len(left_out) > 5, "the odd one is another each time"


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_rank_has_both_of_a_pair(num_ranks: int) -> None:
    num_pairs = 0
    for rank in range(num_ranks):
        batches, images = make_batches(POLICIES["none"], rank, num_ranks)
        list(batches.draw(0, 0))
        for indices in images.reads:
            pairs = list(find_pairs(indices))
            num_pairs += len(pairs)
            singles = np.delete(indices, [n for place in pairs for n in (place, place + 1)])
            assert (TWIN_OF[singles] < 0).all()
    whole, all_images = make_batches(POLICIES["none"])
    list(whole.draw(0, 0))
    assert num_pairs == sum(len(list(find_pairs(indices))) for indices in all_images.reads) > 0


@pytest.mark.parametrize("name", POLICIES)
def test_a_twin_of_the_same_pixels_is_augmented_to_the_same_pixels(name: str) -> None:
    """Crop, mirror image, shrinking, blur, noise, and the qualities of JPEG and WebP."""
    batches, images = make_batches(POLICIES[name], crops_per_image=3)
    num_pairs = 0
    for batch in batches.draw(1, 0):
        indices = images.reads[-1]
        for place in find_pairs(indices):
            num_pairs += 1
            assert torch.equal(batch.images[place], batch.images[place + 1])
            assert batch.labels[place : place + 2].tolist() == [0, 1]
    assert num_pairs > 12


def test_a_twin_is_cut_and_mirrored_as_its_image() -> None:
    batches, images = make_batches(POLICIES["flip"], negative=True)
    for batch in batches.draw(0, 0):
        for place in find_pairs(images.reads[-1]):
            assert torch.equal(batch.images[place + 1], 255 - batch.images[place])


def take(batches: Batches, start: int = 0) -> list[Batch]:
    return list(batches.draw(2, start))


@pytest.mark.parametrize("mixup", [0, 1])
def test_crops_follow_from_seed_epoch_step_and_place_alone(mixup: int) -> None:
    """Two ranks see what one sees, and a run that goes on within an epoch what it would have."""
    options = {"crops_per_image": 2, "consistency": 1, "mixup": mixup}
    whole = take(make_batches(POLICIES["wild"], **options)[0])
    assert len(whole) == 40 // 6
    resumed = take(make_batches(POLICIES["wild"], **options)[0], start=4)
    for one, other in zip(whole[4:], resumed, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    ranks = [take(make_batches(POLICIES["wild"], rank, 2, **options)[0]) for rank in (0, 1)]
    couples = np.arange(6).reshape(3, 2)
    for step, one in enumerate(whole):
        for rank in (0, 1):
            places = couples[rank::2].ravel()
            share = ranks[rank][step]
            assert torch.equal(share.images, one.images[places])
            assert one.clean is not None
            assert share.clean is not None
            assert torch.equal(share.clean, one.clean[places])
    assert len({batch.images.numpy().tobytes() for batch in whole}) == len(whole)


def test_the_clean_view_is_the_same_crop_before_it_is_degraded() -> None:
    noisy = Augmentation(flip=0.5, noise=4.0, noise_share=1.0)
    plain = take(make_batches(POLICIES["flip"])[0])
    for batch, expected in zip(take(make_batches(noisy, consistency=1)[0]), plain, strict=True):
        assert batch.clean is not None
        assert torch.equal(batch.clean, expected.images)
        difference = (batch.images.int() - batch.clean.int()).abs()
        assert 0 < difference.max() <= 25
    assert plain[0].clean is None
