"""What is deployed on Kubernetes: it is what KubeRay takes, and what the command line takes."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import parse_entrypoint
from every import for_every
from kustomizing import Manifest, find_containers, find_pod_specs, render

import cifake_ray

PROJECT = Path(cifake_ray.__file__).parents[1]
KUBERAY = PROJECT / "deploy" / "kuberay"
VERBS = ["convert", "train", "tune", "evaluate", "score", "pipeline"]
FOLDERS = ["overlays/cpu", "overlays/gpu", *(f"jobs/{verb}" for verb in VERBS)]
OURS = {"RayCluster": "kuberay-v1-rayclusters.json", "RayJob": "kuberay-v1-rayjobs.json"}
KUBERNETES = "1.33"


def manifests_of(folder: str) -> dict[str, list[Manifest]]:
    """Kind -> manifests."""
    kinds: dict[str, list[Manifest]] = {}
    for manifest in render(KUBERAY / folder):
        kinds.setdefault(manifest["kind"], []).append(manifest)
    return kinds


def cluster_of(folder: str) -> dict[str, Any]:
    """The spec of the one Ray cluster that a folder makes."""
    kinds = manifests_of(folder)
    jobs, clusters = kinds.get("RayJob", []), kinds.get("RayCluster", [])
    [spec] = [j["spec"]["rayClusterSpec"] for j in jobs] + [c["spec"] for c in clusters]
    assert isinstance(spec, dict)
    return spec


def job_of(verb: str) -> dict[str, Any]:
    [job] = manifests_of(f"jobs/{verb}")["RayJob"]
    assert job["metadata"]["name"] == verb
    spec = job["spec"]
    assert isinstance(spec, dict)
    return spec


@cache
def read_schema(kind: str) -> jsonschema.protocols.Validator:
    """KubeRay's schema, for which a field that it does not know is an error."""
    path = Path(os.environ.get("CIFAKE_TEST_SCHEMAS", "")) / OURS[kind]
    if not path.is_file():
        pytest.skip(f"CIFAKE_TEST_SCHEMAS names no folder with {OURS[kind]}")
    schema = json.loads(path.read_text())
    forbid_unknown(schema)
    return jsonschema.Draft202012Validator(schema)


def forbid_unknown(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
        for name, part in schema.items():
            for inner in part.values() if name == "properties" else [part]:
                forbid_unknown(inner)
    elif isinstance(schema, list):
        for part in schema:
            forbid_unknown(part)


def test_every_kustomization_is_in_use() -> None:
    found = {path.parent for path in KUBERAY.rglob("kustomization.yaml")}
    used = {KUBERAY / folder for folder in FOLDERS}
    assert found == used | {KUBERAY / "base", KUBERAY / "own-cluster"}
    files = {path for path in KUBERAY.rglob("*") if path.is_file()}
    named = {path / "kustomization.yaml" for path in found}
    for folder in found:
        settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
        names = [*settings.get("resources", [])]
        names += [patch["path"] for patch in settings.get("patches", []) if "path" in patch]
        named |= {folder / name for name in names if name.endswith(".yaml")}
    assert files == named


@for_every(FOLDERS)
def test_kustomize_itself_prints_what_these_tests_look_at(folder: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(KUBERAY / folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def name(manifest: Manifest) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    theirs = sorted(yaml.safe_load_all(text), key=name)
    assert sorted(render(KUBERAY / folder), key=name) == theirs


@for_every(FOLDERS)
def test_kuberay_knows_every_field_of_its_kinds(folder: str) -> None:
    kinds = manifests_of(folder)
    checked = 0
    for kind in OURS.keys() & kinds.keys():
        for manifest in kinds[kind]:
            read_schema(kind).validate(manifest)
            checked += 1
    assert checked == 1


@pytest.mark.parametrize(
    ("path", "typo"),
    [
        ("spec", "shutdownAfterJobFinish"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0", "securityContexts"),
    ],
)
def test_a_field_that_is_misspelt_is_found(path: str, typo: str) -> None:
    schema = read_schema("RayJob")
    [manifest] = manifests_of("jobs/score")["RayJob"]
    schema.validate(manifest)
    broken: Any = copy.deepcopy(manifest)
    place = broken
    for key in path.split("."):
        place = place[int(key) if key.isdigit() else key]
    place[typo] = True
    with pytest.raises(jsonschema.ValidationError, match=typo):
        schema.validate(broken)


def test_a_value_that_is_misspelt_is_found() -> None:
    schema = read_schema("RayCluster")
    [manifest] = manifests_of("overlays/cpu")["RayCluster"]
    manifest["spec"]["authOptions"]["mode"] = "tokn"
    with pytest.raises(jsonschema.ValidationError, match="tokn"):
        schema.validate(manifest)


@for_every(FOLDERS)
def test_kubernetes_knows_every_field_of_the_other_kinds(folder: str) -> None:
    kinds = manifests_of(folder)
    others = [m for kind, manifests in kinds.items() if kind not in OURS for m in manifests]
    assert len(others) == 4
    for manifest in others:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for pod in find_pod_specs(list(kinds.values())):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": pod}
        kubernetes_validate.validate(as_pod, KUBERNETES, strict=True)


@for_every(FOLDERS)
def test_nothing_is_exposed(folder: str) -> None:
    kinds = manifests_of(folder)
    own = {"RayJob"} if folder.startswith("jobs/") else {"RayCluster"}
    assert kinds.keys() == {"Namespace", "ServiceAccount", "NetworkPolicy"} | own
    head = cluster_of(folder)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not {"enableIngress", "headService", "ingressOptions"} & head.keys()
    for pod in find_pod_specs(list(kinds.values())):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPort" not in p for c in pod["containers"] for p in c.get("ports", []))


@for_every(FOLDERS)
def test_only_the_namespace_and_the_operator_reach_a_pod(folder: str) -> None:
    [policy] = manifests_of(folder)["NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {}
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    inside, operator = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {}}]}
    assert operator["from"] == [
        {
            "namespaceSelector": {
                "matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"},
            },
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        }
    ]
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    targets = [to for rule in policy["spec"]["egress"] for to in rule.get("to", [])]
    for block in (to["ipBlock"] for to in targets if "ipBlock" in to):
        assert "169.254.0.0/16" in block["except"], "the node's own role"


@for_every(FOLDERS)
def test_every_cluster_wants_a_token(folder: str) -> None:
    kinds = manifests_of(folder)
    assert cluster_of(folder)["authOptions"] == {"mode": "token", "secretName": "cifake-ray-token"}
    containers = list(find_containers(list(kinds.values())))
    assert len(containers) >= 2
    for container in containers:
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert not any("TOKEN" in variable["name"] for variable in container["env"])


@for_every(FOLDERS)
def test_every_container_is_locked_in(folder: str) -> None:
    kinds = manifests_of(folder)
    pods = list(find_pod_specs(list(kinds.values())))
    assert len(pods) == 1 + len(cluster_of(folder)["workerGroupSpecs"]) + len(
        kinds.get("RayJob", [])
    )
    for pod in pods:
        user = pod["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] == 1000
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert "/tmp" in paths, "the root file system is read-only"
    autoscaler = cluster_of(folder)["autoscalerOptions"]
    for container in [*(c for pod in pods for c in pod["containers"]), autoscaler]:
        assert container["securityContext"] == {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert resources["requests"]["cpu"] == resources["limits"]["cpu"]


@for_every(FOLDERS)
def test_volumes_of_a_pod_are_bounded(folder: str) -> None:
    for pod in find_pod_specs(render(KUBERAY / folder)):
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        assert all("sizeLimit" in volume for volume in volumes.values())
        for container in pod["containers"]:
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted.keys() == volumes.keys()
            if "/dev/shm" in mounted.values():
                assert volumes["shm"]["medium"] == "Memory"


@for_every(FOLDERS)
def test_only_the_head_has_rights_in_kubernetes(folder: str) -> None:
    for pod in find_pod_specs(render(KUBERAY / folder)):
        is_head = pod["containers"][0]["name"] == "ray-head"
        assert pod.get("automountServiceAccountToken", True) is is_head


@for_every(FOLDERS)
def test_the_role_stands_in_one_place_and_keys_in_none(folder: str) -> None:
    accounts = manifests_of(folder)["ServiceAccount"]
    roles = {a["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] for a in accounts}
    assert roles == {"arn:aws:iam::ACCOUNT:role/cifake-ray"}
    names = {account["metadata"]["name"] for account in accounts}
    pods = list(find_pod_specs(render(KUBERAY / folder)))
    assert {p["serviceAccountName"] for p in pods if "serviceAccountName" in p} == names
    texts = [path.read_text() for path in KUBERAY.rglob("*.yaml")]
    assert sum(text.count("role-arn") for text in texts) == 1
    assert not any(re.search(r"AWS_|secretKeyRef|AKIA", text) for text in texts)


@for_every(FOLDERS)
def test_nothing_is_asked_of_kuberay_that_it_refuses(folder: str) -> None:
    """Rules of ValidateRayClusterSpec and ValidateRayJobSpec that no schema holds."""
    spec = cluster_of(folder)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    # Feature gates that are off unless someone turns them on.
    assert not {"networkPolicy", "tlsOptions", "historyServerOptions"} & spec.keys()
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod.get("restartPolicy", "Never") == "Never"  # autoscaler v2
        names = {variable["name"] for variable in pod["containers"][0]["env"]}
        assert not names & {"RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS"}
        assert "resources" not in group
        assert "labels" not in group["rayStartParams"]
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for job in manifests_of(folder).get("RayJob", []):
        assert not {"clusterSelector", "deletionStrategy", "suspend"} & job["spec"].keys()
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        for field in ("ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"):
            assert job["spec"][field] > 0
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])


@for_every(VERBS)
def test_the_command_line_takes_the_entrypoint(verb: str) -> None:
    config = parse_entrypoint(job_of(verb)["entrypoint"])
    assert type(config).__name__ == f"{verb.capitalize()}Config"
    assert config.address is None, "RAY_ADDRESS is set inside a job"
    assert config.scale_timeout_s > 0, "workers come when they are asked for"


@pytest.mark.parametrize(
    "change",
    [
        ("--scale-timeout-s", "--scale-timeouts"),
        ("--num-workers 64", "--num-workers many"),
        ("--bundle", "--bundel"),
        ("cifake_ray score", "cifake_ray scoer"),
        ("s3://BUCKET/images", "images"),
    ],
)
def test_a_misspelt_entrypoint_is_found(change: tuple[str, str]) -> None:
    line = job_of("score")["entrypoint"]
    assert change[0] in line
    with pytest.raises(ValueError, match=r"\w"):
        parse_entrypoint(line.replace(*change))


@for_every(VERBS)
def test_a_job_asks_for_no_more_than_its_cluster_may_grow_to(verb: str) -> None:
    job = job_of(verb)
    config = parse_entrypoint(job["entrypoint"])
    cpus = gpus = 0
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cpus += group["maxReplicas"] * int(limits["cpu"])
        gpus += group["maxReplicas"] * int(limits.get("nvidia.com/gpu", 0))
    on_gpus = getattr(config, "device", "auto") == "cuda"
    wanted = int(config.num_workers or 1) * int(getattr(config, "max_concurrent", None) or 1)
    assert 1 <= wanted <= (gpus if on_gpus else cpus)
    assert (gpus > 0) == on_gpus, "the overlay and --device belong together"


def test_jobs_read_what_jobs_before_them_wrote() -> None:
    places = {verb: parse_entrypoint(job_of(verb)["entrypoint"]) for verb in VERBS}
    assert places["train"].shards == places["tune"].shards == places["convert"].out
    assert places["evaluate"].shards == places["convert"].out
    assert places["evaluate"].bundle == places["score"].bundle == places["train"].run


def images_of(folder: str) -> Iterator[str]:
    for container in find_containers(render(KUBERAY / folder)):
        yield container["image"]


@for_every(FOLDERS)
def test_all_pods_of_a_cluster_run_one_image_of_this_version(folder: str) -> None:
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    flavour = "gpu" if len(cluster_of(folder)["workerGroupSpecs"]) == 2 else "cpu"
    assert set(images_of(folder)) == {f"REGISTRY/cifake-ray:{version}-{flavour}"}


@for_every(["enforce", "audit", "warn"])
def test_the_namespace_is_restricted(level: str) -> None:
    [namespace] = manifests_of("overlays/cpu")["Namespace"]
    assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{level}"] == "restricted"
    assert namespace["metadata"]["name"] == "cifake-ray"
