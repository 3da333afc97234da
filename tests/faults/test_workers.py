"""Workers that die, once or at every attempt: no row is lost or doubled, no run goes on for ever.

The images that kill are planted from outside: a `sitecustomize` on PYTHONPATH makes the decoder of
every process kill or block itself when it meets a marker, as a bug in a codec would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from faults.command import count_parts, find_workers, join, make_env, wait_until
from faults.conftest import NUM_IMAGES, NUM_MANY, SHARD_SIZE
from ray_head import JobsCluster, run_head, wait_for_idle

pytestmark = pytest.mark.timeout(600)


SITECUSTOMIZE = '''
import importlib.util, os, signal, sys

class After:
    """Changes a module once it has been imported."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), self.change(module))[0]
        return spec


def poison(data):
    import ctypes

    if b"POISON-KILL" in data:
        os.kill(os.getpid(), signal.SIGKILL)
    if b"POISON-SEGV" in data:
        ctypes.string_at(0)
    if b"POISON-EXIT" in data:
        os._exit(3)
    if b"POISON-HANG" in data:
        ctypes.PyDLL(None).sleep(3600)  # with the interpreter lock, so that no thread goes on


def poison_decoder(module):
    decode = module.call_decoder
    module.call_decoder = lambda call, data: (poison(data), decode(call, data))[1]


sys.meta_path.insert(0, After("cifake_ray.core.imaging.decode", poison_decoder))
'''


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with which decoders die of marked images."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def poisoned_alone(poisoned_path: str) -> dict[str, str]:
    """For a command without a cluster, whose decoders die so."""
    return make_env(PYTHONPATH=poisoned_path)


@pytest.fixture(scope="module")
def poisoned_head(
    poisoned_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[JobsCluster]:
    folder = tmp_path_factory.mktemp("poisoned")
    with run_head(folder, variables={"PYTHONPATH": poisoned_path}) as head:
        yield head


@pytest.fixture
def poisoned_env(poisoned_head: JobsCluster) -> dict[str, str]:
    """For a command that works on a cluster whose decoders die so."""
    wait_for_idle(poisoned_head)
    return join(poisoned_head)


@pytest.fixture(params=["on Ray", "without Ray"])
def poisoned_place(
    request: pytest.FixtureRequest,
) -> tuple[dict[str, str], list[str], list[str]]:
    """An environment whose decoders die so; what a command of one worker starts and ends with."""
    if request.param == "on Ray":
        return request.getfixturevalue("poisoned_env"), [], ["--num-workers", "1"]
    return request.getfixturevalue("poisoned_alone"), ["taskset", "-c", "0"], []


def make_command(verb: str, source: Path, out: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "cifake_ray", verb, str(source), str(out), *options, "--json"]
    return [*words, "--shard-size", SHARD_SIZE]


def run_verb(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    process = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    result: dict[str, Any] = json.loads(process.stdout)
    assert result["exit_code"] == process.returncode
    return {**result, "stderr": process.stderr}


def read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """Every row by its key, whichever verb wrote it."""
    rows = [row for path in sorted(out.glob("*/part-*")) for row in pq.read_table(path).to_pylist()]
    keyed = {row["key"]: row for row in rows}
    assert len(keyed) == len(rows), "a key stands twice"
    return keyed


def find_shards(out: Path) -> list[list[str]]:
    return [pq.read_table(path)["key"].to_pylist() for path in sorted(out.glob("*/part-*"))]


def plant(images: Path, target: Path, poisons: dict[str, str]) -> Path:
    """A copy of the images in which some end with a marker."""
    shutil.copytree(images, target)
    for key, marker in poisons.items():
        with open(target / key, "ab") as file:
            file.write(f"POISON-{marker}".encode())
    return target


def check_rows(out: Path, clean: Path, poisons: dict[str, str]) -> None:
    """The planted images are worker_crash; the rows of all others equal the undisturbed run's."""
    rows, expected = read_rows(out), read_rows(clean)
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        if key in poisons:
            assert row["error"] == "worker_crash", row
            assert row["error_detail"].startswith("the decoder ")
        elif row.get("p_fake") is None:
            assert row == expected[key]
        else:  # a batch that lacks an image may be summed in another order
            for name in ("logit", "p_fake"):
                assert row.pop(name) == pytest.approx(expected[key].pop(name), abs=1e-5)
            assert row == expected[key]
    assert not (out / "_attempts").exists()


@pytest.mark.parametrize(
    ("verb", "where"),
    [
        ("convert", "one of two workers"),
        ("convert", "the only worker"),
        ("convert", "one of two processes"),
        ("score", "one of two workers"),
        ("score", "a machine of one CPU"),
    ],
)
def test_images_that_kill_their_worker_become_rows(
    request: pytest.FixtureRequest,
    images: Path,
    clean: dict[str, Path],
    poisoned_env: dict[str, str],
    tmp_path: Path,
    verb: str,
    where: str,
) -> None:
    env, before, options = poisoned_env, list[str](), list[str]()
    if where == "the only worker":
        options = ["--num-workers", "1"]
    elif where != "one of two workers":
        env = request.getfixturevalue("poisoned_alone")
        before = ["taskset", "-c", "0"] * (where == "a machine of one CPU")
    shards = find_shards(clean[verb])
    poisons = {shards[1][0]: "KILL", shards[1][20]: "SEGV", shards[3][39]: "EXIT"}
    source = plant(images, tmp_path / "images", poisons)
    options += ["--max-error-rate", "0.015"]
    summary = run_verb([*before, *make_command(verb, source, tmp_path / "out", *options)], env)
    assert summary["exit_code"] == 0, summary
    assert summary["errors"] == {"worker_crash": 3}
    assert (summary["listed"], summary["done"]) == (NUM_IMAGES, NUM_IMAGES - 3)
    assert summary["shards_retried"] == 2
    check_rows(tmp_path / "out", clean[verb], poisons)
    details = {key: read_rows(tmp_path / "out")[key]["error_detail"] for key in poisons}
    assert list(details.values()) == [
        "the decoder died with signal 9",
        "the decoder died with signal 11",
        "the decoder ended its process with exit code 3",
    ]
    # Over the budget the rows are the same and the exit code tells; trying again is no crash loop.
    command = make_command(verb, source, tmp_path / "out", "--max-error-rate", "0")
    summary = run_verb([*command, "--retry-errors"], poisoned_env)
    assert (summary["exit_code"], summary["shards_resumed"]) == (3, len(shards) - 2)
    check_rows(tmp_path / "out", clean[verb], poisons)


def test_images_that_killed_their_worker_are_tried_again_with_a_mended_decoder(
    images: Path,
    clean: dict[str, Path],
    poisoned_env: dict[str, str],
    env: dict[str, str],
    tmp_path: Path,
) -> None:
    shards = find_shards(clean["score"])
    poisons = {shards[0][0]: "KILL", shards[4][1]: "SEGV"}
    source = plant(images, tmp_path / "images", poisons)
    command = make_command("score", source, tmp_path / "out")
    assert run_verb(command, poisoned_env)["failed"] == 2
    summary = run_verb([*command, "--retry-errors"], env)
    assert (summary["failed"], summary["shards_resumed"]) == (0, len(shards) - 2)
    check_rows(tmp_path / "out", clean["score"], {})


@pytest.mark.parametrize("verb", ["convert", "score"])
def test_an_image_that_hangs_becomes_a_row_and_the_run_goes_on(
    images: Path,
    clean: dict[str, Path],
    poisoned_place: tuple[dict[str, str], list[str], list[str]],
    tmp_path: Path,
    verb: str,
) -> None:
    env, before, options = poisoned_place
    shards = find_shards(clean[verb])
    poisons = {shards[2][7]: "HANG", shards[2][8]: "KILL"}
    source = plant(images, tmp_path / "images", poisons)
    command = make_command(verb, source, tmp_path / "out", "--stall-timeout-s", "32")
    summary = run_verb([*before, *command, *options], env)
    assert (summary["exit_code"], summary["errors"]) == (0, {"worker_crash": 2}), summary
    check_rows(tmp_path / "out", clean[verb], poisons)
    row = read_rows(tmp_path / "out")[shards[2][7]]
    assert row["error_detail"] == "the decoder gave no answer within 4 s"


def test_a_run_with_poison_can_be_killed_and_resumed(
    images: Path,
    clean: dict[str, Path],
    poisoned_alone: dict[str, str],
    poisoned_env: dict[str, str],
    tmp_path: Path,
) -> None:
    shards = find_shards(clean["convert"])
    poisons = {shard[number]: "SEGV" for number, shard in enumerate(shards)}
    source = plant(images, tmp_path / "images", poisons)
    command = make_command("convert", source, tmp_path / "out", "--max-error-rate", "0.1")
    for num_parts in (0, 2, 4):
        process = start_group(command, poisoned_alone)
        wait_until(
            lambda process=process, wanted=num_parts: (
                process.poll() is not None
                or (
                    (tmp_path / "out" / "_attempts").exists()
                    and count_parts(tmp_path / "out") >= wanted
                )
            )
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    summary = run_verb(command, poisoned_env)
    assert summary["errors"] == {"worker_crash": len(shards)}
    check_rows(tmp_path / "out", clean["convert"], poisons)


def start_group(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """The command with a process group of its own, that of its workers too."""
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("where", ["on Ray", "without Ray"])
@pytest.mark.parametrize(("verb", "undisturbed"), [("convert", "shards"), ("score", "scores")])
def test_each_worker_may_be_killed_once(
    request: pytest.FixtureRequest,
    many_images: Path,
    head: JobsCluster,
    tmp_path: Path,
    verb: str,
    undisturbed: str,
    where: str,
) -> None:
    whole = request.getfixturevalue(undisturbed)
    env = join(head) if where == "on Ray" else make_env()
    process = start_group(make_command(verb, many_images, tmp_path / "out"), env)
    parent, name = (head.pid, "ShardActor") if where == "on Ray" else (process.pid, "local_pool")
    killed: set[int] = set()

    def find_alive() -> list[psutil.Process]:
        return [worker for worker in find_workers(parent, name) if worker.pid not in killed]

    for wanted in (5, 25):
        wait_until(lambda wanted=wanted: count_parts(tmp_path / "out") >= wanted)
        wait_until(find_alive)
        victim = find_alive()[0]
        victim.kill()
        killed.add(victim.pid)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    summary = json.loads(output)
    assert summary["listed"] == summary["done"] == NUM_MANY
    assert read_rows(tmp_path / "out") == read_rows(whole)


def test_workers_and_their_node_may_be_stopped_for_a_while(
    many_images: Path, scores: Path, head: JobsCluster, tmp_path: Path
) -> None:
    """SIGSTOP, as a machine does that is suspended or that swaps."""
    process = start_group(make_command("score", many_images, tmp_path / "out"), join(head))
    wait_until(lambda: count_parts(tmp_path / "out") >= 5)
    stopped = [p for name in ("ShardActor", "raylet/raylet") for p in find_workers(head.pid, name)]
    assert len(stopped) > 1
    for each in stopped:
        each.suspend()
    time.sleep(15)
    for each in stopped:
        each.resume()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads(output)["shards_retried"] == 0
    assert read_rows(tmp_path / "out") == read_rows(scores)


DEADLY_DETECTOR = """

def kill(module):
    module.predict_logit = lambda *_: os._exit(1)


sys.meta_path.insert(0, After("cifake_ray.core.processing.score", kill))
"""


@pytest.mark.parametrize("num_workers", ["1", "0"])
def test_a_worker_that_always_dies_ends_the_run_with_a_remedy(
    images: Path,
    poisoned_alone: dict[str, str],
    env: dict[str, str],
    tmp_path: Path,
    num_workers: str,
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE + DEADLY_DETECTOR)
    path = os.pathsep.join([str(site), poisoned_alone["PYTHONPATH"]])
    summary = run_verb(
        make_command("score", images, tmp_path / "out", "--num-workers", num_workers),
        {**poisoned_alone, "PYTHONPATH": path},
    )
    assert summary["exit_code"] == 6
    assert "has ended its worker 5 times" in summary["error"]
    assert "--batch-size" in summary["error"]
    # Where it has what it lacked, the same command goes on.
    summary = run_verb(make_command("score", images, tmp_path / "out"), env)
    assert summary["done"] == NUM_IMAGES
