"""Options: flags beat variables, variables beat the file, and a wrong word is refused by name."""

from __future__ import annotations

import io
import os
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from cifake_ray import cli, pipeline
from cifake_ray.config import (
    POLICIES,
    Augmentation,
    Config,
    ConvertConfig,
    EvaluateConfig,
    ScoreConfig,
    TrainConfig,
    TuneConfig,
    doc_of,
    fingerprint_settings,
)
from cifake_ray.console import choose_log_format, log
from cifake_ray.options import PREFIX, make_command
from cifake_ray.storage.presets.augmentation import read_augmentation
from cifake_ray.storage.presets.yaml_presets import RECIPES


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


def invoke(
    config_class: type[Config], *arguments: str, env: dict[str, str] | None = None
) -> tuple[Result, list[Any]]:
    configs: list[Any] = []
    app = typer.Typer()
    app.command("verb")(make_command(config_class, lambda make, **_: configs.append(make())))
    return CliRunner().invoke(app, list(arguments), env=env), configs


def parse(config_class: type[Config], *arguments: str, env: dict[str, str] | None = None) -> Any:
    result, configs = invoke(config_class, *arguments, env=env)
    assert result.exit_code == 0, result.output
    (config,) = configs
    return config


def refuse(config_class: type[Config], *arguments: str, env: dict[str, str] | None = None) -> str:
    """What the usage error says, without the frame and its line breaks."""
    result, configs = invoke(config_class, *arguments, env=env)
    assert configs == []
    assert result.exit_code == 2, (result.output, result.exception)
    return " ".join(result.output.replace("\u2502", " ").split())


@pytest.fixture
def write_file(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> str:
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_a_flag_beats_a_variable_and_a_variable_beats_the_file(write_file: Any) -> None:
    file = write_file("epochs: 1\nlr: 0.1\nmodel: from_file\n")
    env = {"CIFAKE_RAY_EPOCHS": "2", "CIFAKE_RAY_LR": "0.2"}
    config = parse(TrainConfig, "s", "r", "--config", file, "--epochs", "3", env=env)
    assert (config.epochs, config.lr, config.model) == (3, 0.2, "from_file")
    assert config.batch_size == TrainConfig(shards="s", run="r").batch_size


def test_the_place_of_the_file_among_the_flags_does_not_matter(write_file: Any) -> None:
    file = write_file("epochs: 7\nlr: 0.5\n")
    for arguments in (
        ("--config", file, "s", "r", "--lr", "0.1"),
        ("s", "r", "--lr", "0.1", "--config", file),
    ):
        config = parse(TrainConfig, *arguments)
        assert (config.epochs, config.lr) == (7, 0.1)


def test_the_file_takes_every_field_in_either_spelling(write_file: Any) -> None:
    file = write_file(
        "src: /images\nout: /out\nsource-kind: folder\ninclude: ['*.jpg', '* *.png']\n"
        "real_name: [nature]\nmax_error_rate: 0.5\ndry-run: true\nshard_size: 10\n"
    )
    assert parse(ConvertConfig, "--config", file) == ConvertConfig(
        src="/images",
        out="/out",
        source_kind="folder",
        include=("*.jpg", "* *.png"),
        real_name=("nature",),
        max_error_rate=0.5,
        dry_run=True,
        shard_size=10,
    )


def test_the_file_goes_before_the_recipe_wherever_they_stand(
    write_file: Any, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 9\nlr: 0.9\n")
    file = write_file("epochs: 7\n")
    for arguments in (
        ("--recipe", str(recipe), "--config", file, "s", "r"),
        ("--config", file, "s", "r", "--recipe", str(recipe)),
    ):
        config = parse(TrainConfig, *arguments)
        assert (config.epochs, config.lr) == (7, 0.9)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_in_the_box_is_one(name: str) -> None:
    config = parse(TrainConfig, "s", "r", "--recipe", name)
    assert config != TrainConfig(shards="s", run="r")
    assert config.augment in POLICIES
    assert f"--recipe {name}" in (RECIPES / f"{name}.yaml").read_text()  # opens with its command


def test_a_policy_in_a_recipe_and_a_recipe_of_a_search(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("augment: {flip: 0.5, shift: 0.1}\n")
    config = parse(TrainConfig, "s", "r", "--recipe", str(recipe))
    assert read_augmentation(config) == Augmentation(flip=0.5, shift=0.1)
    assert parse(TuneConfig, "s", "r", "--recipe", "best").recipe == "best"
    recipe.write_text("recipe: seed-v1.0\ntrials: 3\n")
    search = parse(TuneConfig, "s", "r", "--config", str(recipe))
    assert (search.recipe, search.trials) == ("seed-v1.0", 3)


def test_an_error_on_an_option_that_a_recipe_set_names_the_recipe(
    tmp_path: Path,
) -> None:
    images = []
    for shade in range(200):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 9), (shade, 0, 0)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    rows = {"image": images, "label": ["REAL", "FAKE"] * 100}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    words = ["train", str(tmp_path), str(tmp_path / "run"), "--recipe", "wild"]
    for own, recipe in (([], "recipe wild: "), (["--balance-sources", "0.5"], "")):
        result = CliRunner().invoke(cli.app, [*words, *own])
        assert result.exit_code == 2
        assert f"cifake-ray: {recipe}--balance-sources 0.5: no image" in result.output
        assert "--balance-sources 0 balances REAL and FAKE only" in result.output
    result = CliRunner().invoke(cli.app, [*words, "--fit", "resize"])
    assert "recipe wild: --num-crops and --crops-per-image need --fit crops" in result.output


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are() -> None:
    said = refuse(TrainConfig, "s", "r", "--recipe", "fastest")
    assert "fastest: no such file, and not among the built-in recipes" in said
    assert "seed-v1.3" in said
    assert "No such option: --recipe" in refuse(ConvertConfig, "s", "o", "--recipe", "seed-v1.3")


def test_numbers_in_the_notation_of_yaml_are_numbers(write_file: Any) -> None:
    assert parse(TrainConfig, "s", "r", "--config", write_file("lr: 1e-3\n")).lr == 0.001


def test_a_switch_can_be_turned_off_everywhere(write_file: Any) -> None:
    on = write_file("dry_run: yes\n")
    assert parse(TrainConfig, "s", "r", "--config", on).dry_run
    assert not parse(TrainConfig, "s", "r", "--config", on, "--no-dry-run").dry_run
    variable = {"CIFAKE_RAY_DRY_RUN": "0"}
    assert not parse(TrainConfig, "s", "r", "--config", on, env=variable).dry_run
    assert not parse(TrainConfig, "s", "r", "--config", write_file("dry_run: no\n")).dry_run


def test_an_option_given_twice_is_both(write_file: Any) -> None:
    config = parse(ScoreConfig, "a", "b", "--include", "*.jpg", "--include", "*.png")
    assert config.include == ("*.jpg", "*.png")


def test_an_unknown_key_is_refused_and_named(write_file: Any) -> None:
    said = refuse(TrainConfig, "s", "r", "--config", write_file("epochs: 2\nlearning_rate: 1\n"))
    assert "has no option learning_rate" in said
    assert "epochs," in said  # the names it has


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epochs: [1\n", "not readable as YAML"),
        ("a: b: c\n", "not readable as YAML"),
        (b"model: \xff\n", "not readable as YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not readable as YAML"),
        ("- epochs\n", "holds no mapping"),
        ("just text\n", "holds no mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(
    write_file: Any, text: str | bytes, says: str
) -> None:
    assert says in refuse(TrainConfig, "s", "r", "--config", write_file(text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    said = refuse(TrainConfig, "s", "r", "--config", str(tmp_path / "gone.yaml"))
    assert "gone.yaml" in said.replace(" ", "")


def test_an_empty_file_changes_nothing(write_file: Any) -> None:
    assert parse(TrainConfig, "s", "r", "--config", write_file("")) == parse(TrainConfig, "s", "r")


@pytest.mark.parametrize(
    "text",
    ["epochs: many\n", "epochs: 2.5\n", "epochs: [1, 2]\n", "fit: stretch\n", "lr: [0.1]\n"],
)
def test_a_value_of_another_kind_in_the_file_is_refused(write_file: Any, text: str) -> None:
    refuse(TrainConfig, "s", "r", "--config", write_file(text))


@pytest.mark.parametrize("name", ["include", "exclude", "real_name", "allow_prefix"])
def test_one_word_where_a_list_belongs_is_a_list_of_one(write_file: Any, name: str) -> None:
    config = parse(ConvertConfig, "a", "b", "--config", write_file(f"{name}: '*.jpg'\n"))
    assert getattr(config, name) == ("*.jpg",)


def test_a_mapping_where_a_list_belongs_is_refused_in_words(write_file: Any) -> None:
    said = refuse(ConvertConfig, "a", "b", "--config", write_file("include: {a: b}\n"))
    assert "include: give a list" in said


def test_a_list_where_one_text_belongs_is_refused_in_words(write_file: Any) -> None:
    said = refuse(TrainConfig, "s", "r", "--config", write_file("teacher: [cifake, wild]\n"))
    assert "teacher: give one value, not a list" in said


@pytest.mark.parametrize(
    ("words", "text", "env", "guess"),
    [
        (("--bundel", "x"), "", {}, "--bundel; did you mean --bundle?"),
        (("--target_fpr", "0.01"), "", {}, "did you mean --target-fpr?"),
        (("--no-dry-rum",), "", {}, "did you mean --no-dry-run?"),
        (("--device", "cdua"), "", {}, "did you mean cuda?"),
        (("--source-kind", "foldr"), "", {}, "did you mean folder?"),
        ((), "bundel: x\n", {}, "has no option bundel; did you mean bundle?"),
        ((), "score: {bundel: x}\n", {}, "has no option bundel; did you mean bundle?"),
        ((), "train: {epohcs: 3}\n", {}, "train has no option epohcs; did you mean epochs?"),
        ((), "s3_profle: x\nscore: {}\n", {}, "did you mean s3_profile?"),
        ((), "device: cdua\n", {}, "did you mean cuda?"),
        ((), "", {"CIFAKE_RAY_DEVICE": "cdua"}, "did you mean cuda?"),
        ((), "", {"CIFAKE_RAY_BUNDEL": "x"}, "did you mean CIFAKE_RAY_BUNDLE?"),
        ((), "", {"CIFAKE_RAY_NOTHING_LIKE_IT": "x"}, "CIFAKE_RAY_NOTHING_LIKE_IT is set"),
    ],
)
def test_what_is_misspelt_is_refused_with_a_guess(
    write_file: Any, words: tuple[str, ...], text: str, env: dict[str, str], guess: str
) -> None:
    arguments = ["score", "a", "b", *words, "--config", write_file(text)]
    result = CliRunner().invoke(cli.app, arguments, env=env)
    assert result.exit_code == 2, result.output
    assert guess in " ".join(result.output.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("config_class", "values", "guess"),
    [
        (TrainConfig, {"track": ("mlfow",)}, "mlflow"),
        (TrainConfig, {"optimizer": "adam"}, "adamw"),
        (ScoreConfig, {"device": "cdua"}, "cuda"),
    ],
)
def test_a_misspelt_word_in_python_is_refused_with_a_guess(
    config_class: Any, values: dict[str, Any], guess: str
) -> None:
    required = ("shards", "run") if config_class is TrainConfig else ("src", "out")
    with pytest.raises(ValueError, match=f"did you mean {guess}"):
        config_class(**dict.fromkeys(required, "x"), **values)


# --- project files -------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that commands make, instead of running them."""
    configs: list[Any] = []

    def run_verb(config: Any, started_s: float) -> tuple[Any, int]:
        configs.append(config)
        return {"command": "none"}, 0

    monkeypatch.setattr(pipeline, "run_verb", run_verb)
    return configs


def run(*arguments: str) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output


def test_a_project_file_has_a_section_for_each_verb(seen: list[Any], write_file: Any) -> None:
    file = write_file(
        "s3-profile: shared\ndevice: cpu\n"
        "score:\n  target-fpr: 0.01\n  s3_profile: mine\n"
        "train:\n  recipe: fast\n  epochs: 3\n  device: null\n"
    )
    run("score", "a", "b", "--config", file)
    run("train", "s", "r", "--config", file)
    run("train", "s", "r", "--config", file, "--recipe", "best")
    run("convert", "a", "b", "--config", file)
    score, fast, best, convert = seen
    assert (score.target_fpr, score.s3_profile, score.device) == (0.01, "mine", "cpu")
    assert (fast.epochs, fast.device, fast.s3_profile) == (3, "cpu", "shared")
    assert fast.model == parse(TrainConfig, "s", "r", "--recipe", "fast").model
    assert best == replace(
        parse(TrainConfig, "s", "r", "--recipe", "best"),
        **{"epochs": 3, "device": "cpu", "s3_profile": "shared"},
    )
    assert convert.s3_profile == "shared"


def test_the_printed_file_is_the_defaults(seen: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    for verbs in (["score"], ["train"], ["train", "score", "submit"]):
        result = CliRunner().invoke(cli.app, ["config", *verbs])
        assert result.exit_code == 0, result.output
        file.write_text(result.stdout)
        for verb in set(verbs) - {"submit"}:
            run(verb, "a", "b", "--config", str(file))
            config = seen.pop()
            required = {f.name: v for f, v in zip(*find_required(type(config)), strict=False)}
            assert config == type(config)(**required)
    for field in fields(TrainConfig):
        assert re.search(rf"^  (# )?{field.name}: ", result.stdout, re.MULTILINE), field.name
        assert doc_of(TrainConfig, field.name).help[:40] in result.stdout


def find_required(config_class: Any) -> tuple[list[Any], str]:
    return [f for f in fields(config_class) if f.default is MISSING], "ab"


def test_a_verb_that_is_none_has_no_file() -> None:
    result = CliRunner().invoke(cli.app, ["config", "scor"])
    assert result.exit_code == 2
    assert "did you mean score?" in result.output


@pytest.mark.parametrize(
    ("config_class", "arguments", "says"),
    [
        (TrainConfig, ("s", "r", "--epochs", "x"), "epochs"),
        (TrainConfig, ("s", "r", "--fit", "stretch"), "resize"),
        (TrainConfig, ("s", "r", "--no-such"), "--no-such"),
        (TrainConfig, ("s",), "Missing argument"),
        (ConvertConfig, ("s", "o", "--source-kind", "zip"), "folder"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(
    config_class: type[Config], arguments: tuple[str, ...], says: str
) -> None:
    assert says in refuse(config_class, *arguments)


def test_a_wrong_variable_is_refused() -> None:
    assert "epochs" in refuse(TrainConfig, "s", "r", env={"CIFAKE_RAY_EPOCHS": "x"}).lower()


# --- the checks of the configs themselves --------------------------------------------------------


@pytest.mark.parametrize(
    ("config_class", "values", "flag"),
    [
        (ConvertConfig, {"num_workers": -1}, "--num-workers"),
        (ConvertConfig, {"shard_size": 0}, "--shard-size"),
        (ConvertConfig, {"max_error_rate": 1.5}, "--max-error-rate"),
        (ConvertConfig, {"max_error_rate": float("nan")}, "--max-error-rate"),
        (ScoreConfig, {"batch_size": 0}, "--batch-size"),
        (ScoreConfig, {"target_fpr": 0.05}, "--target-fpr"),
        (TrainConfig, {"epochs": 0}, "--epochs"),
        (TrainConfig, {"lr": 0.0}, "--lr"),
        (TrainConfig, {"lr": float("nan")}, "--lr"),
        (TrainConfig, {"lr": float("inf")}, "--lr"),
        (TrainConfig, {"weight_decay": -1.0}, "--weight-decay"),
        (TrainConfig, {"warmup": 1.0}, "--warmup"),
        (TrainConfig, {"label_smoothing": -0.1}, "--label-smoothing"),
        (TrainConfig, {"val_fraction": 0.0}, "--val-fraction"),
        (TrainConfig, {"val_fraction": 1.0}, "--val-fraction"),
        (TrainConfig, {"num_workers": "-1"}, "--num-workers"),
        (TrainConfig, {"num_workers": "0:2"}, "--num-workers"),
        (TrainConfig, {"num_workers": "3:2"}, "--num-workers"),
        (TrainConfig, {"num_workers": "2:"}, "--num-workers"),
        (TrainConfig, {"num_workers": "9", "batch_size": 8}, "--num-workers"),
        (TrainConfig, {"num_workers": "1:9", "batch_size": 8}, "--num-workers"),
        (TrainConfig, {"keep_epochs": 0}, "--keep-epochs"),
        (TrainConfig, {"checkpoint_steps": 0}, "--checkpoint-steps"),
        (TrainConfig, {"image_size": 4}, "--image-size"),
        (TrainConfig, {"image_size": 10**6}, "--image-size"),
        (TrainConfig, {"cache_gb": -1.0}, "--cache-gb"),
        (TrainConfig, {"max_failures": -1}, "--max-failures"),
        (TrainConfig, {"seed": -1}, "--seed"),
        (EvaluateConfig, {"num_bootstrap": 1}, "--num-bootstrap"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_flag(
    config_class: Any, values: dict[str, Any], flag: str
) -> None:
    required = {
        TrainConfig: {"shards": "s", "run": "r"},
        EvaluateConfig: {"shards": "s", "out": "o"},
    }.get(config_class, {"src": "s", "out": "o"})
    with pytest.raises(ValueError, match=flag):
        config_class(**required, **values)


def test_how_fast_a_run_is_does_not_make_it_another_run() -> None:
    plain = ScoreConfig(src="s", out="o")
    fast = ScoreConfig(
        src="s",
        out="elsewhere",
        address="auto",
        num_workers=7,
        batch_size=9,
        device="cpu",
        max_error_rate=0.5,
        dry_run=True,
    )
    assert fingerprint_settings(plain) == fingerprint_settings(fast)
    other = ScoreConfig(src="s", out="o", include=("*.jpg",))
    assert fingerprint_settings(plain) != fingerprint_settings(other)


def test_the_format_of_the_log_is_an_option_and_a_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        parse(TrainConfig, "s", "r", "--log-format", "json")
        log("hello")
        parse(TrainConfig, "s", "r")
        log("hello")
        parse(TrainConfig, "s", "r", env={"CIFAKE_RAY_LOG_FORMAT": "json"})
        log("hello")
    finally:
        choose_log_format("text")
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("{") for line in lines] == [True, False, True]
    assert "'text', 'json'" in refuse(TrainConfig, "s", "r", "--log-format", "xml")
