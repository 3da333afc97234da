"""Choose what suits a device: its fastest precision, and the images it takes at once."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cifake_ray.config import TrainConfig
from cifake_ray.core.models.detector import Detector
from cifake_ray.errors import UsageError

# Multiply-accumulates in a batch: seconds on a CPU core, and memory. Of timm's networks up to 1,024
# pixels, those that need most memory for these hold about 1 GB at once on a CPU, 8 GB on a GPU.
BATCH_MACS = {"cpu": 32e9, "cuda": 256e9}
MAX_EVAL_BATCH = 256  # images of a forward pass without gradients; fewer of large networks

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DevicePrecision:
    """The device and the precision of the training loop."""

    device: str
    name: str  # one of DTYPES; float32 means no autocast

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device, self.dtype)


def choose_precision(device: str, precision: str) -> DevicePrecision:
    """Return the precision; `auto` is bf16 if the device has it, else float32 on CPU, fp16 on GPU.

    A CPU that has it has AMX or AVX512-BF16; others emulate it, slowly. Intel's without AMX have
    the instruction, but convolve with it at half of float32's speed (measured).
    """
    if precision == "auto":
        if device == "cpu":
            can = torch.cpu.get_capabilities()
            is_intel = "Intel" in str(can.get("cpu_name"))
            has_bf16 = can.get("amx_bf16") or (can.get("avx512_bf16") and not is_intel)
            precision = "bf16" if has_bf16 else "float32"
        else:
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp16"
    if device == "cpu" and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; use float32 or bf16")
    return DevicePrecision(device, precision)


def agree_on_precision(device: str, precision: str) -> DevicePrecision:
    """Return rank 0's choice on every rank: the processors of nodes may differ."""
    chosen = choose_precision(device, precision).name
    if dist.is_available() and dist.is_initialized():
        # As a number: pickles from a socket would run code.
        number = torch.tensor([list(DTYPES).index(chosen)], device=device)
        dist.broadcast(number, 0)
        chosen = list(DTYPES)[int(number)]
    return choose_precision(device, chosen)


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's own counts of what is computed inside.

    So does its FlopCounterMode, but that imports torch's compiler, to keep it out, for a second.
    """

    num_flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.num_flops += count(*args, **(kwargs or {}), out_val=outputs)
        return outputs


def count_macs(network: nn.Module, image_size: int) -> int:
    """Return the multiply-accumulates for an image, counted while one is computed.

    Those of convolutions, matrix products and attention.
    """
    was_training, device = network.training, next(network.parameters()).device
    network.eval()
    counter = _FlopCounter()  # type: ignore[no-untyped-call]
    # Fused attention is not among torch's counts on every device.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        # Not `network(...)`, which `--compile` may have replaced.
        network.forward(torch.zeros(1, 3, image_size, image_size, device=device))
    network.train(was_training)
    num_macs: int = counter.num_flops // 2
    return num_macs


def check_batch_share(
    detector: Detector, config: TrainConfig, *, device: str, num_images: int, num_ranks: int
) -> None:
    """Raise UsageError when a rank would train on no image at once, or on one that is too few.

    One is too few for a batch norm that sees a single pixel of it, unless the ranks share it.
    """
    share = min(config.batch_size, num_images) // num_ranks  # of the rank that gets fewest
    if share == 0:
        raise UsageError(
            f"--num-workers: {num_images} images are too few for {num_ranks} workers, each of which"
            " needs one of every batch; lower it"
        )
    is_synced = device != "cpu" and num_ranks > 1  # see `sync_batch_norms`
    if is_synced or share // min(config.grad_accum, share) > 1:
        return
    network = copy.deepcopy(detector.network).to("meta").train().requires_grad_(False)
    size = config.train_size or detector.preprocessing.image_size
    try:
        network(torch.zeros(1, 3, size, size, device="meta"))
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise UsageError(
            f"the batch norms of {config.model} at {size} pixels need 2 images at once and get 1:"
            f" --batch-size {config.batch_size}, --num-workers {num_ranks}, --grad-accum"
            f" {config.grad_accum}; raise the first or lower the others"
        ) from error


def choose_eval_batch_size(network: nn.Module, image_size: int, device: str) -> int:
    """Return how many images a network validates or scores at once, so that memory is bounded."""
    return choose_batch_size(count_macs(network, image_size), device, MAX_EVAL_BATCH)


def choose_batch_size(macs: int, device: str, most: int) -> int:
    """Halve `most` for a network of `macs` an image, but to 2 at least, for batch norms."""
    while most > 2 and most * macs > BATCH_MACS[device]:
        most //= 2
    return most
