"""Read classifiers that others have trained, in the layouts of timm and transformers.

Their own preprocessing is obeyed and the order of their outputs is read from their names. What
cannot be reproduced exactly, or is not said, is refused by name: nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from cifake_ray.core.imaging.preprocessing import Preprocessing
from cifake_ray.core.imaging.resize import Resize
from cifake_ray.core.labels import read_class_name
from cifake_ray.core.schema import FAKE, LABEL_NAMES, REAL
from cifake_ray.errors import BundleError, UsageError

if TYPE_CHECKING:
    import torch

    from cifake_ray.core.models.detector import Detector

PROCESSOR_NAME = "preprocessor_config.json"  # beside the config of transformers
# Arguments of timm's `create_model` that read files, the network, or another config.
UNSAFE_OPTIONS = ("checkpoint_path", "cache_dir", "pretrained", "scriptable", "exportable")
# Of transformers' image processors: is a size that is one number the shorter side's, and do they
# crop the centre if their config does not say?
PROCESSORS = {
    "Beit": (False, False),
    "Bit": (True, True),
    "CLIP": (True, True),
    "ConvNext": (True, False),
    "DeiT": (False, True),
    "MobileNetV2": (True, True),
    "Pvt": (False, False),
    "Siglip": (False, False),
    "ViT": (False, False),
}
CONVNEXT_WHOLE = 384  # pixels, from which ConvNext's processor resizes to a square, uncropped
CONVNEXT_CROP = 224 / 256
KNOWN_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
HARMLESS_STEPS = ("do_reduce_labels",)  # of segmentation maps
EXACT = 1e-6
MAX_NAMED = 100_000  # outputs, which are two if all is well


@dataclass(frozen=True, kw_only=True)
class OtherClassifier:
    """What a classifier of others is, beside its preprocessing."""

    layout: str  # timm or transformers
    config: Mapping[str, Any]
    output_names: tuple[str, ...]  # one or two
    fake_output: int  # 0 or 1; of one output 1 if it means FAKE, 0 if it means REAL

    def __str__(self) -> str:
        fake = self.fake_output
        name = self.output_names[fake] if len(self.output_names) == 2 else "its only one"
        return (
            f"a classifier of {self.layout}: FAKE is its output {fake} ({name}); it has no"
            " calibration, so p_fake is its own probability (temperature 1), and FAKE is from 0.5"
        )

    def build(
        self, architecture: str, preprocessing: Preprocessing, state: Mapping[str, torch.Tensor]
    ) -> Detector:
        """Return the detector with these weights.

        ValueError, TypeError, RuntimeError or AssertionError when they are of another network.
        """
        import torch

        from cifake_ray.core.models.detector import Detector
        from cifake_ray.core.models.other_networks import (
            TwoOutputs,
            build_timm_classifier,
            build_transformers_classifier,
        )

        if self.layout == "timm":
            options = dict(self.config.get("model_args") or {})
            num_outputs = len(self.output_names)
            network = build_timm_classifier(architecture, num_outputs, options, state)
        else:
            network = build_transformers_classifier(self.config, state)
        detector = Detector(architecture, TwoOutputs(network, self.fake_output), preprocessing)
        size = preprocessing.image_size
        with torch.inference_mode():
            outputs = detector.eval()(torch.zeros(1, size, size, 3, dtype=torch.uint8))
        if outputs.shape != (1, 2):
            raise ValueError(f"outputs of shape {list(outputs.shape)}")
        return detector


def find_layout(config: Mapping[str, Any]) -> str | None:
    """Return timm or transformers if a config is of a classifier of others, else None."""
    if "cifake_ray" in config:
        return None
    if isinstance(config.get("model_type"), str) and "architectures" in config:
        return "transformers"
    return "timm" if isinstance(config.get("pretrained_cfg"), dict) else None


def parse_classifier(
    path: str,
    config: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    fake_class: str | None,
) -> tuple[str, Preprocessing, OtherClassifier]:
    """Return architecture, preprocessing, and what else there is to know of a classifier.

    BundleError for a config that is malformed, or asks for what cannot be reproduced; UsageError
    when which output means FAKE must be said with --fake-class.
    """
    layout = find_layout(config)
    try:
        if layout == "timm":
            architecture, names = _read_timm_outputs(config)
            preprocessing = _parse_timm(config)
        else:
            architecture, names = _read_transformers_outputs(config)
            if processor is None:
                raise ValueError(f"there is no {PROCESSOR_NAME}: how images become its input")
            preprocessing = _parse_processor(processor)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        detail = f"it does not say {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{path}: a classifier that cannot be scored with: {detail}") from error
    return (
        architecture,
        preprocessing,
        OtherClassifier(
            layout=str(layout),
            config=config,
            output_names=names,
            fake_output=find_fake_output(path, names, fake_class),
        ),
    )


def find_fake_output(path: str, names: Sequence[str], fake_class: str | None) -> int:
    """Return which output means FAKE: by `fake_class`, an index or a name, else by their names."""
    listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
    if fake_class is not None:
        known = [name.casefold() for name in names]
        if known.count(fake_class.casefold()) == 1:
            number = known.index(fake_class.casefold())
            return number if len(names) == 2 else 1
        if fake_class in ("0", "1"):
            return int(fake_class)
        raise UsageError(f"--fake-class {fake_class}: {path} has the classes {listed}")
    if len(names) == 1:
        raise UsageError(
            f"{path} has one output: does a high value mean FAKE? Give --fake-class 1 if it does,"
            " 0 if it means REAL"
        )
    meant = [read_class_name(name) for name in names]
    if sorted(meant, key=str) != [REAL, FAKE]:
        raise UsageError(
            f"{path} has the classes {listed}: which one is FAKE? The names do not say, and a wrong"
            " guess would turn all verdicts round: give --fake-class 0 or 1, or name them REAL and"
            " FAKE in its config.json"
        )
    return meant.index(FAKE)


def _check_outputs(names: list[Any], count: Any) -> tuple[str, ...]:
    if type(count) is not int or not 1 <= count <= 2:
        raise ValueError(f"{count} classes; a detector has two, {' and '.join(LABEL_NAMES)}")
    if not all(isinstance(name, str) for name in names) or count != len(names):
        raise ValueError(f"{count} classes with the names {names}")
    return tuple(names)


def _read_timm_outputs(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    cfg, options = config["pretrained_cfg"], config.get("model_args") or {}
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not isinstance(options, dict):
        raise ValueError(f"architecture {architecture!r}, model_args {options!r}")
    unsafe = [name for name in options if name in UNSAFE_OPTIONS or "pretrained" in name]
    if unsafe or options.get("in_chans", 3) != 3:
        raise ValueError(
            f"model_args {', '.join(unsafe) or 'in_chans'} are not taken from a config"
        )
    count = config.get("num_classes", cfg.get("num_classes"))
    names = config.get("label_names", cfg.get("label_names"))
    if names is None and type(count) is int:
        names = [f"LABEL_{number}" for number in range(min(count, MAX_NAMED))]
    if names is None:
        raise ValueError("config.json has neither num_classes nor label_names")
    if not isinstance(names, list):
        raise ValueError(f"label_names {names!r} is no list")
    return architecture, _check_outputs(names, count)


def _read_transformers_outputs(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    architectures = config["architectures"]
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or not str(architectures[0]).endswith("ForImageClassification")
    ):
        raise ValueError(f"{architectures} is not one ...ForImageClassification")
    if config.get("problem_type") == "multi_label_classification":
        raise ValueError("problem_type multi_label_classification: its outputs are no two classes")
    if config.get("num_channels", 3) != 3:
        raise ValueError(f"num_channels {config['num_channels']}")
    found = config.get("id2label")
    if found is None:
        count = config.get("num_labels", 2)
        if type(count) is not int:
            raise ValueError(f"num_labels {count!r}")
        found = {str(number): f"LABEL_{number}" for number in range(min(count, MAX_NAMED))}
    if not isinstance(found, dict):
        raise ValueError(f"id2label {found!r} is no object")
    names = list(found.values())
    if len(names) <= 2:
        if found.keys() != {str(number) for number in range(len(names))}:
            raise ValueError(f"id2label {found}; its keys must be 0 and 1")
        names = [found[str(number)] for number in range(len(names))]
    return str(architectures[0]), _check_outputs(names, len(names))


def _parse_timm(config: Mapping[str, Any]) -> Preprocessing:
    """Return what timm's `create_transform(**resolve_data_config(...))` does in evaluation."""
    cfg = config["pretrained_cfg"]
    channels, height, width = cfg["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"input_size {cfg['input_size']}; it must be of three colours and square")
    mode, crop = cfg.get("crop_mode") or "center", cfg["crop_pct"]
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode {mode!r}; center and squash can be reproduced")
    if not isinstance(crop, int | float) or not 0 < crop <= 1:
        raise ValueError(f"crop_pct {crop!r}; it must be above 0 and at most 1")
    return _make_preprocessing(
        height,
        cfg["mean"],
        cfg["std"],
        side=math.floor(height / crop),
        keeps_aspect=mode == "center",
        resample=cfg["interpolation"],
        crop_rounding="even",
    )


def _parse_processor(processor: Mapping[str, Any]) -> Preprocessing:
    """Return what an image processor of transformers does, on Pillow."""
    kind = processor.get("image_processor_type") or processor["feature_extractor_type"]
    name = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(kind))
    if name not in PROCESSORS:
        raise ValueError(f"the image processor {kind}; known are those of {', '.join(PROCESSORS)}")
    is_shortest, crops = PROCESSORS[name]
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(step, True) is not True:
            raise ValueError(f"{step} {processor[step]}")
    others = [
        step
        for step, value in processor.items()
        if value and step.startswith("do_") and step not in (*KNOWN_STEPS, *HARMLESS_STEPS)
    ]
    if others or processor.get("rescale_offset"):
        raise ValueError(f"the step {', '.join(others) or 'rescale_offset'}")
    factor = processor.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > EXACT:
        raise ValueError(f"rescale_factor {factor!r}; only 1/255 can be reproduced")
    side, keeps_aspect = _parse_size("size", processor["size"], is_shortest)
    size = side
    do_crop = processor.get("do_center_crop")
    if do_crop if do_crop is not None else crops:
        if name == "ConvNext":
            raise ValueError("do_center_crop of ConvNext")
        size, _ = _parse_size("crop_size", processor["crop_size"], False)
    elif name == "ConvNext":
        if not keeps_aspect:
            raise ValueError(f"size {processor['size']}; ConvNext takes shortest_edge")
        keeps_aspect = side < CONVNEXT_WHOLE
        if keeps_aspect:
            side = int(side / (processor.get("crop_pct") or CONVNEXT_CROP))
    elif keeps_aspect:
        raise ValueError("images of the shape they have, without do_center_crop")
    if size > side:
        raise ValueError(f"crop_size {size} of images that are resized to {side}")
    resample = processor["resample"]
    return _make_preprocessing(
        size,
        processor["image_mean"],
        processor["image_std"],
        side=side,
        keeps_aspect=keeps_aspect,
        resample=Image.Resampling(resample).name.lower(),
        crop_rounding="down",
    )


def _parse_size(name: str, value: Any, is_shortest: bool) -> tuple[int, bool]:
    """Return a side in pixels, and whether it is the shorter one's alone."""
    if type(value) is int:
        return value, is_shortest
    sizes = dict(value)
    if sizes.keys() == {"height", "width"} and sizes["height"] == sizes["width"]:
        return sizes["height"], False
    if sizes.keys() == {"shortest_edge"}:
        return sizes["shortest_edge"], True
    raise ValueError(f"{name} {value}; squares and shortest_edge can be reproduced")


def _make_preprocessing(size: Any, mean: Any, std: Any, **resize: Any) -> Preprocessing:
    mean, std = (tuple(each) if isinstance(each, list) else (each,) * 3 for each in (mean, std))
    return Preprocessing(image_size=size, fit="resize", mean=mean, std=std, resize=Resize(**resize))
