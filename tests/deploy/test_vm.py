"""What `ray up` starts on AWS."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from every import for_every

import cifake_ray

PROJECT = Path(cifake_ray.__file__).parents[1]
FILE = PROJECT / "deploy" / "vm" / "aws.yaml"
CLUSTER: dict[str, Any] = yaml.safe_load(FILE.read_text())
NODES: dict[str, dict[str, Any]] = CLUSTER["available_node_types"]
WORKERS = sorted(NODES.keys() - {CLUSTER["head_node_type"]})


def read_schema() -> Any:
    path = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    return json.loads(path.read_text())


def test_ray_knows_every_field() -> None:
    jsonschema.validate(CLUSTER, read_schema())


def test_a_field_that_is_misspelt_is_found() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**CLUSTER, "max_worker": 1}, read_schema())


@for_every(NODES)
def test_a_node_has_a_role_and_no_way_in_but_the_given_group(name: str) -> None:
    node = NODES[name]["node_config"]
    assert node["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::ACCOUNT:instance-profile/")
    assert node["SecurityGroupIds"] == ["SECURITY-GROUP"]
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_no_group_is_made_that_opens_a_port() -> None:
    """Ray's own has SSH open to the world, and adds what `security_group` says."""
    assert "security_group" not in CLUSTER["provider"]


def test_no_key_is_in_the_file() -> None:
    text = FILE.read_text()
    assert not re.search(r"AKIA|AWS_|aws_secret|ssh_private_key|RAY_AUTH_TOKEN\b", text)


@for_every(WORKERS)
def test_workers_are_spot_and_not_the_head(name: str) -> None:
    assert NODES[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in NODES["head"]["node_config"]
    profiles = [NODES[n]["node_config"]["IamInstanceProfile"] for n in ("head", name)]
    assert profiles[0] != profiles[1], "only the head may start and end nodes"


@for_every(["head", "worker"])
def test_ray_starts_with_a_token_and_one_arena(where: str) -> None:
    *_, command = CLUSTER[f"{where}_start_ray_commands"]
    words = shlex.split(command)
    assert words[:4] == ["RAY_AUTH_MODE=token", "MALLOC_ARENA_MAX=1", "ray", "start"]
    assert CLUSTER["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_the_dashboard_listens_on_loopback_and_the_head_does_no_work() -> None:
    words = shlex.split(CLUSTER["head_start_ray_commands"][-1])
    assert "--dashboard-host=127.0.0.1" in words
    assert "--num-cpus=0" in words
    assert NODES["head"]["resources"] == {"CPU": 0}


def test_containers_gain_no_rights() -> None:
    options = CLUSTER["docker"]["run_options"]
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(options)


def test_nodes_run_the_image_of_this_version() -> None:
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    image = f"REGISTRY/cifake-ray:{version}"
    assert CLUSTER["docker"]["image"] == f"{image}-cpu"
    for name, node in NODES.items():
        has_gpu = "GPU" in node["resources"]
        own = node.get("docker", {}).get("worker_image")
        assert own == (f"{image}-gpu" if has_gpu else None), name
