"""Read and write weights: safetensors, which cannot run code, and pickles only by permission."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, deserialize

from cifake_ray.errors import BundleError
from cifake_ray.storage.io.files import exists, list_folder
from cifake_ray.storage.io.paths import AnyPath

if TYPE_CHECKING:
    import torch

    from cifake_ray.core.models.detector import Detector

WEIGHTS_NAME = "model.safetensors"
CHECKPOINT_NAMES = ("state_dict", "model_state_dict", "model", "network", "net", "params")
# What the unpickler of torch raises for bytes that are no checkpoint.
UNPICKLING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def find_weights(bundle: AnyPath, allow_pickle: bool) -> str:
    """Return the name of the file with the weights. BundleError when there is no usable one."""
    if exists(bundle / WEIGHTS_NAME):
        return WEIGHTS_NAME
    found = [p.name for p in list_folder(bundle) if p.suffix.lower() in PICKLE_SUFFIXES]
    if not found:
        raise BundleError(
            f"{bundle}: no {WEIGHTS_NAME}; give the bundle folder of a finished training run"
        )
    check_pickle(bundle / found[0], allow_pickle)
    if len(found) > 1:
        raise BundleError(
            f"{bundle}: several files of weights ({', '.join(found)}); leave one of them there"
        )
    return found[0]


def check_pickle(path: AnyPath, allow_pickle: bool) -> None:
    """Raise BundleError for weights that are a pickle, unless it is allowed."""
    if path.suffix != ".safetensors" and not allow_pickle:
        raise BundleError(
            f"{path}, a pickle, which may hold code, is not read; save it as {WEIGHTS_NAME} or, if"
            " you trust who made it, give --allow-pickle"
        )


def check_weights(
    path: AnyPath, data: bytes, architecture: str, others: Collection[str] = ()
) -> None:
    """Raise BundleError unless safetensors can read `data` and it names no other architecture.

    It may name one of `others`, whose weights the architecture can start from.
    It takes as much memory again as `data`. Pickles are not checked here: that takes torch.
    """
    if path.suffix != ".safetensors":
        return
    try:
        deserialize(data)  # type: ignore[no-untyped-call]  # there is no check that copies nothing
    except SafetensorError as error:
        raise BundleError(f"{path}: damaged ({error}); copy or train the bundle again") from error
    written_for = read_architecture(data) or architecture
    if written_for != architecture and written_for not in others:
        raise BundleError(
            f"{path}: the weights of {written_for}, not the weights of {architecture}, which"
            " config.json names; copy or train the bundle again"
        )


def read_architecture(data: bytes) -> str | None:
    """Return what `encode_weights` wrote into safetensors; None in those of other programs."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: str | None = (header.get("__metadata__") or {}).get("architecture")
    return found


def load_weights(path: AnyPath, data: bytes) -> Mapping[str, torch.Tensor]:
    """Return the tensors by name, on the CPU. BundleError when `data` holds anything else."""
    import torch
    from safetensors.torch import load

    try:
        if path.suffix == ".safetensors":
            state: Any = load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            for name in CHECKPOINT_NAMES:  # the weights among other things of a checkpoint
                if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
                    state = state[name]
        if not isinstance(state, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor)
            for name, tensor in state.items()
        ):
            raise ValueError("not a mapping of names to tensors")
    except (SafetensorError, *UNPICKLING_ERRORS) as error:
        raise BundleError(
            f"{path}: damaged, or not weights alone ({type(error).__name__}); copy or train the"
            " bundle again, or save its weights as safetensors"
        ) from error
    return state


def encode_weights(detector: Detector) -> bytes:
    """Return the weights of a detector as safetensors: the same bytes for the same weights."""
    from safetensors.torch import save

    weights = {name: t.contiguous().cpu() for name, t in detector.network.state_dict().items()}
    # One entry only: safetensors writes several in an order that changes from run to run.
    return bytes(save(weights, metadata={"architecture": detector.architecture}))
