"""Images in, scores out: what bulk scoring and evaluation do with a slice of a shard.

Floor: core.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import torch

from cifake_ray.core.calibration import Calibration, compute_p_fake
from cifake_ray.core.domain import Domain
from cifake_ray.core.images import ImageFacts, inspect_image
from cifake_ray.core.models import Detector
from cifake_ray.core.schema import FACT_FIELDS, SCORE_FIELDS
from cifake_ray.core.work import assemble_rows
from cifake_ray.errors import ImageError


class ScoreWork:
    """Decodes and scores a slice of images: the `Work` of score and evaluate."""

    decodes = True

    def __init__(
        self,
        detector: Detector,
        calibration: Calibration,
        domain: Domain | None,
        *,
        threshold: float,
        batch_size: int,
        device: str,
        num_threads: int,
        facts: dict[str, str],
    ) -> None:
        torch.set_num_threads(num_threads)
        self.detector = detector.to(device).eval()
        self.temperature = calibration.temperature
        self.domain = domain
        self.threshold = threshold
        self.batch_size = batch_size
        self.device = device
        self.facts = facts
        # Decoders release the interpreter lock; one image at a time is faster on one core.
        self.decoders = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def __call__(self, rows: pa.Table, images: Sequence[bytes | ImageError]) -> pa.Table:
        decode = self.decoders.map if self.decoders else map
        decoded = list(decode(self._load_image, images))
        errors = [d if isinstance(d, ImageError) else None for d in decoded]
        facts = [None if isinstance(d, ImageError) else d[1] for d in decoded]
        good = [i for i, error in enumerate(errors) if error is None]
        logit = np.full(len(decoded), np.nan, np.float32)
        if good:
            pixels = np.stack([d[0] for d in decoded if not isinstance(d, ImageError)])
            logit[good] = predict_logit(self.detector, torch.from_numpy(pixels), self.device)
        for i in good:
            if not np.isfinite(logit[i]):
                errors[i] = ImageError("nan_score", f"the detector gave {logit[i]}")
        p_fake = compute_p_fake(logit, self.temperature)
        failed = np.array([error is not None for error in errors], bool)
        columns: dict[str, Sequence[object] | pa.Array] = {
            "logit": pa.array(logit, pa.float32(), mask=failed),
            "p_fake": pa.array(p_fake, pa.float32(), mask=failed),
            "is_fake": pa.array(p_fake >= self.threshold, mask=failed),
        }
        for field in FACT_FIELDS:
            columns[field.name] = [f and getattr(f, field.name) for f in facts]
        return assemble_rows(SCORE_FIELDS, rows, columns, errors)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {} if self.domain is None else self.domain.count_unlike(rows)

    def _load_image(self, data: bytes | ImageError) -> tuple[np.ndarray, ImageFacts] | ImageError:
        if isinstance(data, ImageError):
            return data
        try:
            facts = inspect_image(data)
            pixels = self.detector.preprocessing.load_image(data)
        except ImageError as error:
            return error
        return pixels, facts


@torch.inference_mode()
def predict_logit(detector: Detector, images: torch.Tensor, device: str) -> np.ndarray:
    """uint8[N, S, S, 3] -> float32[N] logits, in one forward pass."""
    if device != "cpu":
        images = images.pin_memory().to(device, non_blocking=True)
    logit: np.ndarray = detector.find_logit(images).cpu().numpy()
    return logit
