"""Weights of a bundle: safetensors, which cannot run code, and pickles only by permission.

Floor: storage.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cifake_ray.errors import BundleError
from cifake_ray.storage.io.files import exists, list_folder
from cifake_ray.storage.io.paths import AnyPath

if TYPE_CHECKING:
    import torch

    from cifake_ray.core.models.detector import Detector

WEIGHTS_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_HEADER_BYTES = 100 * 10**6  # as safetensors itself
# Bytes of one element. Source: the README of safetensors, format.
ELEMENT_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


def find_weights(bundle: AnyPath, allow_pickle: bool) -> str:
    """The name of the file with the weights. BundleError when there is none that may be used."""
    if exists(bundle / WEIGHTS_NAME):
        return WEIGHTS_NAME
    found = [p.name for p in list_folder(bundle) if p.suffix.lower() in PICKLE_SUFFIXES]
    if not found:
        raise BundleError(
            f"{bundle}: no {WEIGHTS_NAME}; give the bundle folder of a finished training run"
        )
    if not allow_pickle:
        raise BundleError(
            f"{bundle}: no {WEIGHTS_NAME}, only {found[0]}, a pickle, which may hold code; save it"
            " as safetensors or, if you trust who made it, give --allow-pickle"
        )
    if len(found) > 1:
        raise BundleError(
            f"{bundle}: several files of weights ({', '.join(found)}); leave one of them there"
        )
    return found[0]


def check_weights(place: AnyPath, data: bytes, architecture: str) -> None:
    """BundleError unless the header fits to the bytes that follow it; no tensor is made.

    Pickles are not looked into: that takes torch.
    """
    if place.suffix != ".safetensors":
        return
    try:
        written_for = _check_header(data)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{place}: damaged ({type(error).__name__}: {error}); copy or train the bundle again"
        ) from error
    if written_for not in (None, architecture):
        raise BundleError(
            f"{place}: the weights of {written_for}, not the weights of {architecture}, which"
            " config.json names; copy or train the bundle again"
        )


def _check_header(data: bytes) -> str | None:
    """The architecture that the header names, if any."""
    size_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size_bytes <= min(len(data) - 8, MAX_HEADER_BYTES):
        raise ValueError(f"no header in {len(data)} bytes")
    header = json.loads(data[8 : 8 + size_bytes])
    architecture: str | None = header.pop("__metadata__", {}).get("architecture")
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = tensor["data_offsets"]
        num_bytes = math.prod(tensor["shape"]) * ELEMENT_BYTES[tensor["dtype"]]
        if (start, stop) != (end, end + num_bytes):
            raise ValueError(f"{name} lies at {start}..{stop}, not at {end}..{end + num_bytes}")
        end = stop
    if 8 + size_bytes + end != len(data):
        raise ValueError(f"{len(data)} bytes, {8 + size_bytes + end} expected")
    return architecture


def load_weights(place: AnyPath, data: bytes) -> Mapping[str, torch.Tensor]:
    """Tensors by name, on the CPU. BundleError when the bytes are no such thing."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        if place.suffix == ".safetensors":
            state: Any = load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in state.items()
        ):
            raise ValueError("not a mapping of names to tensors")
    except (
        SafetensorError,
        pickle.UnpicklingError,
        # What the unpickler of torch raises for bytes that are no checkpoint.
        ArithmeticError,
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise BundleError(
            f"{place}: damaged, or not weights alone ({type(error).__name__}); copy or train the"
            " bundle again, or save its weights as safetensors"
        ) from error
    return state


def encode_weights(detector: Detector) -> bytes:
    """The weights of a detector as safetensors; the same bytes for the same weights."""
    from safetensors.torch import save

    weights = {name: t.contiguous().cpu() for name, t in detector.network.state_dict().items()}
    # One entry only: safetensors writes several in an order that changes from run to run.
    return bytes(save(weights, metadata={"architecture": detector.architecture}))
