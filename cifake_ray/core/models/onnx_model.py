"""Write a detector as an ONNX model, and run such a model with ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from cifake_ray.core.models.detector import Detector
from cifake_ray.errors import CifakeError, UsageError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf message ends at 2 GiB; the rest is for the graph and its constants.
MAX_WEIGHT_BYTES = 2_000_000_000

RunModel = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class CalibratedDetector(nn.Module):
    """uint8[N, S, S, 3] in, logit and p_fake out: float32[N] both."""

    def __init__(self, detector: Detector, temperature: float) -> None:
        super().__init__()
        self.detector = detector
        self.temperature = temperature

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logit = self.detector.find_logit(images)
        return logit, torch.sigmoid(logit / self.temperature)


def check_onnx_packages() -> None:
    """Raise UsageError when a package that an export needs is missing."""
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is a folder of that name
            raise UsageError(
                f'an .onnx file needs the package {name}: pip install "cifake-ray[onnx]"'
            )


def encode_onnx(detector: Detector, temperature: float, properties: Mapping[str, str]) -> bytes:
    """Return a detector as an ONNX model with these metadata properties.

    It takes `images`, uint8[N, S, S, 3] as of `Preprocessing.load_image`, N chosen by the caller,
    and gives `logit` and the calibrated `p_fake`, float32[N]; of a detector of crops those of each
    crop, and an image's `p_fake` is sigmoid(mean of its logits / temperature). UsageError for a
    network of more than 2 GB, CifakeError for one that torch cannot export.
    """
    num_bytes = sum(tensor.nbytes for tensor in detector.state_dict().values())
    if num_bytes > MAX_WEIGHT_BYTES:
        raise UsageError(
            f"{detector.architecture} has {num_bytes / 1e9:.1f} GB of weights, and an .onnx file"
            f" holds {MAX_WEIGHT_BYTES / 1e9:.1f} GB; choose a bundle of a smaller network"
        )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    size = detector.preprocessing.image_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                CalibratedDetector(detector, temperature).eval(),
                (example,),
                input_names=["images"],
                output_names=["logit", "p_fake"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise CifakeError(
            f"{detector.architecture}: torch cannot export it as ONNX"
            f" ({str(error).strip().splitlines()[0]}); choose a bundle of another architecture"
        ) from error
    assert program is not None
    # Torch's own hold source lines and paths of this machine.
    model = ClearMetadataAndDocStringPass()(program.model).model
    model.metadata_props.update(properties)
    data: bytes = program.model_proto.SerializeToString()
    return data


def load_onnx(data: bytes) -> RunModel:
    """Return a function that runs a model of `encode_onnx`: images to logit and p_fake.

    CifakeError when ONNX Runtime cannot run the model.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except (
        errors.Fail,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NotImplemented,
    ) as error:
        raise CifakeError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the model"
            f" ({str(error).splitlines()[0]}); choose a bundle of another architecture"
        ) from error

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logit, p_fake = session.run(["logit", "p_fake"], {"images": images})
        return logit, p_fake

    return run
