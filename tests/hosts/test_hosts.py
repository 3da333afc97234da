"""Several hosts, each with an address, a name and a disk of its own, and one that dies."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from faults.command import end_command, start_command, wait_until
from hosts.conftest import NUM_IMAGES, Hosts
from hosts.network import Host

from cifake_ray.errors import ExitCode

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def workers(hosts: Hosts) -> Iterator[list[Host]]:
    """Two hosts with two CPUs each, new for every test."""
    found = [hosts.start_worker(name, num_cpus=2) for name in ("one", "two")]
    yield found
    for host in found:
        hosts.network.remove_host(host)
    addresses = {host.address for host in found}
    wait_until(lambda: not hosts.list_alive() & addresses)


def submit(hosts: Hosts, verb: str, *words: str) -> subprocess.Popen[str]:
    return start_command(
        ["submit", verb, *words, "--address", hosts.cluster.address], hosts.cluster.env
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    found, result, errors = end_command(process, timeout_s=800)
    assert found == code, errors
    account: dict[str, Any] = result["result"]
    return account


def count_shards(hosts: Hosts, out: str) -> int:
    return len(hosts.store.list_parts(hosts.bucket, f"{out}/"))


def check_keys(hosts: Hosts, out: str) -> None:
    """Every image is in the run once."""
    keys = Counter(hosts.store.read_table(hosts.bucket, f"{out}/").column("key").to_pylist())
    assert len(keys) == NUM_IMAGES
    assert set(keys.values()) == {1}


def show(capsys: pytest.CaptureFixture[str], what: str, account: dict[str, Any]) -> None:
    names = ("listed", "done", "shards_total", "shards_retried", "elapsed_s", "steady_images_per_s")
    with capsys.disabled():
        print(f"\n{what}:", ", ".join(f"{name} {account[name]}" for name in names))


def test_a_request_without_the_token_is_refused(hosts: Hosts) -> None:
    url = f"{hosts.cluster.address}/api/jobs/"
    job = {"entrypoint": "true"}
    for headers in ({}, {"Authorization": "Bearer another-token-0123456789abcdef"}):
        answer = requests.post(url, json=job, headers=headers, timeout=10)
        assert answer.status_code in (401, 403), answer.text
        assert requests.get(url, headers=headers, timeout=10).status_code in (401, 403)


def test_ray_itself_refuses_who_has_no_token(
    hosts: Hosts, sample_folder: Path, tmp_path: Path
) -> None:
    words = ["convert", str(sample_folder), str(tmp_path / "out")]
    words += ["--address", hosts.cluster.ray_address]
    process = start_command(words, {**hosts.cluster.env, "RAY_AUTH_MODE": "disabled"})
    code, result, errors = end_command(process)
    assert (code, "refuses the token" in result["error"]) == (ExitCode.RESOURCES, True), errors


def test_a_host_that_dies_while_scoring_takes_no_row_with_it(
    hosts: Hosts, workers: list[Host], images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "killed"
    process = submit(hosts, "score", images, f"s3://{hosts.bucket}/{out}", "--shard-size", "250")
    wait_until(lambda: count_shards(hosts, out) >= 10)
    workers[0].kill()
    account = finish(process)
    assert account["listed"] == account["done"] == NUM_IMAGES
    check_keys(hosts, out)
    show(capsys, "score, one of two hosts killed", account)
    assert 1 <= account["shards_retried"] <= 4


def test_a_host_that_is_cut_off_takes_no_row_with_it(
    hosts: Hosts, workers: list[Host], images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "cut-off"
    process = submit(hosts, "convert", images, f"s3://{hosts.bucket}/{out}", "--shard-size", "250")
    wait_until(lambda: count_shards(hosts, out) >= 10)
    workers[0].cut_off()
    account = finish(process)
    assert account["listed"] == account["done"] == NUM_IMAGES
    check_keys(hosts, out)
    show(capsys, "convert, one of two hosts cut off", account)
    assert 1 <= account["shards_retried"] <= 4


@pytest.fixture(scope="module")
def shards(hosts: Hosts, images: str) -> str:
    """The images as shards."""
    worker = hosts.start_worker("converter", num_cpus=2)
    out = f"s3://{hosts.bucket}/shards"
    finish(submit(hosts, "convert", f"{images}/train", out))
    hosts.network.remove_host(worker)
    return out


def read_curve(hosts: Hosts, run: str) -> list[tuple[float, float]]:
    lines = hosts.store.get(hosts.bucket, f"{run}/history.jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["train_loss"], row["val_loss"]) for row in rows]


def find_trained(hosts: list[Host]) -> list[str]:
    """The hosts that have decoded training images."""
    return [host.name for host in hosts if any(host.home.glob(".cache/cifake_ray/*.npy"))]


TRAIN = ("--model", "cnn", "--epochs", "2", "--optimizer", "sgd", "--lr", "0.01")


def test_training_over_two_hosts_is_training_on_one(
    hosts: Hosts, workers: list[Host], shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ranks each time: with all CPUs of a host for each rank, or with one.

    At a rate at which rounding does not grow: at 0.1 even one process with one thread and one with
    two part within an epoch.
    """
    curves = {}
    for run, cpus in (("one", "1"), ("two", "2")):
        words = [shards, f"s3://{hosts.bucket}/{run}", *TRAIN, "--num-workers", "2"]
        finish(submit(hosts, "train", *words, "--cpus-per-worker", cpus))
        curves[run] = read_curve(hosts, run)
        assert len(find_trained(workers)) == int(cpus)
    with capsys.disabled():
        print("\ntraining and validation loss:", curves)
    assert np.allclose(curves["one"], curves["two"], rtol=2e-5)


def test_training_goes_on_without_a_host_that_dies(
    hosts: Hosts, workers: list[Host], shards: str
) -> None:
    run = "survivor"
    words = [shards, f"s3://{hosts.bucket}/{run}", *TRAIN, "--epochs", "4"]
    words += ["--num-workers", "1:2", "--cpus-per-worker", "2"]
    process = submit(hosts, "train", *words)
    wait_until(lambda: hosts.store.list_keys(hosts.bucket, f"{run}/history.jsonl"))
    assert len(find_trained(workers)) == 2
    workers[1].kill()
    assert len(read_curve(hosts, run)) < 4
    account = finish(process)
    assert account["epochs"] == 4


def test_a_search_uses_both_hosts(hosts: Hosts, workers: list[Host], shards: str) -> None:
    words = [shards, f"s3://{hosts.bucket}/search", "--search", "optimiser", "--trials", "4"]
    words += ["--recipe", "seed-v1.0", "--epochs", "1"]
    account = finish(submit(hosts, "tune", *words))
    assert len(find_trained(workers)) == 2
    assert account
