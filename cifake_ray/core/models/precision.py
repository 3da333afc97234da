"""Make a detector compute in another precision: folded batch norms, bf16, fp16, TF32, int8.

int8 is torch's static quantisation of a traced network: 8-bit activations, weights by channel, the
classifier in float32, computed by oneDNN. It needs no compiler and no other package. A residual and
the convolution that sees it stay in float32: 8 bits for both would round its small steps away.
torch.ao.quantization is deprecated in favour of torchao, whose networks need torch.compile: 10
seconds and a C++ compiler in each worker.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cifake_ray.core.evaluation.calibration import compute_p_fake
from cifake_ray.core.evaluation.precision_check import PrecisionCheck
from cifake_ray.core.models.detector import Detector, find_head
from cifake_ray.core.models.small_networks import WithResidual, find_stem, is_lite
from cifake_ray.errors import ResourceError, UsageError

Ranges = Mapping[str, list[float]]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ENGINE = "onednn"  # of quantised operators
INPUT_OBSERVER = "activation_post_process_0"  # torch's name for the one behind the input
MIN_MARGIN = 0.001  # of a step of int8, where rounding errors are a hundredth of it
NUM_PROBES = 16
MIN_TOLERANCE = 0.01  # of p_fake, between processors
# What tracing a network of timm and quantising it raises for those that it cannot.
TRACING_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def use_precision(
    detector: Detector, precision: str, device: str = "cpu", ranges: Ranges | None = None
) -> Detector:
    """Return the detector ready to score on a device in a precision; it is changed.

    float32 on a GPU is exact; tf32 rounds the factors of its products to 10 bits. int8 needs the
    `ranges` of `find_ranges`.

    UsageError for a precision that the device does not have, and for int8 without ranges or of a
    network that torch cannot trace.
    """
    if device == "cpu" and precision in ("fp16", "tf32"):
        raise UsageError(f"--precision {precision} needs a GPU; use float32, bf16 or int8")
    if device != "cpu" and precision == "int8":
        raise UsageError("--precision int8 is for CPUs; use fp16, bf16 or tf32 on a GPU")
    if precision == "int8":
        detector.network = quantize(detector, ranges or {})
    else:
        detector.network = fold_norms(detector.network.eval())
        detector.dtype = DTYPES.get(precision, torch.float32)
        detector.network.to(detector.dtype)
    if device != "cpu":
        round_products("tf32" if precision == "tf32" else "ieee")
    return detector.to(device).eval()


def round_products(precision: str) -> None:
    """Let GPUs multiply float32 exactly ("ieee") or in TF32, in matrices and convolutions."""
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 exactly on GPUs, as scoring does; then as before."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    round_products("ieee")
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


def fold_norms(network: nn.Module) -> nn.Module:
    """Return the network, in eval mode, with the batch norms behind convolutions folded into them.

    Where one follows the other in a Sequential or in `small_lite`. Outputs change in the last bits.
    """
    if is_lite(network):
        _fold_lite_norms(network)
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for at in range(len(module) - 1):
                conv, norm = module[at], module[at + 1]
                if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    module[at], module[at + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network


def _fold_lite_norms(network: nn.Module) -> None:
    """Fold timm's batch norms, which hold the activation behind them, into the convolutions."""
    from timm.layers.norm_act import BatchNormAct2d

    for module in list(network.modules()):
        for (conv_name, conv), (name, norm) in pairwise(list(module.named_children())):
            if type(conv) is nn.Conv2d and type(norm) is BatchNormAct2d:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, name, norm.act)


def make_probe(size: int, count: int = NUM_PROBES) -> torch.Tensor:
    """Return seeded noise of rising contrast: uint8[count, size, size, 3]."""
    random = np.random.default_rng(0)
    contrast = np.linspace(0, 1, count).reshape(-1, 1, 1, 1)
    level = random.integers(0, 256, (count, 1, 1, 3))
    noise = random.integers(0, 256, (count, size, size, 3))
    return torch.from_numpy((level + contrast * (noise - level)).astype(np.uint8))


@torch.inference_mode()
def find_probe_logits(detector: Detector, device: str = "cpu") -> list[float]:
    """Return the logits of `make_probe`."""
    logits: list[float] = detector.find_logit(
        make_probe(detector.preprocessing.image_size).to(device)
    ).tolist()
    return logits


def compare_probe(
    detector: Detector, check: PrecisionCheck, temperature: float, precision: str
) -> None:
    """Raise ResourceError when the probe gets other scores here than where it was checked.

    They may differ by as much as the precision differs from float32.
    """
    logits = find_probe_logits(detector, detector.scale.device.type)
    here, there = (compute_p_fake(np.array(each), temperature) for each in (logits, check.probe))
    difference = float(np.abs(here - there).max())
    if not difference <= max(check.max_p_fake_difference, MIN_TOLERANCE):  # NaN fails too
        raise ResourceError(
            f"--precision {precision}: torch {torch.__version__} on this processor gives p_fake"
            f" that differ by {difference:.3g} from those of the bundle's own check; use"
            " --precision float32"
        )


def has_int8() -> bool:
    """Return whether this torch can quantise for this processor."""
    return ENGINE in torch.backends.quantized.supported_engines


def find_ranges(
    detector: Detector, images: torch.Tensor, batch_size: int
) -> dict[str, list[float]]:
    """Return the range of each activation for int8, from uint8[N, S, S, 3].

    That of the input is of all pixels; the others lose least on the images, by torch's histograms.
    UsageError when the network cannot be traced.
    """
    from torch.ao.quantization import HistogramObserver

    observer = HistogramObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=255)
    with _quantising(detector):
        prepared = _insert_observers(detector, observer)
        traced = Detector(detector.architecture, prepared, detector.preprocessing)
        with torch.inference_mode():
            for batch in torch.split(images, batch_size):
                traced(batch)
        ranges = {}
        for name, each in _list_observers(prepared).items():
            scale, zero_point = (float(value) for value in each.calculate_qparams())
            ranges[name] = [-zero_point * scale, (255 - zero_point) * scale]
    if INPUT_OBSERVER in ranges:
        ranges[INPUT_OBSERVER] = _choose_input_range(detector)
    return ranges


def _choose_input_range(detector: Detector) -> list[float]:
    """Return a range of all normalised pixels in which none is half-way between two steps.

    There its rounding would follow the last bits of a float, which differ between processors.
    """
    pixels = torch.arange(256).reshape(-1, 1) * detector.scale + detector.shift  # [256, 3]
    low, high = float(pixels.min()), float(pixels.max())

    def find_margin(share: float) -> float:
        step = (high - low) * (1 + share) / 255
        places = (pixels / step).double().remainder(1)
        return float((places - 0.5).abs().min())

    shares = [n / 5000 for n in range(100)]
    share = next((share for share in shares if find_margin(share) > MIN_MARGIN), 0.0)
    return [low, low + (high - low) * (1 + share)]


def quantize(detector: Detector, ranges: Ranges) -> nn.Module:
    """Return the network in int8, with these ranges of its activations.

    UsageError when it cannot be traced or the ranges are another network's.
    """
    from torch.ao.quantization import MinMaxObserver
    from torch.ao.quantization.quantize_fx import convert_fx

    observer = MinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=255)
    with _quantising(detector):
        prepared = _insert_observers(detector, observer)
        observers = _list_observers(prepared)
        if observers.keys() != ranges.keys():
            raise ValueError("the bundle's ranges are for another network or version of torch")
        for name, each in observers.items():
            each.min_val, each.max_val = (torch.tensor(value) for value in ranges[name])
        if isinstance(prepared, WithResidual):
            prepared.network = convert_fx(prepared.network)  # type: ignore[arg-type]
            return prepared
        network: nn.Module = convert_fx(prepared)
    return network


def _insert_observers(detector: Detector, observer: Any) -> Any:
    """Trace a copy of the network, and return it with an observer behind each operator."""
    from torch.ao.quantization import PerChannelMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    by_channel = PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    )
    qconfig = QConfig(activation=observer, weight=by_channel)  # type: ignore[no-untyped-call]
    mapping = QConfigMapping().set_global(qconfig)
    whole = copy.deepcopy(detector.network).eval().requires_grad_(False)
    network = whole.network if isinstance(whole, WithResidual) else whole
    exact = set(find_head(network).modules())  # 256 logits would be too few
    num_channels = 3
    if isinstance(whole, WithResidual):
        exact.add(find_stem(network))
        num_channels = 6
    for name, module in network.named_modules():
        if module in exact:
            mapping.set_module_name(name, None)
    if is_lite(network):
        _fold_lite_norms(network)
        _saturate_at_6(network)
    size = detector.preprocessing.image_size
    prepared = prepare_fx(network, mapping, (torch.zeros(1, num_channels, size, size),))
    if not isinstance(whole, WithResidual):
        return prepared
    whole.network = prepared
    return whole


def _saturate_at_6(network: nn.Module) -> None:
    """Let each ReLU6 be the end of its convolution, as torch fuses a ReLU only.

    The observers see no value above 6, and int8 saturates at the end of their ranges.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.ReLU6:
                relu = nn.ReLU()
                relu.forward = functional.relu6  # type: ignore[method-assign]
                setattr(module, name, relu)


def _list_observers(prepared: nn.Module) -> dict[str, Any]:
    from torch.ao.quantization import ObserverBase

    return {
        name: module
        for name, module in prepared.named_modules()
        if isinstance(module, ObserverBase)
    }


@contextmanager
def _quantising(detector: Detector) -> Iterator[None]:
    """Choose the engine, and turn what tracing a network raises into a UsageError."""
    from torch.fx import config

    engine, is_quiet = (
        torch.backends.quantized.engine,
        getattr(config, "do_not_emit_stack_traces", False),  # torch 2.11 has no such choice
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated: see above; others are for its authors
            torch.backends.quantized.engine = ENGINE
            # Stack traces of each traced line would import torch's compiler, for a second.
            config.do_not_emit_stack_traces = True
            yield
    except (ImportError, *TRACING_ERRORS) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"--precision int8: torch {torch.__version__} cannot quantise"
            f" {detector.architecture} ({reason}); use float32"
        ) from error
    finally:
        torch.backends.quantized.engine = engine
        config.do_not_emit_stack_traces = is_quiet
