"""Classifiers of timm and transformers that others have trained, as a Detector's network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from cifake_ray.errors import UsageError

UNSAFE_SETTINGS = ("auto_map", "dtype", "torch_dtype", "quantization_config")


class TwoOutputs(nn.Module):
    """A classifier whose outputs are [z_REAL, z_FAKE]: float32[B, 3, S, S] -> float32[B, 2].

    Of a classifier with one output that is [0, z], or [0, -z] where it means REAL.
    """

    def __init__(self, classifier: nn.Module, fake_output: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.fake_output = fake_output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.classifier(images)
        outputs: torch.Tensor = getattr(found, "logits", found)  # of transformers
        if outputs.shape[-1] == 1:
            outputs = torch.cat([torch.zeros_like(outputs), outputs], dim=-1)
        return outputs if self.fake_output else outputs.flip(-1)


def build_timm_classifier(
    architecture: str,
    num_outputs: int,
    options: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
) -> nn.Module:
    """Return a network of timm with these weights.

    ValueError, TypeError, RuntimeError or AssertionError when they are not those of the network.
    """
    import timm

    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no {architecture}")
    options = {**options, "num_classes": num_outputs, "pretrained": False}
    with torch.device("meta"), _limit_parameters(len(state)):
        network: nn.Module = timm.create_model(architecture, **options)
    network.load_state_dict(state, assign=True)
    network = timm.create_model(architecture, **options)
    network.load_state_dict(state)
    return network


@contextmanager
def _limit_parameters(num_tensors: int) -> Iterator[None]:
    """Raise ValueError when networks get far more parameters than a file has tensors.

    A config can ask for any number of layers, which take time and memory even on torch's `meta`.
    """
    count = 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None
        if count > 2 * num_tensors + 100:  # some are registered twice, or tied and stored once
            raise ValueError(f"more than {count - 1:,} parameters, the file has {num_tensors:,}")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _drop_unsafe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of transformers without what would fetch or run code, or change numbers."""
    return {
        name: _drop_unsafe(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in UNSAFE_SETTINGS and "implementation" not in name
    }


def build_transformers_classifier(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> nn.Module:
    """Return a network of transformers with these weights. No code of others runs.

    UsageError when transformers is not installed; errors as `build_timm_classifier`.
    """
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ImportError as error:
        raise UsageError(
            "this bundle is a classifier of transformers, which is not installed: pip install"
            ' "cifake-ray[transformers]"'
        ) from error
    transformers.utils.logging.disable_progress_bar()
    try:
        found = transformers.AutoConfig.for_model(**_drop_unsafe(config))
    except StrictDataclassError as error:  # a value of a wrong type
        raise ValueError(str(error)) from error
    with torch.device("meta"), _limit_parameters(len(state)):
        blank = transformers.AutoModelForImageClassification.from_config(found)
    asked, given = (sum(t.numel() for t in each) for each in (blank.parameters(), state.values()))
    if asked > given:
        raise ValueError(f"{asked:,} weights, the file has {given:,}")
    network: nn.Module
    network, report = type(blank).from_pretrained(
        None,
        config=found,
        state_dict=dict(state),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, whose error names none of them
    )
    wrong = [f"{what}: {', '.join(map(str, names))}" for what, names in report.items() if names]
    if wrong:
        raise ValueError("; ".join(wrong))
    return network
