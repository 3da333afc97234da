"""The settings of a run: which of them make it another run, and how two differ."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from cifake_ray.config import VERBS
from cifake_ray.core.schema import SCHEMA_VERSION
from cifake_ray.errors import RunMismatch
from cifake_ray.storage.bundles.built_ins import FIRST_BUILT_IN
from cifake_ray.storage.io.paths import AnyPath

# What runs of before did, whose settings lack these names.
BEFORE = {"score": {"precision": "float32"}, "evaluate": {"precision": "float32"}}


def describe_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return `epochs: 5 there, 6 here` for every setting that differs."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return "; ".join(
        f"{name}: {_show_setting(old.get(name))} there, {_show_setting(new.get(name))} here"
        for name in names
    )


def _show_setting(value: Any) -> str:
    return "not given" if value in (None, []) else repr(value)


def name_detector(config: dict[str, Any]) -> str:
    """Return how the config of a run names its detector: `built-in cifake`, or a bundle's URI."""
    bundle = str(config.get("bundle") or FIRST_BUILT_IN)
    return bundle if "/" in bundle else f"built-in {bundle}"


def describe_detector(settings: dict[str, Any], config: dict[str, Any]) -> str:
    """Return what scored a run: its bundle, the start of its identity, and the precision."""
    bundle, precision = settings.get("bundle"), settings.get("precision", "float32")
    return f"{name_detector(config)} ({str(bundle)[:12]}), in {precision}"


def check_settings(out: AnyPath, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise RunMismatch with the difference when the folder belongs to other settings.

    An option that one side does not have, since its version has no such option, has its default.
    """
    if old.get("command") != new["command"]:  # nothing else is comparable
        old, new = ({"command": settings.get("command")} for settings in (old, new))
    else:
        old, new = (_add_defaults(new["command"], *pair) for pair in ((old, new), (new, old)))
    if old != new:
        remedy = "choose a new output folder, or give the same settings"
        if new["command"] == "train" and {**old, "epochs": new.get("epochs")} == new:
            remedy = (
                "its learning rates follow from its epochs; to train on from its result, choose a"
                f" new folder and give --weights {out / 'bundle'}"
            )
        raise RunMismatch(
            f"{out} belongs to another run ({describe_difference(old, new)}); {remedy}"
        )


def _add_defaults(command: str, settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the default of each option that only the other ones have."""
    defaults = {field.name: field.default for field in fields(VERBS[command])}
    defaults |= BEFORE.get(command, {})
    absent = {
        name: list(default) if isinstance(default, tuple) else default
        for name, default in defaults.items()
        if name in other and default is not MISSING
    }
    settings = {**absent, **settings}
    if isinstance(settings.get("recipe"), dict):  # the options of the trainings of a search
        settings["recipe"] = _add_defaults("train", settings["recipe"], other.get("recipe") or {})
    return settings


def identify_run(command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a fingerprint covers: two runs are the same if these are."""
    return {"command": command, "schema_version": SCHEMA_VERSION, **settings}
