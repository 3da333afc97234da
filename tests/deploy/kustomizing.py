"""What `kubectl kustomize FOLDER` prints, for the part of kustomize that deploy/kuberay uses.

A key or an operation that is not known here is an error, so nothing is left out in silence. Where
kubectl is installed, test_manifests.py compares the two.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPLAYED = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}
REPLAYED |= {"replacements"}
CLUSTER_WIDE = {"Namespace"}
LOCAL = "config.kubernetes.io/local-config"

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """The manifests of a folder, in no particular order; the caller may change them."""
    return copy.deepcopy(_render(folder.resolve()))


@cache
def _render(folder: Path) -> list[Manifest]:
    return _accumulate(folder, [])


def _accumulate(folder: Path, manifests: list[Manifest]) -> list[Manifest]:
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert settings.keys() <= REPLAYED, f"{folder}: {sorted(settings.keys() - REPLAYED)}"
    for name in settings.get("resources", []):
        path = folder / name
        if path.is_dir():
            manifests = manifests + _accumulate(path.resolve(), [])
        else:
            assert path.resolve().is_relative_to(folder), f"kustomize reads no file above {folder}"
            manifests = manifests + list(yaml.safe_load_all(path.read_text()))
    for name in settings.get("components", []):
        manifests = _accumulate((folder / name).resolve(), manifests)
    for patch in settings.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        for manifest in _select(manifests, patch["target"]):
            for operation in yaml.safe_load(text):
                _apply(manifest, operation)
    if namespace := settings.get("namespace"):
        for manifest in manifests:
            if manifest["kind"] not in CLUSTER_WIDE:
                manifest["metadata"]["namespace"] = namespace
    for image in settings.get("images", []):
        for container in (c for manifest in manifests for c in find_containers(manifest)):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    for replacement in settings.get("replacements", []):
        _replace(manifests, replacement)
    return [m for m in manifests if m["metadata"].get("annotations", {}).get(LOCAL) != "true"]


def _select(manifests: list[Manifest], target: dict[str, str]) -> list[Manifest]:
    assert target.keys() == {"kind"}, target
    chosen = [manifest for manifest in manifests if manifest["kind"] == target["kind"]]
    assert chosen, f"no {target['kind']} to change"
    return chosen


def _apply(document: Any, operation: dict[str, Any]) -> None:
    """One operation of a JSON Patch (RFC 6902). Its parent must exist."""
    *parents, last = [
        key.replace("~1", "/").replace("~0", "~") for key in operation["path"].split("/")[1:]
    ]
    for key in parents:
        document = document[int(key) if isinstance(document, list) else key]
    place: Any = last
    if isinstance(document, list):
        place = len(document) if last == "-" else int(last)
    if operation["op"] == "add" and isinstance(document, list):
        document.insert(place, copy.deepcopy(operation["value"]))
    elif operation["op"] == "add":
        document[place] = copy.deepcopy(operation["value"])
    elif operation["op"] == "replace":
        assert document[place] is not None
        document[place] = copy.deepcopy(operation["value"])
    elif operation["op"] == "remove":
        del document[place]
    else:
        assert operation["op"] == "test", operation
        assert document[place] == operation["value"], operation


def _replace(manifests: list[Manifest], replacement: dict[str, Any]) -> None:
    source = replacement["source"]
    [manifest] = _select(manifests, {"kind": source["kind"]})
    *parents, last = _split(source["fieldPath"])
    value = _walk(manifest, parents)[last]
    for target in replacement["targets"]:
        for manifest in _select(manifests, target["select"]):
            for field_path in target["fieldPaths"]:
                *parents, last = _split(field_path)
                place = _walk(manifest, parents)
                assert last in place or target.get("options") == {"create": True}, field_path
                place[last] = copy.deepcopy(value)


def _split(field_path: str) -> list[str]:
    return re.findall(r"\[[^\]]+\]|[^.]+", field_path)


def _walk(document: Any, keys: list[str]) -> Any:
    for key in keys:
        if key.startswith("["):  # [name=value] picks an item of a list
            name, value = key[1:-1].split("=")
            [document] = [item for item in document if item[name] == value]
        else:
            document = document[key]
    return document


def find_containers(document: Any) -> Iterator[dict[str, Any]]:
    """Every container of every pod spec inside."""
    for pod in find_pod_specs(document):
        yield from pod.get("initContainers", [])
        yield from pod["containers"]


def find_pod_specs(document: Any) -> Iterator[dict[str, Any]]:
    """Every pod spec inside."""
    values: Any = document if isinstance(document, list) else []
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        values = document.values()
    for value in values:
        yield from find_pod_specs(value)
