"""Choose what suits a device: its fastest precision, and the images it takes at once."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifake_ray.errors import UsageError

# Multiply-accumulates in a batch: seconds on a CPU core, memory on a GPU.
BATCH_MACS = {"cpu": 32e9, "cuda": 1e12}


@dataclass(frozen=True)
class DevicePrecision:
    """The device and the precision of the training loop."""

    device: str
    dtype: torch.dtype  # float32 means no autocast

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
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if device == "cpu" and precision == "fp16":
        raise UsageError("--precision fp16 needs a GPU; use float32 or bf16")
    return DevicePrecision(device, dtypes[precision])


def count_macs(network: nn.Module, image_size: int) -> int:
    """Return the multiply-accumulates for an image, counted without computing them.

    Those of convolutions, matrix products and attention, on a copy on torch's meta device.
    """
    # The counter hooks into all that has a gradient, which breaks some networks.
    network = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size, device="meta"))
    flops: int = counter.get_total_flops()  # two for each multiply-accumulate
    return flops // 2


def choose_batch_size(macs: int, device: str, most: int) -> int:
    """Halve `most` for a network of `macs` an image, but to 2 at least, for batch norms."""
    while most > 2 and most * macs > BATCH_MACS[device]:
        most //= 2
    return most
