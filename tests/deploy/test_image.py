"""The image: pinned from end to end, nothing secret inside, nobody is root.

No engine builds it here; these are the rules of a linter that matter to this file.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import cifake_ray

PROJECT = Path(cifake_ray.__file__).parents[1]
DOCKERFILE = PROJECT / "deploy" / "Dockerfile"
LOCK, FULL_LOCK = PROJECT / "deploy" / "requirements.lock", PROJECT / "requirements.lock"
SECRET = re.compile(r"SECRET|PASSWORD|TOKEN|CREDENTIAL|_KEY|KEY_", re.IGNORECASE)
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
RAY = "2.60.0"


def read_instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (w[0].upper(), w[1]) for line in joined.splitlines() if len(w := line.split(" ", 1)) > 1
    ]


def find_faults(text: str) -> set[str]:
    """Names of the rules that a Dockerfile breaks."""
    steps = read_instructions(text)
    faults = set()
    for instruction, words in steps:
        if instruction == "FROM" and not re.search(r":[^\s:/]*\d+\.\d+\.\d+", words):
            faults.add("base without a version")
        if instruction == "FROM" and words.split()[0].endswith(":latest"):
            faults.add("latest")
        if instruction == "ADD":
            faults.add("ADD")
        if instruction in ("ENV", "ARG"):
            names = re.findall(r"(\w+)(?:=|$)", words)
            faults |= {"secret" for name in names if SECRET.search(name)}
        if instruction != "RUN":
            continue
        if re.search(r"\bsudo\b|curl|wget|chmod 777", words):
            faults.add("sudo or a download")
        if "apt-get install" in words and "--no-install-recommends" not in words:
            faults.add("apt without --no-install-recommends")
        if "pip install" in words:
            if "--no-cache-dir" not in words:
                faults.add("pip keeps its cache")
            hashed = "--require-hashes" in words
            ours = "--no-deps" in words and "--no-build-isolation" in words
            if not hashed and not ours:
                faults.add("pip without hashes")
    users = [words for instruction, words in steps if instruction == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        faults.add("root")
    copies = [words for instruction, words in steps if instruction == "COPY"]
    lock = next((n for n, words in enumerate(copies) if "requirements.lock" in words), len(copies))
    code = next((n for n, words in enumerate(copies) if "cifake_ray" in words), 0)
    if lock >= code:
        faults.add("code before the lock")
    return faults


def test_the_dockerfile_breaks_no_rule() -> None:
    assert find_faults(DOCKERFILE.read_text()) == set()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("ray:2.60.0-py311-${FLAVOUR}", "ray:latest", "latest"),
        ("ray:2.60.0-py311-${FLAVOUR}", "ray", "base without a version"),
        ("USER 1000", "USER root", "root"),
        ("USER 1000", "", "root"),
        ("COPY --chown=1000:100 jobs ./jobs", "ADD http://x/y.tar /", "ADD"),
        ("--require-hashes ", "", "pip without hashes"),
        (" --no-deps", "", "pip without hashes"),
        ("--no-cache-dir --require", "--require", "pip keeps its cache"),
        (
            "USER 1000",
            "RUN apt-get install -y git\nUSER 1000",
            "apt without --no-install-recommends",
        ),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc", "secret"),
        ("ARG VERSION", "ARG AWS_SECRET_ACCESS_KEY\nARG VERSION", "secret"),
        (
            "COPY --chown=1000:100 deploy/",
            "COPY cifake_ray .\nCOPY deploy/",
            "code before the lock",
        ),
    ],
)
def test_a_rule_that_is_broken_is_found(old: str, new: str, fault: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert fault in find_faults(text.replace(old, new))


def test_nodes_of_the_image_want_a_token_and_use_one_arena() -> None:
    [environment] = [w for i, w in read_instructions(DOCKERFILE.read_text()) if i == "ENV"]
    assert {"RAY_AUTH_MODE=token", "MALLOC_ARENA_MAX=1"} <= set(environment.split())


def test_the_image_is_made_of_what_dockerignore_lets_through() -> None:
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied: set[str] = set()
    for instruction, words in read_instructions(DOCKERFILE.read_text()):
        if instruction == "COPY":
            *sources, _ = [word for word in words.split() if not word.startswith("--")]
            copied |= set(sources)
    assert copied == allowed
    assert all((PROJECT / name).exists() for name in copied)


def read_pins(path: Path) -> dict[str, str]:
    return {name.lower(): version for name, version in PIN.findall(path.read_text())}


def test_everything_in_the_lock_of_the_image_has_a_hash() -> None:
    blocks = re.split(r"\n(?=[A-Za-z0-9])", LOCK.read_text())
    names = [block for block in blocks if PIN.match(block)]
    assert len(names) == len(read_pins(LOCK)) > 100
    assert [
        b.split("==")[0] for b in names if not re.search(r"--hash=sha256:[0-9a-f]{64}", b)
    ] == []
    assert not re.search(r"://|^--|^-[a-z] |\+cpu", LOCK.read_text(), re.MULTILINE)


def test_the_two_locks_agree() -> None:
    image, full = read_pins(LOCK), read_pins(FULL_LOCK)
    assert {n: (image[n], full[n]) for n in image.keys() & full.keys() if image[n] != full[n]} == {}


def test_the_image_has_what_the_program_needs_and_nothing_to_develop_with() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in requirements}

    needed = names(project["dependencies"]) | names(project["optional-dependencies"]["tune"])
    pins = read_pins(LOCK).keys()
    assert needed <= pins
    assert {"aiohttp-cors", "prometheus-client", "boto3", "hatchling"} <= pins
    only_for_developers = names(project["optional-dependencies"]["dev"]) - needed
    assert not only_for_developers & pins


def test_one_version_of_ray_everywhere() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    [wanted] = [line for line in project["dependencies"] if line.startswith("ray[")]
    least, below = re.findall(r"[\d.]+", wanted.split("]")[1])
    assert RAY.startswith(f"{least}.")
    assert int(below.split(".")[1]) == int(least.split(".")[1]) + 1
    assert read_pins(LOCK)["ray"] == read_pins(FULL_LOCK)["ray"] == RAY
    assert f"ray[default]=={RAY}" in (PROJECT / "deploy" / "requirements.in").read_text()
    assert f"FROM rayproject/ray:{RAY}-py311-" in DOCKERFILE.read_text()
    cluster = yaml.safe_load((PROJECT / "deploy" / "kuberay" / "base" / "cluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == RAY
    minor = RAY.rpartition(".")[0]
    for path in [p for p in (PROJECT / "deploy").rglob("*") if p.is_file() and p != LOCK]:
        said = re.findall(r"[Rr]ay(?:\[default\])?\W{0,4}(2\.\d+)", path.read_text())
        assert set(said) <= {minor}, path
