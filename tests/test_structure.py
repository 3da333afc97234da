"""The floors of the house, read from the source: who may import what, and what has which name."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

import cifake_ray
from cifake_ray import cli, config
from cifake_ray.options import PREFIX, make_command

PACKAGE = Path(cifake_ray.__file__).parent
PROJECT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}
JOBS = sorted((PROJECT / "jobs").glob("*.py"))

RANKS = {"core": 0, "config": 0, "errors": 0, "version": 0, "report": 1, "storage": 2, "stages": 3}
DOORS = {
    *(
        "api",
        "timm",
        "cli",
        "command",
        "options",
        "console",
        "files_line",
        "status_line",
        "pipeline",
        "__main__",
    )
}
DOOR_RANK = 4

# The rooms of a floor, lowest first: a room imports from those before it and from itself, those of
# one line not from each other. A file on a floor is a room of its own.
ROOMS = {
    "core": [
        {"schema", "imaging"},
        {"labels", "audit", "evaluation", "sample_images", "provenance"},
        {"models"},
        {"processing", "training"},
        {"search"},
    ],
    "storage": [{"io"}, {"s3", "bundles", "presets"}, {"sources"}, {"runs"}, {"datasets"}],
    "stages": [
        {"resources", "malloc", "review"},
        {"local_ray"},
        {"cluster"},
        {"batch", "train", "submit", "doctor"},
        {"audit", "convert", "export", "score", "tune", "verify"},
        {"evaluate"},
        {"compare"},
    ],
}

STAGE_VERBS = ("audit", "convert", "train", "tune", "evaluate", "score")
JOB_VERBS = (*STAGE_VERBS, "pipeline")
# Files of `stages/` that are no verb: tools that verbs share.
TOOLS = {
    *("cluster", "compare", "doctor", "local_ray", "malloc", "resources", "submit"),
    "__init__",
}
MAX_LINES = 360


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def find_imports(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """(module, name taken from it, line) of every import, wherever it stands in the file."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in MODULES:  # `from cifake_ray import pipeline`
                    yield module, None, node.lineno
                else:
                    yield str(node.module), alias.name, node.lineno


def find_floor(module: str) -> str:
    """core, storage, ... of a module of ours; `doors` for a door and for the package itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return "doors"
    return "doors" if parts[1] in DOORS else parts[1]


def rank_of(floor: str) -> int:
    return {"doors": DOOR_RANK, **RANKS}[floor]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def files_of(*floors: str) -> list[Path]:
    return [path for module, path in MODULES.items() if find_floor(module) in floors]


def find_roots(path: Path) -> dict[str, int]:
    """Top-level package -> a line that imports it."""
    return {module.split(".")[0]: line for module, _, line in find_imports(path)}


def test_every_module_stands_on_a_known_floor() -> None:
    unknown = [m for m in MODULES if find_floor(m) not in {"doors", *RANKS}]
    assert unknown == []
    assert JOBS


def test_imports_only_go_down() -> None:
    upward = []
    for module, path in [*MODULES.items(), *((f"cifake_ray.cli.{p.stem}", p) for p in JOBS)]:
        for target, _, line in find_imports(path):
            if target.split(".")[0] != "cifake_ray":
                continue
            if rank_of(find_floor(target)) > rank_of(find_floor(module)):
                upward.append(f"{name_of(path)}:{line} imports {target}")
    assert upward == []


@pytest.mark.parametrize("floor", ROOMS)
def test_rooms_import_only_from_rooms_before_them(floor: str) -> None:
    order = {room: number for number, rooms in enumerate(ROOMS[floor]) for room in rooms}
    wrong = []
    for module, path in MODULES.items():
        if not module.startswith(f"cifake_ray.{floor}."):
            continue
        room = module.split(".")[2]
        assert room in order, f"{name_of(path)}: a new room; give it its place in ROOMS"
        for target, _, line in find_imports(path):
            if target.startswith(f"cifake_ray.{floor}."):
                other = target.split(".")[2]
                if other != room and order[other] >= order[room]:
                    wrong.append(f"{name_of(path)}:{line} imports {target}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    above: dict[str, set[str]] = {
        module: {target for target, _, _ in find_imports(path) if target in MODULES}
        for module, path in MODULES.items()
    }
    while leaves := {module for module, targets in above.items() if not targets}:
        above = {module: targets - leaves for module, targets in above.items() if targets}
    assert above == {}


@pytest.mark.parametrize("floor", ["core", "config", "errors", "version", "report"])
def test_the_pure_floors_know_only_each_other(floor: str) -> None:
    allowed = {"core", "config", "errors", "version"} | ({"report"} if floor == "report" else set())
    wrong = [
        f"{name_of(path)}:{line} imports {target}"
        for path in files_of(floor)
        for target, _, line in find_imports(path)
        if target.split(".")[0] == "cifake_ray" and find_floor(target) not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "floors"),
    [
        ("ray", {"stages"}),
        ("fsspec", {"storage"}),
        ("s3fs", {"storage"}),
        ("boto3", set()),
        ("tensorboard", {"storage"}),
        ("mlflow", {"storage"}),
        ("typer", {"doors"}),
        ("click", {"doors"}),
        ("matplotlib", {"report"}),
        ("jinja2", {"report"}),
        ("onnx_ir", {"core"}),
        ("onnxruntime", {"core"}),
        ("captum", {"core"}),
        ("torch.distributed", {"core"}),
    ],
)
def test_a_package_is_imported_only_on_its_floor(package: str, floors: set[str]) -> None:
    wrong = [
        f"{name_of(path)}:{line}"
        for module, path in [*MODULES.items(), *((f"cifake_ray.cli.{p.stem}", p) for p in JOBS)]
        for target, _, line in find_imports(path)
        if f"{target}.".startswith(f"{package}.") and find_floor(module) not in floors
    ]
    assert wrong == []


def test_core_and_report_open_no_file() -> None:
    """core.sample_images may read the photographs that come inside other packages."""
    openers = {"open", "read_bytes", "read_text", "write_bytes", "write_text", "mkdir", "unlink"}
    readers = {"Image"}  # Image.open decodes bytes in memory
    wrong = []
    for path in files_of("core", "report"):
        if path.name == "sample_images.py":
            continue
        # report.html finds its own template with importlib.resources, which is no path of a user.
        allowed = {"read_text", "read_bytes"} if name_of(path).endswith("report/html.py") else set()
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id == "open":
                wrong.append(f"{name_of(path)}:{node.lineno} open")
            elif isinstance(function, ast.Attribute) and function.attr in openers - allowed:
                owner = function.value
                if not (isinstance(owner, ast.Name) and owner.id in readers):
                    wrong.append(f"{name_of(path)}:{node.lineno} {function.attr}")
        for package in {"os", "pathlib", "shutil", "tempfile", "glob", "socket", "urllib"}:
            if package in find_roots(path):
                wrong.append(f"{name_of(path)}:{find_roots(path)[package]} imports {package}")
    assert wrong == []


def test_no_file_is_named_after_nothing() -> None:
    words = re.compile(r"(^|_)(utils?|helpers?|common|base|managers?|misc)(_|$)")
    assert [name_of(path) for path in FILES if words.search(path.stem)] == []


@pytest.mark.parametrize("verb", STAGE_VERBS)
def test_one_verb_has_one_name_everywhere(verb: str) -> None:
    stages = PACKAGE / "stages"
    assert (stages / f"{verb}.py").is_file() or (stages / verb / "driver.py").is_file()
    assert hasattr(config, f"{verb.capitalize()}Config")
    assert verb in commands()
    assert list((PROJECT / "tests" / "stages").rglob(f"test_{verb}.py"))


@pytest.mark.parametrize("verb", JOB_VERBS)
def test_a_job_file_is_its_verb_with_the_line_that_submits_it(verb: str) -> None:
    path = PROJECT / "jobs" / f"{verb}.py"
    doc = ast.get_docstring(parse(path)) or ""
    assert "ray job submit" in doc
    assert f"jobs/{verb}.py" in doc
    assert f'main("{verb}")' in path.read_text(encoding="utf-8")


def test_a_stage_file_is_a_verb_or_a_tool_and_a_folder_its_machinery() -> None:
    stages = [path for path in (PACKAGE / "stages").iterdir() if path.name != "__pycache__"]
    assert {path.stem for path in stages if path.is_file()} - TOOLS <= set(commands())
    folders = {path.name for path in stages if path.is_dir()}
    assert folders - {"batch"} <= set(commands())
    assert all((PACKAGE / "stages" / name / "driver.py").is_file() for name in folders)


def commands() -> dict[str, TyperCommand]:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_options_of_a_command_are_the_fields_of_its_config(verb: str) -> None:
    command = commands()[verb]
    options: dict[str, Any] = {p.name: p for p in command.params}
    own = {"json_output", "debug", "log_format", "config_file"} | (
        {"recipe"} if verb == "train" else set()
    )
    config_class = cli.VERBS[verb]
    assert set(options) - own == {field.name for field in fields(config_class)}
    assert own <= set(options)
    for field in fields(config_class):
        parameter = options[field.name]
        doc = config.doc_of(config_class, field.name)
        assert isinstance(parameter, TyperArgument if doc.positional else TyperOption), field.name
        assert parameter.required == (field.default is MISSING), field.name
        if isinstance(parameter, TyperOption):
            assert parameter.opts == [f"--{field.name.replace('_', '-')}"]
            assert parameter.envvar == PREFIX + field.name.upper()
            assert doc.help in str(parameter.help)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_command_without_flags_makes_the_config_of_the_defaults(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    config_class = cli.VERBS[verb]
    required: dict[str, Any] = {
        f.name: f"/{f.name}" for f in fields(config_class) if f.default is MISSING
    }
    arguments = []
    for name, value in required.items():
        is_argument = config.doc_of(config_class, name).positional
        arguments += [value] if is_argument else [f"--{name.replace('_', '-')}", value]
    seen = []
    app = typer.Typer()
    app.command()(make_command(config_class, lambda make, **rest: seen.append((make(), rest))))
    typer.main.get_command(app).main(arguments, standalone_mode=False)
    if verb == "compare":  # it takes several
        required["reports"] = (required["reports"],)
    assert seen == [(config_class(**required), {"json_output": False, "debug": False})]


def test_only_the_decoder_catches_whatever_comes() -> None:
    broad = []
    for path in [*FILES, *JOBS]:
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
            last = node.body[-1]
            raises_again = isinstance(last, ast.Raise) and last.exc is None
            if "BaseException" in names and not raises_again:
                names.add("Exception")
            if node.type is None or "Exception" in names:
                broad.append(name_of(path))
    assert broad == ["cifake_ray/core/imaging/decode.py"]


def test_files_stay_short_because_they_hold_one_idea() -> None:
    lengths = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_every_test_that_the_page_of_faults_names_exists() -> None:
    page = (PACKAGE / "FAULTS.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    wrong = []
    for file, name in named:
        path = PROJECT / file
        functions = [n.name for n in ast.walk(parse(path)) if isinstance(n, ast.FunctionDef)]
        if name not in functions:
            wrong.append(f"{file}::{name}")
    assert wrong == []


def test_help_of_every_command_needs_neither_torch_nor_ray() -> None:
    script = """
import json, sys
from typer.testing import CliRunner
from cifake_ray.cli import app
import typer
loaded = {}
for name in ["", *typer.main.get_command(app).commands]:
    result = CliRunner().invoke(app, [name, "--help"] if name else ["--help"])
    assert result.exit_code == 0, result.output
    heavy = {"torch", "ray", "timm", "pyarrow", "numpy", "matplotlib"} & set(sys.modules)
    loaded[name] = sorted(heavy)
print(json.dumps(loaded))
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr
    loaded = json.loads(process.stdout.splitlines()[-1])
    assert set(loaded) == {"", *commands()}
    assert {name: heavy for name, heavy in loaded.items() if heavy} == {}


def test_a_conversion_of_local_files_imports_no_store_and_no_pandas(
    sample_folder: Path, tmp_path: Path
) -> None:
    words = ["convert", str(sample_folder), str(tmp_path / "out"), "--num-workers", "0"]
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cifake_ray", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    loaded = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert "pyarrow" in loaded
    assert not loaded & {"aiohttp", "botocore.session", "upath", "ray", "torch"}
