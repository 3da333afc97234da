"""Compare ways to compute a detector's logits on a CPU: one Markdown table for each detector.

    python tests/benchmarks/backends.py [built-in resnet18@96 ...] --source CIFAKE [--compile]

One thread, the batch that `score` takes, no test-time flip, no decoding. Contenders take turns in
each of seven rounds; rates are medians, ratios are to PyTorch in float32. int8 is calibrated on two
other batches. Only the built-in detector is trained: of the others the differences of logits say
nothing about accuracy. Backends whose package is missing (`pip install openvino nncf`) are left out
by name, and so are those that do not take a network, and bf16 where the CPU only emulates it
(a quarter to a third of float32).
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import format_table, log
from run import describe_machine

from cifake_ray.core.models.detector import Detector, build_detector, to_logit
from cifake_ray.core.models.onnx_model import encode_onnx
from cifake_ray.core.training.device_limits import choose_eval_batch_size, choose_precision
from cifake_ray.errors import ImageError
from cifake_ray.stages.malloc import keep_freed_memory
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import load_bundle

DETECTORS = ("built-in", "resnet18@96", "efficientnet_b0@224", "vit_tiny_patch16_224@224")
PACKAGES = ("onnxruntime", "openvino", "nncf")
ROUNDS = 7
CPU_FLAGS = ("amx_bf16", "amx_int8", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512f", "avx2")

Compute = Callable[[np.ndarray], np.ndarray]


def load(name: str) -> Detector:
    torch.manual_seed(0)
    if name == "built-in":
        detector = load_bundle(locate_bundle(None))[0]
    else:
        architecture, _, size = name.partition("@")
        detector = build_detector(architecture, image_size=int(size) if size else None).eval()
    detector.set_preprocessing(replace(detector.preprocessing, test_time_flip=False))
    return detector.requires_grad_(False)


def load_images(paths: list[Path], detector: Detector, count: int) -> Iterator[np.ndarray]:
    """Batches of pixels that are evenly spread over a folder: first the one that is measured."""
    step = max(len(paths) // (3 * count), 1)
    for start in range(3):
        images = []
        for path in paths[start * step :: 3 * step]:
            try:
                images.append(detector.preprocessing.load_image(path.read_bytes()))
            except ImageError:
                continue
            if len(images) == count:
                break
        yield np.stack(images)


class Contenders:
    """Each method makes a backend; its name in the table and its package are beside it."""

    def __init__(self, detector: Detector, calibration: list[np.ndarray], work: Path) -> None:
        self.detector, self.calibration, self.work = detector, calibration, work
        self.model = work / "model.onnx"

    def run_torch(self, detector: Detector, dtype: torch.dtype | None = None) -> Compute:
        def compute(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                return to_logit(detector(torch.from_numpy(images))).numpy()

        return compute

    def fold(self) -> Detector:
        from torch.fx.experimental.optimization import fuse

        detector = copy.deepcopy(self.detector)
        detector.network = fuse(detector.network).to(memory_format=torch.channels_last)
        return detector

    def torch_float32(self) -> Compute:
        return self.run_torch(self.detector)

    def torch_folded(self) -> Compute:
        return self.run_torch(self.fold())

    def torch_bf16(self) -> Compute:
        return self.run_torch(self.detector, torch.bfloat16)

    def torch_bf16_folded(self) -> Compute:
        return self.run_torch(self.fold(), torch.bfloat16)

    def torch_compiled(self) -> Compute:
        import torch._inductor.config as inductor

        inductor.freezing, inductor.cpp.threads = True, 1
        return self.run_torch(torch.compile(copy.deepcopy(self.detector)))

    def torch_int8(self) -> Compute:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        torch.backends.quantized.engine = "x86"
        detector = copy.deepcopy(self.detector)
        size = detector.preprocessing.image_size
        example = (torch.zeros(1, 3, size, size),)
        detector.network = prepare_fx(detector.network, get_default_qconfig_mapping("x86"), example)
        for images in self.calibration:
            self.run_torch(detector)(images)
        detector.network = convert_fx(detector.network)
        return self.run_torch(detector)

    def export(self) -> Path:
        if not self.model.exists():
            self.model.write_bytes(encode_onnx(self.detector, 1.0, {}))
        return self.model

    def run_onnx(self, path: Path) -> Compute:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(["logit"], {"images": images})[0]

    def onnx_float32(self) -> Compute:
        return self.run_onnx(self.export())

    def onnx_int8(self) -> Compute:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            batches = iter(self.calibration)

            def get_next(self) -> dict[str, np.ndarray] | None:
                images = next(self.batches, None)
                return None if images is None else {"images": images}

        prepared, quantised = self.work / "prepared.onnx", self.work / "int8.onnx"
        quant_pre_process(self.export(), prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            Reader(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Conv", "MatMul", "Gemm", "MaxPool", "Add", "Relu"],
        )
        return self.run_onnx(quantised)

    def run_openvino(self, model: Any, precision: str | None = None) -> Compute:
        import openvino

        model.reshape([len(self.calibration[0]), *model.inputs[0].get_partial_shape()[1:]])
        hints = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
        hints |= {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(model, "CPU", hints)
        return lambda images: np.array(compiled(images)["logit"])

    def read_openvino(self) -> Any:
        import openvino

        return openvino.Core().read_model(self.export())

    def openvino_float32(self) -> Compute:
        return self.run_openvino(self.read_openvino(), "f32")

    def openvino_bf16(self) -> Compute:
        return self.run_openvino(self.read_openvino(), "bf16")

    def openvino_int8(self) -> Compute:
        import nncf

        data = nncf.Dataset(self.calibration)
        model = nncf.quantize(self.read_openvino(), data, subset_size=len(self.calibration))
        return self.run_openvino(model)


ROWS = {  # method -> name in the table, packages
    "torch_float32": ("PyTorch float32", ()),
    "torch_folded": ("PyTorch float32, batch norms folded", ()),
    "torch_bf16": ("PyTorch bf16 (autocast)", ()),
    "torch_bf16_folded": ("PyTorch bf16, batch norms folded", ()),
    "torch_compiled": ("torch.compile float32, frozen", ()),
    "torch_int8": ("PyTorch int8 (FX)", ()),
    "onnx_float32": ("ONNX Runtime float32", ("onnxruntime",)),
    "onnx_int8": ("ONNX Runtime int8 (static)", ("onnxruntime",)),
    "openvino_float32": ("OpenVINO float32", ("openvino",)),
    "openvino_bf16": ("OpenVINO bf16", ("openvino",)),
    "openvino_int8": ("OpenVINO int8 (NNCF)", ("openvino", "nncf")),
}


def compare(name: str, paths: list[Path], compiles: bool, work: Path) -> None:
    detector = load(name)
    size = detector.preprocessing.image_size
    count = choose_eval_batch_size(detector.network, size, "cpu")
    images, *calibration = load_images(paths, detector, count)
    makers = Contenders(detector, calibration, work)
    made: dict[str, tuple[Compute, float]] = {}
    left_out = []
    for method, (title, packages) in ROWS.items():
        if method == "torch_compiled" and not compiles:
            continue
        if "bf16" in method and choose_precision("cpu", "auto").name != "bf16":
            left_out.append(f"{title}: this CPU only emulates it")
            continue
        if missing := [package for package in packages if find_spec(package) is None]:
            left_out.append(f"{title}: {', '.join(missing)} is not installed")
            continue
        begun_s = time.perf_counter()
        try:
            with redirect_stdout(sys.stderr):  # nncf shows its progress
                compute = getattr(makers, method)()
                compute(images)
        except Exception as error:  # whatever a library raises for a network it does not take
            lines = str(error).splitlines() or [""]
            left_out.append(f"{title}: not possible ({type(error).__name__}: {lines[0][:80]})")
            continue
        made[title] = compute, time.perf_counter() - begun_s
        log(f"{name}: {title} is ready")
    logits = {title: compute(images) for title, (compute, _) in made.items()}
    elapsed_s: dict[str, list[float]] = {title: [] for title in made}
    for _ in range(ROUNDS):
        for title, (compute, _) in made.items():
            begun_s = time.perf_counter()
            compute(images)
            elapsed_s[title].append(time.perf_counter() - begun_s)
    first = next(iter(made))
    lines = [
        ["backend", "images/s", "ratio", "lowest-highest", "largest logit difference", "ready"]
    ]
    for title, (_, ready_s) in made.items():
        ratios = [a / b for a, b in zip(elapsed_s[first], elapsed_s[title], strict=True)]
        rates = sorted(len(images) / second for second in elapsed_s[title])
        lines.append(
            [
                title,
                f"{median(rates):,.0f}",
                f"{median(ratios):.2f}",
                f"{rates[0]:,.0f}-{rates[-1]:,.0f}",
                f"{np.abs(logits[title] - logits[first]).max():.1e}",
                f"{ready_s:.1f} s",
            ]
        )
    spread = np.ptp(logits[first])
    print(
        f"\n### {name}, {size} x {size} pixels, {len(images)} at once; logits spread {spread:.2g}\n"
    )
    print(format_table(lines))
    print("".join(f"\n{line}" for line in left_out))
    sys.stdout.flush()


def find_cpu_flags() -> list[str]:
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return [flag for flag in CPU_FLAGS if flag in words]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("detectors", nargs="*", default=DETECTORS, help="built-in or NAME@SIZE")
    parser.add_argument("--source", type=Path, required=True, help="folder of .jpg images")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which is slow")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of score do
    print(f"`{shlex.join(['python', 'tests/benchmarks/backends.py', *sys.argv[1:]])}`\n")
    installed = [name for name in PACKAGES if find_spec(name)]
    machine = describe_machine() | {name: version(name) for name in installed}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"CPU flags: {' '.join(find_cpu_flags()) or 'none of them'}")
    paths = sorted(options.source.rglob("*.jpg"))
    for name in options.detectors:
        with tempfile.TemporaryDirectory(prefix="cifake-backends-") as work:
            compare(name, paths, options.compile, Path(work))


if __name__ == "__main__":
    main()
