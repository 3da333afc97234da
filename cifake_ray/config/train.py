"""Options of `train`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from cifake_ray.config.augmentation import Augmentation
from cifake_ray.config.fields import (
    MAX_CROP_SIZE,
    MAX_IMAGE_SIZE,
    MAX_NUM_CROPS,
    Device,
    Doc,
    Fit,
    RuntimeDoc,
    check,
    check_least,
)
from cifake_ray.config.validation import ValidationConfig

Optimizer = Literal["adamw", "sgd", "muon"]
Schedule = Literal["onecycle", "cosine", "constant"]
Precision = Literal["auto", "float32", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "mlflow"]
DISTILL = 0.9  # as in the comparison of methods by Tian et al. 2020, arXiv 1910.10699


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ValidationConfig):
    """train: train a detector on shards; its best epoch by validation becomes RUN/bundle."""

    PANEL: ClassVar[str] = "Training"
    PANELS: ClassVar[dict[str, str]] = {
        "Model": "model weights pretrained image_size train_size fit num_crops drop_path"
        " test_time_flip",
        "Augmentation": "augment crops_per_image balance_sources twins twin_share consistency mixup"
        " cutmix label_smoothing",
        "Distillation": "teacher distill distill_temperature",
        "Optimizer": "optimizer lr momentum weight_decay schedule warmup layer_decay grad_clip"
        " grad_accum",
    }

    shards: Annotated[str, Doc("Output of convert", positional=True)]
    run: Annotated[str, RuntimeDoc("Folder of this run; the same folder resumes", positional=True)]
    model: Annotated[str, Doc("cnn, fusion, small_* or any of timm: see `models`")] = "cnn"
    weights: Annotated[
        str | None, Doc("Start from a file of weights, a folder in timm's layout or a bundle")
    ] = None
    allow_pickle: Annotated[
        bool,
        RuntimeDoc("Take --weights and --teacher from .bin .pt .pth .ckpt .pkl too: tensors only"),
    ] = False
    pretrained: Annotated[bool, Doc("Start from timm's weights, fetched from its hub")] = False
    twins: Annotated[
        str | None,
        Doc(
            "Output of convert with FAKE twins of REAL images: same source and file name, suffix"
            " aside, and split, if both have one. The two are in one batch and augmented alike; not"
            " streamed: each pair would take fetching two row groups, so all must fit --cache-gb"
        ),
    ] = None
    twin_share: Annotated[
        float | None,
        Doc(
            "Share of an epoch's pairs that are an image and its twin, 0 to 1; others are a REAL"
            " and a FAKE image (default: every image that has a twin is with it, once)"
        ),
    ] = None
    balance_sources: Annotated[
        float | None,
        Doc(
            "Draw REAL and FAKE equally often, and of each class a source of n images in proportion"
            " to n^(1 - this): 0.5 is the square root, 1 all alike (default: every image once)"
        ),
    ] = None
    epochs: Annotated[int, Doc("Passes over the training images")] = 10
    batch_size: Annotated[int, Doc("Images per optimizer step, all workers together")] = 128
    optimizer: Annotated[
        Optimizer, Doc("Optimizer; muon leaves head, biases and norms to AdamW")
    ] = "adamw"
    lr: Annotated[float, Doc("Peak learning rate")] = 0.003
    momentum: Annotated[float, Doc("Momentum for sgd and muon, beta1 for adamw (0 to 1)")] = 0.9
    weight_decay: Annotated[float, Doc("Weight decay, on weights with 2 axes or more")] = 0.01
    schedule: Annotated[Schedule, Doc("Learning rate schedule after the warm-up")] = "onecycle"
    warmup: Annotated[float, Doc("Share of the steps in which the learning rate rises, 0 to 1")] = (
        0.2
    )
    layer_decay: Annotated[
        float | None, Doc("Learning rate factor from each layer to the one before it (timm's)")
    ] = None
    freeze_epochs: Annotated[int, Doc("Epochs at the start that train only the head")] = 0
    grad_clip: Annotated[float | None, Doc("Max gradient norm (L2)")] = None
    grad_accum: Annotated[int, Doc("Gradient accumulation: pieces of a batch, to save memory")] = 1
    label_smoothing: Annotated[float, Doc("Label smoothing, 0 to 1")] = 0.0
    consistency: Annotated[
        float,
        Doc("Weight of DCPT's loss between an image before and after its degradations; 0 is none"),
    ] = 0.0
    teacher: Annotated[
        str | None, Doc("Learn from the outputs of this bundle too; of several, `a,b`, their mean")
    ] = None
    distill: Annotated[
        float | None,
        Doc(f"Share of the teacher in the loss, 0 to 1; labels have the rest (default: {DISTILL})"),
    ] = None
    distill_temperature: Annotated[
        float, Doc("Temperature of the teacher's outputs and of those compared with them")
    ] = 1.0
    mixup: Annotated[float, Doc("Alpha of mixup; 0 is none")] = 0.0
    cutmix: Annotated[float, Doc("Alpha of CutMix; 0 is none")] = 0.0
    drop_path: Annotated[float, Doc("Stochastic depth, for timm networks that support it")] = 0.0
    channels_last: Annotated[bool, Doc("Weights in channels-last order: often faster")] = False
    augment: Annotated[
        str | Augmentation,
        Doc(
            "Augmentation: none, flip, shift, seed, strong, robust, wild (for --fit crops), a YAML"
            " file of steps, or {step: value}"
        ),
    ] = "flip"
    seed: Annotated[int, Doc("Same seed, same workers, same result")] = 0
    image_size: Annotated[
        int | None, Doc("Side of the input in pixels (default: the architecture's own)")
    ] = None
    train_size: Annotated[
        int | None,
        Doc("With --fit crops: side of the crops trained on (default: --image-size)"),
    ] = None
    fit: Annotated[Fit, Doc("How images of other sizes are made to fit")] = "resize"
    num_crops: Annotated[
        int | None, Doc("With --fit crops: most crops of an image that are scored (default: 12)")
    ] = None
    crops_per_image: Annotated[
        int, Doc("With --fit crops: random crops of each image in an epoch")
    ] = 1
    test_time_flip: Annotated[
        bool, Doc("Average the outputs of an image and its mirror image, here and in the bundle")
    ] = False
    num_workers: Annotated[
        str | None,
        RuntimeDoc(
            "Data-parallel workers of Ray, or MIN:MAX for as many as fit; 0 trains in this process"
            " (default: 0 if no cluster is named and there is one GPU or none, else the GPUs, but 8"
            " images of a batch for each; else 1)"
        ),
    ] = None
    cpus_per_worker: Annotated[
        int | None,
        RuntimeDoc("CPU threads of each worker (default: an equal share; with MIN:MAX 1)"),
    ] = None
    device: Annotated[Device, RuntimeDoc("auto: the GPUs if there are any")] = "auto"
    precision: Annotated[
        Precision,
        Doc("auto: bf16 where the device is fast at it, else float32 on CPU and fp16 on GPU"),
    ] = "auto"
    compile: Annotated[
        bool, Doc("torch.compile: a minute at the start, then faster on GPUs and large networks")
    ] = False
    checkpoint_steps: Annotated[
        int | None,
        RuntimeDoc("Also save every this many steps within an epoch (default: only at its end)"),
    ] = None
    max_failures: Annotated[int, RuntimeDoc("Worker failures to recover from before giving up")] = 3
    cache_dir: Annotated[
        str | None, RuntimeDoc("Folder for decoded images (default: ~/.cache/cifake_ray)")
    ] = None
    cache_gb: Annotated[
        float, RuntimeDoc("Keep decoded images on the disk, up to this size in all; stream above")
    ] = 8.0
    track: Annotated[
        tuple[TrackerName, ...],
        RuntimeDoc(
            "Log every epoch to tensorboard (files in RUN) or mlflow (at MLFLOW_TRACKING_URI);"
            " repeatable"
        ),
    ] = ()
    dry_run: Annotated[bool, RuntimeDoc("Show the plan and stop")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "epochs", "batch_size", "cpus_per_worker", "grad_accum")
        check_least(self, 1, "checkpoint_steps", "crops_per_image")
        check_least(self, 0, "seed", "weight_decay", "cache_gb", "max_failures")
        check_least(self, 0, "mixup", "cutmix", "freeze_epochs", "consistency")
        check(
            self.fit == "crops" or (self.num_crops is None and self.crops_per_image == 1),
            "--num-crops and --crops-per-image need --fit crops",
        )
        check(
            self.fit == "crops" or self.train_size is None,
            "--train-size needs --fit crops: only crops of native pixels may have another size",
        )
        crop_size = self.train_size or self.image_size or 0
        check(
            self.fit != "crops" or crop_size <= MAX_CROP_SIZE,
            f"--fit crops trains on crops of at most {MAX_CROP_SIZE:,} pixels, not {crop_size:,};"
            " give a smaller --train-size",
        )
        check(
            self.num_crops is None or 1 <= self.num_crops <= MAX_NUM_CROPS,
            f"--num-crops is {self.num_crops}; give 1 to {MAX_NUM_CROPS}",
        )
        check(
            self.consistency == 0 or not self.compile,
            "--consistency reads what enters the classifier, which --compile hides; leave one out",
        )
        check(
            self.teacher is not None or (self.distill is None and self.distill_temperature == 1),
            "--distill and --distill-temperature need a --teacher",
        )
        check(
            self.teacher is None or len(self.teachers) > 0,
            f"--teacher {self.teacher!r} names no bundle",
        )
        check(
            0.01 <= self.distill_temperature <= 1000,  # beyond, logits or the square overflow
            f"--distill-temperature is {self.distill_temperature}; give 0.01 to 1000",
        )
        check(
            self.teacher is None or not self.leave_one_source_out,
            "--leave-one-source-out: a --teacher may know the source; give one of the two",
        )
        check(
            self.twins is None or self.batch_size % 2 == 0,
            f"--twins needs an even --batch-size, not {self.batch_size}: no pair is torn apart",
        )
        check(self.twin_share is None or self.twins is not None, "--twin-share needs --twins")
        check(
            self.twins is None or self.balance_sources is None or self.twin_share is not None,
            "--balance-sources with --twins needs --twin-share: as many pairs as there are twins"
            " leave no choice",
        )
        for name in ("balance_sources", "twin_share", "distill"):
            value = getattr(self, name)
            check(
                value is None or 0 <= value <= 1,
                f"--{name.replace('_', '-')} is {value}; give 0 to 1",
            )
        check(
            self.weights is None or not self.pretrained,
            "--weights and --pretrained: give one of them",
        )
        check(
            self.pretrained is False or self.model != "cnn",
            "--pretrained: timm has no weights of cnn; give --weights, or leave it out",
        )
        for name in ("lr", "grad_clip", "layer_decay"):
            value, is_decay = getattr(self, name), name.endswith("decay")
            check(
                value is None or 0 < value < (1 if is_decay else math.inf),
                f"--{name.replace('_', '-')} is {value}; give a number above 0"
                + (", below 1" if is_decay else ""),
            )
        check(
            self.freeze_epochs <= self.epochs,
            f"--freeze-epochs is {self.freeze_epochs} of {self.epochs} epochs",
        )
        for name in ("warmup", "label_smoothing", "momentum", "drop_path"):
            value = getattr(self, name)
            check(0 <= value < 1, f"--{name.replace('_', '-')} is {value}; give 0 or more, below 1")
        least, most = self.worker_range or (0, 0)
        check(
            least <= most <= self.batch_size // (1 if self.twins is None else 2),
            f"--num-workers is {self.num_workers} with --batch-size {self.batch_size}; every"
            " worker needs at least one image of each batch, with --twins a pair",
        )
        for name in ("image_size", "train_size"):
            value = getattr(self, name)
            check(
                value is None or 8 <= value <= MAX_IMAGE_SIZE,
                f"--{name.replace('_', '-')} is {value}; give 8 to {MAX_IMAGE_SIZE}",
            )

    @property
    def policy(self) -> Augmentation:
        """Return `augment`, whose text `read_augmentation` has parsed by now."""
        assert isinstance(self.augment, Augmentation)
        return self.augment

    @property
    def teachers(self) -> list[str]:
        """Return the bundles that `teacher` names."""
        return [name.strip() for name in (self.teacher or "").split(",") if name.strip()]

    @property
    def distill_weight(self) -> float:
        """Return the teachers' share of the loss, 0 without one."""
        return (DISTILL if self.distill is None else self.distill) if self.teachers else 0.0

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Return the least and the most workers, which differ for MIN:MAX; None without the option.

        UsageError when it is neither a number nor MIN:MAX.
        """
        if self.num_workers is None:
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", self.num_workers)
        least, most = map(int, match.groups(match[1])) if match else (0, -1)
        check(
            least <= most and (least > 0 or most == 0),
            f"--num-workers is {self.num_workers}; give a number, or MIN:MAX from 1 on",
        )
        return least, most
