"""The whole pipeline in a bucket: nothing local but Ray, no secret anywhere, damage repaired."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.command import make_env, run_command
from faults.conftest import NUM_IMAGES
from ray_head import JobsCluster, read_states
from s3_server import S3Server

pytestmark = pytest.mark.timeout(600)

CANARY = "CANARY-0123456789abcdef"
SECRETS = {
    name: f"{CANARY}-{name}"
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "WANDB_API_KEY")
}


@pytest.fixture
def own_ray(s3_env: S3Server, tmp_path: Path) -> Iterator[dict[str, str]]:
    """For a command whose Ray writes its logs where the test can read them."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # names of sockets must be short
        yield make_env(RAY_TMPDIR=folder, XDG_CACHE_HOME=str(tmp_path / "cache"), **SECRETS)


def test_all_of_it_works_in_a_bucket_and_leaves_no_secret(
    s3_env: S3Server,
    env: dict[str, str],
    own_ray: dict[str, str],
    head: JobsCluster,
    images: Path,
    tmp_path: Path,
) -> None:
    """The pipeline with a Ray of its own, what follows on a cluster."""
    bucket = s3_env.make_bucket()
    s3_env.upload(bucket, images, "in put/")
    root = f"s3://{bucket}/all of it"
    said = []

    code, result, errors = run_command(
        ["pipeline", f"s3://{bucket}/in put", root, "--epochs", "1", "--num-workers", "1"], own_ray
    )
    said.append(errors)
    assert code == 0, errors
    assert result["scores"] == f"{root}/scores/scores"
    scores = s3_env.read_table(bucket, "all of it/scores/")
    assert sorted(scores.column("key").to_pylist()) == sorted(
        path.relative_to(images).as_posix() for path in images.rglob("*.jpg")
    )
    assert scores.column("error").null_count == NUM_IMAGES
    keys = s3_env.list_keys(bucket, "all of it/")
    for name in ("shards/_SUCCESS", "run/bundle/config.json", "report/report.html"):
        assert f"all of it/{name}" in keys

    # The same images scored from the folder on this machine, with the bundle in the bucket.
    local = tmp_path / "scores"
    code, _, errors = run_command(
        ["score", str(images), str(local), "--bundle", f"{root}/run"], env
    )
    said.append(errors)
    assert code == 0, errors
    here = pa.concat_tables([pq.read_table(p) for p in local.glob("scores/part-*")])
    order = [("key", "ascending")]
    for name in ("key", "label", "split"):
        assert here.sort_by(order).column(name) == scores.sort_by(order).column(name)
    for mine, theirs in zip(
        here.sort_by(order).column("p_fake").to_pylist(),
        scores.sort_by(order).column("p_fake").to_pylist(),
        strict=True,
    ):
        assert mine == pytest.approx(theirs, abs=1e-5)

    # A finished run again: the same summary. Other settings: refused, with the difference.
    score = ["score", f"s3://{bucket}/in put", f"{root}/scores", "--bundle", f"{root}/run"]
    code, again, errors = run_command(score, env)
    assert (code, again["done"]) == (0, NUM_IMAGES), errors
    code, refusal, _ = run_command([*score, "--shard-size", "7"], env)
    assert code == 2
    assert "shard_size: not given there, 7 here" in refusal["error"]

    # A byte flips in the bucket: verify names the shard, repair makes only that one again.
    part = "all of it/scores/scores/part-00000.parquet"
    good = s3_env.get(bucket, part)
    s3_env.put(bucket, part, good[:50] + bytes([good[50] ^ 1]) + good[51:])
    code, verdict, _ = run_command(["verify", f"{root}/scores"], env)
    assert code == 4
    assert verdict["damaged"] == {"scores/part-00000.parquet": "sha256 differs"}
    code, repaired, errors = run_command(["repair", f"{root}/scores"], env)
    said.append(errors)
    assert code == 0, errors
    assert repaired["shards_resumed"] == repaired["shards_total"] - 1
    assert s3_env.read_table(bucket, "all of it/scores/") == scores
    code, verdict, _ = run_command(["verify", f"{root}/scores"], env)
    assert (code, verdict["damaged"]) == (0, {})

    code, exported, _ = run_command(["export", f"{root}/scores", f"s3://{bucket}/scores.csv"], env)
    assert (code, exported["rows"]) == (0, NUM_IMAGES)
    assert s3_env.get(bucket, "scores.csv").count(b"\n") == NUM_IMAGES + 1

    # The secrets are in the environment, and nowhere else.
    secret, canary = s3_env.secret_key.encode(), CANARY.encode()
    for key in s3_env.list_keys(bucket):
        assert secret not in (data := s3_env.get(bucket, key)), key
        assert canary not in data, key
    assert head.temp_dir
    logs = [find_files(Path(own_ray["RAY_TMPDIR"])), find_files(head.temp_dir)]
    for files in logs:
        assert [path for path in files if "session_" in str(path)], "Ray left no log to search"
    for path in [*find_files(tmp_path), *itertools.chain(*logs)]:
        assert secret not in (data := path.read_bytes()), path
        assert canary not in data, path
    assert s3_env.secret_key not in "".join(said)
    assert CANARY not in "".join(said)


def find_files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]


def test_a_search_in_a_bucket_goes_on_there_and_leaves_a_bundle_that_scores(
    s3_env: S3Server,
    head: JobsCluster,
    env: dict[str, str],
    images: Path,
    clean: dict[str, Path],
    tmp_path: Path,
) -> None:
    bucket = s3_env.make_bucket()
    s3_env.upload(bucket, clean["convert"], "shards/")
    shards, run = f"s3://{bucket}/shards", f"s3://{bucket}/search"
    (tmp_path / "space.yaml").write_text("lr: [0.001, 0.002]\n")
    (tmp_path / "recipe.yaml").write_text("epochs: 1\nbatch_size: 16\n")
    files = [f"--search={tmp_path / 'space.yaml'}", f"--recipe={tmp_path / 'recipe.yaml'}"]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    search = ["tune", shards, run, *files, *cache, "--searcher", "grid"]
    code, result, errors = run_command(search, env)
    assert code == 0, errors
    assert result["ends"] == {"all 1 epochs done": 2}
    keys = set(s3_env.list_keys(bucket, "search/"))
    left = ("trials.csv", "trials.parquet", "report.html", "recipe.yaml", "bundle/config.json")
    assert {f"search/{name}" for name in left} <= keys
    actors = str(read_states(head, "actors"))
    assert "PL_DISABLE_FORK" in actors, "no runtime environment of a trial to search"
    assert s3_env.secret_key not in actors
    history = s3_env.get(bucket, "search/trials/00000/run-0/history.jsonl")
    s3_env.client().delete_object(Bucket=bucket, Key="search/_SUCCESS")
    code, again, errors = run_command(search, env)
    assert code == 0, errors
    assert s3_env.get(bucket, "search/trials/00000/run-0/history.jsonl") == history
    assert (again["best_trial"], again["best"]) == (result["best_trial"], result["best"])
    scores = tmp_path / "scores"
    code, scored, errors = run_command(["score", str(images), str(scores), "--bundle", run], env)
    assert (code, scored["done"]) == (0, NUM_IMAGES), errors


def test_a_source_that_cannot_be_read_is_refused_before_ray_starts(
    s3_env: S3Server, own_ray: dict[str, str], tmp_path: Path
) -> None:
    bucket = s3_env.make_bucket()
    outsider = {
        **own_ray,
        "AWS_ACCESS_KEY_ID": s3_env.outsider_key,
        "AWS_SECRET_ACCESS_KEY": s3_env.outsider_secret,
    }
    for source, environment, code, words in (
        (f"s3://{bucket}/x", own_ray, 5, "no"),
        ("s3://no-such-bucket-here/x", own_ray, 4, "no-such-bucket-here"),
        (f"s3://{bucket}/x", outsider, 4, bucket),
        (f"s3://{bucket}/x", {**own_ray, "AWS_SECRET_ACCESS_KEY": "CANARY-wrong"}, 4, bucket),
    ):
        found, result, errors = run_command(["score", source, str(tmp_path / "out")], environment)
        assert found == code, errors
        assert words in result["error"]
        assert "CANARY" not in errors + result["error"]
        assert not list(Path(own_ray["RAY_TMPDIR"]).iterdir()), "Ray was started"
