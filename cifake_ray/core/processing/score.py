"""Turn images into scores: the processor of score and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from cifake_ray.core.evaluation.calibration import Calibration, compute_p_fake
from cifake_ray.core.evaluation.policy import Policy, set_verdicts
from cifake_ray.core.imaging.crops import pool_logits
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.processing.decode_batch import Decoded, decode_batch
from cifake_ray.core.processing.processor import Prepare, assemble_rows
from cifake_ray.core.provenance.read_provenance import list_columns, read_provenance
from cifake_ray.core.schema import CROP_FIELDS, PROVENANCE_FIELDS, SCORE_FIELDS, THUMBNAIL_FIELD
from cifake_ray.errors import ImageError, UsageError

MAX_THUMBNAIL_BYTES = 8 * 2**10


class ScoreProcessor:
    """Decode and score a slice of images: the `Processor` of score and evaluate."""

    decodes = True

    def __init__(
        self,
        detector: Detector,
        calibration: Calibration,
        domain: TrainingDomain | None,
        *,
        threshold: float,
        policy: Policy | None = None,
        batch_size: int,
        device: str,
        footer: dict[str, str],
        c2pa_reader: str | None = None,
        has_thumbnails: bool = False,
    ) -> None:
        """Take `batch_size` images at once, or crops, and then the rows have CROP_FIELDS.

        With a `c2pa_reader`, "presence" or "encypher-c2pa", they have PROVENANCE_FIELDS, with
        `has_thumbnails` THUMBNAIL_FIELD.
        """
        torch.set_num_threads(1)  # a worker has one core
        self.detector = detector.to(device).eval()
        self.temperature = calibration.temperature
        self.domain = domain
        self.threshold, self.policy = threshold, policy
        preprocessing = detector.preprocessing
        num_inputs = preprocessing.num_crops or 1  # of an image, at most
        self.forward_size = batch_size
        self.batch_size = max(1, batch_size // num_inputs)
        self.device = device
        self.footer = footer
        self.prepare: Prepare = partial(decode_batch, preprocessing)
        self.fields = SCORE_FIELDS
        if preprocessing.num_crops:
            self.fields = [*SCORE_FIELDS, *CROP_FIELDS]
        if c2pa_reader:
            read = partial(read_provenance, verifies=c2pa_reader == "encypher-c2pa")
            self.prepare = partial(self.prepare, read_provenance=read)
            self.fields = [*self.fields, *PROVENANCE_FIELDS]
        if has_thumbnails:
            self.prepare = partial(self.prepare, max_thumbnail_bytes=MAX_THUMBNAIL_BYTES)
            self.fields = [*self.fields, THUMBNAIL_FIELD]
        self.image_bytes = 3 * preprocessing.image_size**2 * num_inputs
        self.image_bytes += MAX_THUMBNAIL_BYTES * has_thumbnails

    def finish(self, rows: pa.Table, prepared: Decoded) -> pa.Table:
        errors = list(prepared.errors)
        good = [i for i, error in enumerate(errors) if error is None]
        logit = np.full(len(errors), np.nan, np.float32)
        logit[good], std = self.predict(prepared.pixels, prepared.num_crops)
        for i in good:
            if not np.isfinite(logit[i]):
                errors[i] = ImageError("nan_score", f"the detector gave {logit[i]}")
        p_fake = compute_p_fake(logit, self.temperature)
        failed = np.array([error is not None for error in errors], bool)
        columns: dict[str, Sequence[object] | pa.Array] = {
            "logit": pa.array(logit, pa.float32(), mask=failed),
            "p_fake": pa.array(p_fake, pa.float32(), mask=failed),
            "is_fake": pa.nulls(len(errors), pa.bool_()),
        }
        if std is not None:
            columns |= self._list_crops(rows, prepared, std, failed)
        if prepared.provenance is not None:
            columns |= list_columns(prepared.provenance)
        if prepared.thumbnails is not None:
            columns[THUMBNAIL_FIELD.name] = prepared.thumbnails
        table = assemble_rows(self.fields, rows, columns, prepared.headers, errors)
        return set_verdicts(table, self.threshold, self.policy)

    def predict(
        self, pixels: np.ndarray, num_crops: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return what `predict_images` does, `forward_size` at once."""
        return predict_images(self.detector, pixels, num_crops, self.device, self.forward_size)

    def _list_crops(
        self, rows: pa.Table, prepared: Decoded, std: np.ndarray, failed: np.ndarray
    ) -> dict[str, pa.Array]:
        """Return CROP_FIELDS. UsageError when the listing has a column of one of these names."""
        names = [field.name for field in CROP_FIELDS]
        if taken := set(names) & set(rows.schema.names):
            raise UsageError(
                f"the source has columns of its own called {', '.join(sorted(taken))}, as the"
                " detector's; rename them, or leave them out with --drop-columns"
            )
        columns = {}
        for field, values in zip(CROP_FIELDS, (prepared.num_crops, std), strict=True):
            whole = np.zeros(len(failed), field.type.to_pandas_dtype())
            whole[[error is None for error in prepared.errors]] = values
            columns[field.name] = pa.array(whole, field.type, mask=failed)
        return columns

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {} if self.domain is None else self.domain.count_unlike(rows)


def predict_images(
    detector: Detector,
    pixels: np.ndarray,
    num_crops: np.ndarray | None,
    device: str,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Map what `Preprocessing.stack_images` returns to the logits of N images: float32[N].

    Those of crops are pooled, and their spread is returned too, float32[N]; else None. A forward
    pass takes `batch_size` images or crops.
    """
    logits = [np.zeros(0, np.float32)]
    for start in range(0, len(pixels), batch_size):
        # What another process decoded is read-only memory; torch wants it writable.
        some = np.require(pixels[start : start + batch_size], requirements="W")
        logits.append(predict_logit(detector, torch.from_numpy(some), device))
    logit = np.concatenate(logits)
    return (logit, None) if num_crops is None else pool_logits(logit, num_crops)


@torch.inference_mode()
def predict_logit(detector: Detector, images: torch.Tensor, device: str) -> np.ndarray:
    """Map uint8[N, S, S, 3] to float32[N] logits, in one forward pass."""
    if device != "cpu":
        images = images.pin_memory().to(device, non_blocking=True)
    logit: np.ndarray = detector.find_logit(images).cpu().numpy()
    return logit
