"""Tell all ranks which images do not decode: of streamed ones, each rank meets its own."""

from __future__ import annotations

import torch
import torch.distributed as dist

from cifake_ray.core.schema import IMAGE_ERRORS


def share_errors(errors: dict[int, str], num_images: int, device: str) -> None:
    """Add to the errors, by the image's number below `num_images`, those of all other ranks.

    Every rank must call it. As numbers: pickles from a socket would run code.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    total = torch.tensor([len(errors)], device=device)
    dist.all_reduce(total)
    if not total.item():
        return
    codes = torch.zeros(num_images, dtype=torch.uint8)
    for number, error in errors.items():
        codes[number] = 1 + IMAGE_ERRORS.index(error)
    codes = codes.to(device)
    dist.all_reduce(codes, dist.ReduceOp.MAX)
    for number in codes.nonzero().ravel().tolist():
        errors[number] = IMAGE_ERRORS[int(codes[number]) - 1]
