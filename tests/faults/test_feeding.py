"""A worker with a GPU, and the tasks on CPUs that feed it.

The GPU is Ray's word only: the network computes on the CPU, and everything else is as it would be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults.command import SAME_PRECISION, run_command
from faults.conftest import NUM_IMAGES
from faults.test_workers import SITECUSTOMIZE, check_rows, find_shards, plant
from ray_head import JobsCluster, run_head

from cifake_ray.errors import ExitCode
from cifake_ray.stages.batch.plan import choose_placement
from cifake_ray.stages.resources import Node, Placement, Resources
from cifake_ray.storage.runs.attempts import follow_attempt, write_attempt
from cifake_ray.storage.runs.run import require_run

pytestmark = pytest.mark.timeout(600)

# Seven batches a shard, of which four are under way at once. Without a bundle the command itself
# would look at some images to choose one.
OPTIONS = ["--shard-size", "100", "--batch-size", "16", "--bundle", "cifake"]

# The decoder dies of marked images, and the GPU is a CPU.
ON_CPU = (
    SITECUSTOMIZE
    + """

def pretend(module):
    module.find_device = lambda placement: "cpu"


def note_who_decodes(module):
    decode = module.call_decoder

    def noted(call, data):
        with open("/proc/self/cmdline") as name, open(os.environ["TEST_NOTES"], "a") as notes:
            print(name.read().split("\\0")[0], file=notes)
        return decode(call, data)

    module.call_decoder = noted


sys.meta_path.insert(0, After("cifake_ray.stages.score", pretend))
sys.meta_path.insert(0, After("cifake_ray.core.imaging.decode", note_who_decodes))
"""
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsCluster]:
    """Three CPUs and a GPU: one worker, and two tasks that feed it."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(ON_CPU)
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    folder = tmp_path_factory.mktemp("gpu")
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "TEST_NOTES": str(folder / "notes"),
        **SAME_PRECISION,
    }
    with run_head(folder, num_cpus=3, num_gpus=1, variables=variables) as cluster:
        yield cluster


def score(cluster: JobsCluster, source: Path, out: Path, *options: str) -> dict[str, object]:
    words = ["score", str(source), str(out), *OPTIONS, "--address", cluster.ray_address, *options]
    code, account, errors = run_command(words, cluster.env)
    assert code == account["exit_code"], errors
    return account


def test_each_gpu_is_fed_by_its_share_of_the_cpus_that_are_left() -> None:
    machine = Resources((Node(8, 2), Node(4, 0)))
    assert choose_placement(machine, None, "auto") == Placement(2, 1, 1, num_feeders=5)
    assert choose_placement(machine, 1, "cuda") == Placement(1, 1, 1, num_feeders=11)
    assert choose_placement(Resources((Node(1, 1),)), None, "auto") == Placement(1, 1, 1)
    assert choose_placement(machine, None, "cpu") == Placement(12, 1, 0)


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_fed_by_others_the_rows_are_those_of_cpus_alone(
    cluster: JobsCluster, images: Path, clean: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Files are fetched by the tasks; of shards the worker reads one after the other."""
    source = {"files": images, "shards": clean["convert"]}[kind]
    notes = Path(cluster.env["TEST_NOTES"])
    notes.unlink(missing_ok=True)
    account = score(cluster, source, tmp_path / "out", "--device", "cuda")
    assert account["done"] == account["listed"] == NUM_IMAGES
    check_rows(tmp_path / "out", clean["score"], {})
    # Nobody else has decoded an image.
    task = {"files": "ray::feed_rows", "shards": "ray::feed_images"}[kind]
    assert set(notes.read_text().split()) == {task}


def test_a_run_over_parquet_goes_on_after_the_death_of_its_worker(
    cluster: JobsCluster, clean: dict[str, Path], tmp_path: Path
) -> None:
    """A shard with a note is done by the worker alone, the others are fed again."""
    shards, out = clean["convert"], tmp_path / "out"
    score(cluster, shards, out)
    (out / "_SUCCESS").unlink()
    run = require_run(out)
    for shard in range(run.manifest.num_shards):
        run.shard_path(shard).unlink()
    write_attempt(run, follow_attempt(None, 0, "killed"))
    account = score(cluster, shards, out)
    assert (account["done"], account["shards_retried"]) == (NUM_IMAGES, 1)
    check_rows(out, clean["score"], {})


def test_an_image_that_kills_whoever_decodes_it_becomes_a_row(
    cluster: JobsCluster, images: Path, clean: dict[str, Path], tmp_path: Path
) -> None:
    (first, *_), *_, (*_, last) = find_shards(clean["score"])
    poisons = {first: "KILL", last: "SEGV"}
    source = plant(images, tmp_path / "poisoned", poisons)
    account = score(cluster, source, tmp_path / "out")
    assert account["errors"] == {"worker_crash": 2}
    assert account["shards_retried"] == 0, "the worker itself has died of it"
    check_rows(tmp_path / "out", clean["score"], poisons)


def test_a_gpu_that_torch_does_not_see_is_told(
    images: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    with run_head(tmp_path_factory.mktemp("gpu"), num_gpus=1) as cluster:
        account = score(cluster, images, tmp_path / "out")
    assert account["exit_code"] == ExitCode.RESOURCES
    assert "torch" in str(account["error"])
    assert "--device cpu" in str(account["error"])
