"""Turn images into scores: the processor of score and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from cifake_ray.core.evaluation.calibration import Calibration, compute_p_fake
from cifake_ray.core.evaluation.policy import Policy, set_verdicts
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.models.detector import Detector
from cifake_ray.core.processing.decode_batch import Decoded, decode_batch
from cifake_ray.core.processing.processor import Prepare, assemble_rows
from cifake_ray.core.provenance.read_provenance import list_columns, read_provenance
from cifake_ray.core.schema import PROVENANCE_FIELDS, SCORE_FIELDS, THUMBNAIL_FIELD
from cifake_ray.errors import ImageError

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
        """With a `c2pa_reader`, "presence" or "encypher-c2pa", the rows have PROVENANCE_FIELDS.

        With `has_thumbnails` they have THUMBNAIL_FIELD.
        """
        torch.set_num_threads(1)  # a worker has one core
        self.detector = detector.to(device).eval()
        self.temperature = calibration.temperature
        self.domain = domain
        self.threshold, self.policy = threshold, policy
        self.batch_size = batch_size
        self.device = device
        self.footer = footer
        self.prepare: Prepare = partial(decode_batch, detector.preprocessing)
        self.fields = SCORE_FIELDS
        if c2pa_reader:
            read = partial(read_provenance, verifies=c2pa_reader == "encypher-c2pa")
            self.prepare = partial(self.prepare, read_provenance=read)
            self.fields = [*SCORE_FIELDS, *PROVENANCE_FIELDS]
        if has_thumbnails:
            self.prepare = partial(self.prepare, max_thumbnail_bytes=MAX_THUMBNAIL_BYTES)
            self.fields = [*self.fields, THUMBNAIL_FIELD]
        self.image_bytes = 3 * detector.preprocessing.image_size**2
        self.image_bytes += MAX_THUMBNAIL_BYTES * has_thumbnails

    def finish(self, rows: pa.Table, prepared: Decoded) -> pa.Table:
        errors = list(prepared.errors)
        good = [i for i, error in enumerate(errors) if error is None]
        logit = np.full(len(errors), np.nan, np.float32)
        if good:
            # What another process decoded is read-only memory; torch wants it writable.
            pixels = torch.from_numpy(np.require(prepared.pixels, requirements="W"))
            logit[good] = predict_logit(self.detector, pixels, self.device)
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
        if prepared.provenance is not None:
            columns |= list_columns(prepared.provenance)
        if prepared.thumbnails is not None:
            columns[THUMBNAIL_FIELD.name] = prepared.thumbnails
        table = assemble_rows(self.fields, rows, columns, prepared.headers, errors)
        return set_verdicts(table, self.threshold, self.policy)

    def count_unlike(self, rows: pa.Table) -> dict[str, int]:
        return {} if self.domain is None else self.domain.count_unlike(rows)


@torch.inference_mode()
def predict_logit(detector: Detector, images: torch.Tensor, device: str) -> np.ndarray:
    """Map uint8[N, S, S, 3] to float32[N] logits, in one forward pass."""
    if device != "cpu":
        images = images.pin_memory().to(device, non_blocking=True)
    logit: np.ndarray = detector.find_logit(images).cpu().numpy()
    return logit
