"""Offer the verbs as functions, and a detector for single images, to notebooks and other programs.

Each function takes the options of its command as keywords (the fields of
`ScoreConfig` and so on), runs the same code, and resumes when it is called again. It raises the
errors of `cifake_ray.errors` and writes progress to stderr.

>>> from cifake_ray import convert, evaluate, load_detector, score, train
>>> convert(src="images", out="shards").done
60
>>> summary = train(shards="shards", run="run", epochs=1, batch_size=16, num_workers="0")
>>> summary.epochs, summary.train_images + summary.val_images
(1, 48)
>>> evaluate(shards="shards", bundle="run", out="report").done
6
>>> score(src="images", out="scores", bundle="run").failed
0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from cifake_ray.config import ConvertConfig, EvaluateConfig, ScoreConfig, StoreConfig, TrainConfig
from cifake_ray.errors import ImageError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from cifake_ray.core.models.detector import Detector
    from cifake_ray.stages.batch.summary import BatchSummary
    from cifake_ray.stages.evaluate.driver import EvaluateSummary
    from cifake_ray.stages.train.driver import TrainSummary
    from cifake_ray.storage.bundles.bundle import BundleInfo

    AnyImage = bytes | Image.Image | np.ndarray

P = ParamSpec("P")
R = TypeVar("R")


def _run(config: Any) -> Any:
    from cifake_ray.pipeline import run_verb

    if config.dry_run:
        raise UsageError("dry_run is for the command line, which prints the plan: --dry-run")

    try:
        return run_verb(config, time.monotonic())[0]
    except BaseException:
        from cifake_ray.stages.cluster import leave_cluster

        leave_cluster()
        raise


def _take_options(
    config_class: Callable[P, Any],
) -> Callable[[Callable[[Any], R]], Callable[P, R]]:
    """Return a decorator that replaces a config parameter by the fields of that config."""

    def decorate(run: Callable[[Any], R]) -> Callable[P, R]:
        @wraps(run)
        def verb(*args: P.args, **kwargs: P.kwargs) -> R:
            return run(config_class(*args, **kwargs))

        verb.__signature__ = signature(config_class)  # type: ignore[attr-defined]
        return verb

    return decorate


@_take_options(ConvertConfig)
def convert(config: ConvertConfig) -> BatchSummary:
    """Convert the images of `src` to Parquet shards in `out`, as `cifake-ray convert` does."""
    result: BatchSummary = _run(config)
    return result


@_take_options(TrainConfig)
def train(config: TrainConfig) -> TrainSummary:
    """Train a detector on `shards`, as `cifake-ray train` does; `run`/bundle is the result.

    Without a cluster, and with `num_workers="0"`, training runs in this process, without Ray.
    """
    from cifake_ray.stages.train.driver import TrainSummary

    if config.leave_one_source_out:
        raise UsageError("leave_one_source_out makes many detectors: use `cifake-ray train`")
    summary = _run(config)
    known = TrainSummary.__dataclass_fields__.keys() & summary.keys()  # a run of before has fewer
    return TrainSummary(**{name: summary[name] for name in known})


@_take_options(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> EvaluateSummary:
    """Measure a detector on labelled `shards`, as `cifake-ray evaluate` does.

    `out` gets metrics.json, report.html and the predictions; the summary has the main `metrics`.
    """
    result: EvaluateSummary = _run(config)
    return result


@_take_options(ScoreConfig)
def score(config: ScoreConfig) -> BatchSummary:
    """Score the images of `src` into `out`/scores/*.parquet, as `cifake-ray score` does."""
    result: BatchSummary = _run(config)
    return result


class LoadedDetector:
    """A detector from a bundle, which computes `p_fake` of images as `score` does.

    >>> from PIL import Image
    >>> detector = load_detector("cifake")
    >>> grey = Image.new("RGB", (64, 48), "grey")
    >>> detector.predict([grey, np.asarray(grey)]).shape
    (2,)
    """

    def __init__(
        self, detector: Detector, bundle: BundleInfo, device: str, batch_size: int
    ) -> None:
        self.detector = detector
        self.bundle = bundle
        self.device = device
        self.batch_size = batch_size

    @property
    def threshold(self) -> float:
        """Return the `p_fake` from which `score` calls an image FAKE, 0 to 1."""
        return self.bundle.threshold(None)

    def predict(self, images: Sequence[AnyImage], batch_size: int | None = None) -> np.ndarray:
        """Return `p_fake` of each image: float32[N], 0 to 1.

        An image is encoded bytes, a Pillow image or RGB pixels, uint8[H, W, 3]. By default as many
        images are computed at once as `score` does. When one cannot be used, ImageError, or
        UsageError when it is something else; both name its position.
        """
        from cifake_ray.core.evaluation.calibration import compute_p_fake

        logit = self.predict_logit(images, batch_size)
        return compute_p_fake(logit, self.bundle.calibration.temperature)

    def predict_logit(
        self, images: Sequence[AnyImage], batch_size: int | None = None
    ) -> np.ndarray:
        """Return the uncalibrated output of each image, float32[N]: above 0 means FAKE.

        Takes and raises what `predict` does.
        """
        from cifake_ray.core.processing.score import predict_images

        batch_size, preprocessing = batch_size or self.batch_size, self.detector.preprocessing
        at_once = max(1, batch_size // (preprocessing.num_crops or 1))
        batches = [np.zeros(0, np.float32)]
        for start in range(0, len(images), at_once):
            stop = min(start + at_once, len(images))
            loaded = [self._load_image(images[i], i) for i in range(start, stop)]
            pixels = preprocessing.stack_images(loaded)
            batches.append(predict_images(self.detector, *pixels, self.device, batch_size)[0])
        return np.concatenate(batches)

    def _load_image(self, image: AnyImage, position: int) -> np.ndarray:
        from PIL.Image import Image

        from cifake_ray.core.imaging.pillow_pixels import convert_image

        is_rgb = (
            isinstance(image, np.ndarray)
            and image.dtype == np.uint8
            and image.ndim == 3
            and image.shape[2] == 3
        )
        if not is_rgb and not isinstance(image, bytes | Image):
            kind = type(image).__name__
            if isinstance(image, np.ndarray):
                kind = f"{image.dtype}{list(image.shape)}"
            raise UsageError(
                f"image {position} is {kind}; give the bytes of its file, a Pillow image, or RGB"
                " pixels as uint8[H, W, 3]"
            )
        preprocessing = self.detector.preprocessing
        try:
            if isinstance(image, bytes):
                return preprocessing.load_image(image)
            pixels = image if isinstance(image, np.ndarray) else convert_image(image)
        except ImageError as error:
            raise ImageError(error.error, f"image {position}: {error.detail}") from error
        return preprocessing.fit_pixels(pixels)


def load_detector(
    bundle: str | None = None,
    *,
    fake_class: str | None = None,
    device: str = "cpu",
    precision: str = "float32",
    store: StoreConfig | None = None,
) -> LoadedDetector:
    """Load a bundle, a run of `train` that holds one, or a built-in detector by its name.

    Without `bundle` it is the built-in one of the largest images, since none is there to look at.
    `fake_class` is the `--fake-class` of `score`.
    `device` is torch's name ("cpu", "cuda"), `precision` one of those of `score`, which may itself
    choose another one; `store` configures access to buckets. BundleError when the bundle is
    missing, incomplete or damaged, UsageError when it or the device does not have the precision.

    >>> load_detector("cifake").bundle.architecture
    'small_cnn'
    """
    from cifake_ray.core.imaging.training_domain import choose_detector
    from cifake_ray.core.models.precision import use_precision
    from cifake_ray.core.training.device_limits import choose_eval_batch_size
    from cifake_ray.storage.bundles.built_ins import locate_bundle
    from cifake_ray.storage.bundles.bundle import load_bundle, read_built_in_domains

    if bundle is None:
        bundle, _ = choose_detector([], read_built_in_domains())
    detector, info = load_bundle(locate_bundle(bundle, store), fake_class=fake_class)
    batch_size = choose_eval_batch_size(detector.network, info.preprocessing.image_size, device)
    ranges = info.checks[precision].ranges if precision in info.checks else None
    detector = use_precision(detector, precision, device, ranges)
    return LoadedDetector(detector, info, device, batch_size)
