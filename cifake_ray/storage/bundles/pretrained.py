"""Load the weights that training starts from: a file, timm's layout, a bundle or timm's hub.

Everything must fit except the classifier, which may be for other classes: it then keeps its fresh
weights, and the log reports it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cifake_ray.config import TrainConfig
from cifake_ray.errors import BundleError
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.weights import (
    check_pickle,
    check_weights,
    find_weights,
    load_weights,
)
from cifake_ray.storage.io.files import exists, is_file, read_bytes
from cifake_ray.storage.io.paths import AnyPath

if TYPE_CHECKING:
    import torch

    from cifake_ray.core.models.detector import Detector

NUM_SHOWN = 3  # names in a message
# What training programs call the network that they train.
WRAPPERS = ("module", "model", "backbone", "network", "net", "encoder", "base_model", "_orig_mod")


@dataclass(frozen=True, kw_only=True)
class StartingWeights:
    """The weights that were loaded into a fresh detector, and their source."""

    source: str
    digest: str  # sha256 of names, shapes and values, whatever the file format
    num_loaded: int  # tensors
    fresh: tuple[str, ...]  # names in the classifier that were not loaded
    dropped: str = ""  # what stood before the names of the network
    num_left_out: int = 0  # tensors of stages that the network does not have

    def __str__(self) -> str:
        fresh = ", ".join(self.fresh)
        rest = f"; the classifier is fresh: {fresh}" if fresh else ", the classifier too"
        names = f" (named {self.dropped}...)" if self.dropped else ""
        count = f"{self.num_loaded} tensors"
        if self.num_left_out:
            count += f" (and not {self.num_left_out} of later stages)"
        return f"{count} from {self.source}{names}{rest}"


def load_starting_weights(config: TrainConfig, detector: Detector) -> StartingWeights | None:
    """Load the weights of `--weights` or `--pretrained` into a fresh detector; None for neither.

    A folder's mean and deviation are used too. BundleError when the weights cannot be read or
    fetched, or do not fit.
    """
    if config.pretrained:
        state = _fetch_pretrained(config, detector)
        return _load_fitting(detector, state, source="timm's hub", fresh_head=True)
    if config.weights is None:
        return None
    path = locate_bundle(config.weights, config.store)
    if path.suffix == ".safetensors" or is_file(path):
        check_pickle(path, config.allow_pickle)
        state = _read_state(path, config.model)
    else:
        cfg = _read_pretrained_cfg(path, config.model)
        state = _read_state(path / find_weights(path, config.allow_pickle), config.model)
        own = detector.preprocessing
        mean, std = (tuple(cfg.get(name, getattr(own, name))) for name in ("mean", "std"))
        detector.set_preprocessing(replace(own, mean=mean, std=std))
    return _load_fitting(detector, state, source=str(path), fresh_head=False)


def _read_state(path: AnyPath, architecture: str) -> Mapping[str, torch.Tensor]:
    from cifake_ray.core.models.small_networks import list_weight_sources

    data = read_bytes(path)
    check_weights(path, data, architecture, list_weight_sources(architecture))
    return load_weights(path, data)


def _drop_wrappers(
    state: Mapping[str, torch.Tensor], own: Collection[str]
) -> tuple[Mapping[str, torch.Tensor], str]:
    """Return the state under the names of a network, and what was dropped before them.

    Training programs save a network as a part of their own module: `module.conv1.weight`.
    """
    renamed: dict[str, torch.Tensor] = {}
    dropped = set()
    for name, tensor in state.items():
        short = name
        while short not in own and short.partition(".")[0] in WRAPPERS:
            short = short.partition(".")[2]
        if short != name and short in own:
            dropped.add(name.removesuffix(short))
        else:
            short = name
        if short in renamed:  # such as a teacher and its student: which one is meant?
            return state, ""
        renamed[short] = tensor
    return renamed, ", ".join(sorted(dropped))


def _read_pretrained_cfg(folder: AnyPath, architecture: str) -> dict[str, Any]:
    """Return timm's `pretrained_cfg` of a folder. BundleError for another architecture."""
    path = folder / "config.json"
    if not exists(path):
        raise BundleError(
            f"{folder}: no config.json; --weights takes a .safetensors file, a folder in timm's"
            " layout or a bundle"
        )
    try:
        config = json.loads(read_bytes(path))
        found, cfg = config["architecture"], dict(config.get("pretrained_cfg", {}))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path}: names no architecture of timm ({type(error).__name__}: {error}); give the"
            " folder of a timm model or a bundle"
        ) from error
    from cifake_ray.core.models.small_networks import list_weight_sources

    if found not in list_weight_sources(architecture):
        raise BundleError(f"{folder}: the weights of {found}; give --model {found}")
    return cfg


def _fetch_pretrained(config: TrainConfig, detector: Detector) -> Mapping[str, torch.Tensor]:
    """Return timm's weights for the architecture; timm fits them to the input size."""
    import timm

    cfg = timm.models.get_pretrained_cfg(config.model)
    if cfg is None or not cfg.has_weights:
        raise BundleError(f"--pretrained: timm has no weights of {config.model}; leave it out")
    size = detector.preprocessing.image_size
    options: dict[str, Any] = {"img_size": size} if cfg.fixed_input_size else {}
    try:
        network = timm.create_model(config.model, pretrained=True, num_classes=2, **options)
    except (OSError, RuntimeError) as error:  # what the hub raises are OSErrors
        raise BundleError(
            f"--pretrained: the weights of {config.model} cannot be fetched from timm's hub"
            f" ({type(error).__name__}); that takes the network once; else give --weights FILE"
        ) from error
    state: dict[str, torch.Tensor] = network.state_dict()
    return state


def _fit_positions(
    network: torch.nn.Module, state: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Resample a vision transformer's position embeddings to its input size, as timm does."""
    from timm.layers import resample_abs_pos_embed  # type: ignore[attr-defined]
    from timm.models import VisionTransformer

    from cifake_ray.core.models.small_networks import WithResidual

    name = "pos_embed"
    if isinstance(network, WithResidual):
        network = network.network
        if f"network.{name}" in state:  # of such a network too
            name = f"network.{name}"
    positions = state.get(name)
    if not isinstance(network, VisionTransformer) or positions is None or positions.ndim != 3:
        return state
    num_prefix = 0 if network.no_embed_class else network.num_prefix_tokens
    if math.isqrt(positions.shape[1] - num_prefix) ** 2 + num_prefix != positions.shape[1]:
        return state
    resampled: torch.Tensor = resample_abs_pos_embed(
        positions, list(network.patch_embed.grid_size), num_prefix_tokens=num_prefix
    )
    return {**state, name: resampled}


def _load_fitting(
    detector: Detector, state: Mapping[str, torch.Tensor], *, source: str, fresh_head: bool
) -> StartingWeights:
    """Load everything except what does not fit in the classifier, with `fresh_head` all of it.

    BundleError when anything else does not fit.
    """
    from cifake_ray.core.models.detector import find_head
    from cifake_ray.core.models.small_networks import fit_state

    own = detector.network.state_dict(keep_vars=True)
    state, dropped = _drop_wrappers(state, {*own, *(n.removeprefix("network.") for n in own)})
    fitted = fit_state(detector.network, _fit_positions(detector.network, state))
    num_left_out, state = len(state) - len(fitted), fitted
    in_head = {id(t) for t in find_head(detector.network).state_dict(keep_vars=True).values()}
    head = {name for name, tensor in own.items() if id(tensor) in in_head}
    fits = {name: t for name, t in state.items() if name in own and t.shape == own[name].shape}
    loaded = {name: t for name, t in fits.items() if not (fresh_head and name in head)}
    wrong = {
        "missing": sorted(own.keys() - state.keys() - head),
        "of another shape": sorted((own.keys() & state.keys()) - fits.keys() - head),
        "unknown": sorted(state.keys() - own.keys()),
    }
    if any(wrong.values()):
        listed = "; ".join(
            f"{len(names)} {what} ({', '.join([*names[:NUM_SHOWN], '...'][: len(names)])})"
            for what, names in wrong.items()
            if names
        )
        raise BundleError(
            f"{source}: not the weights of {detector.architecture} at"
            f" {detector.preprocessing.image_size} pixels: {listed}; another --model or"
            " --image-size?"
        )
    detector.network.load_state_dict({**own, **loaded})
    digest = hashlib.sha256()
    for name in sorted(loaded):
        values = loaded[name].detach().cpu().float().contiguous().numpy()
        digest.update(f"{name}{values.shape}".encode() + values.tobytes())
    return StartingWeights(
        source=source,
        digest=digest.hexdigest(),
        num_loaded=len(loaded),
        fresh=tuple(sorted(own.keys() - loaded.keys())),
        dropped=dropped,
        num_left_out=num_left_out,
    )
