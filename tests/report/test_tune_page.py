"""The report of a search: its figures are pictures of the numbers, its page says them."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from test_report import HOSTILE, Elements

from cifake_ray.core.search.trial_table import to_row
from cifake_ray.report.tune_page import draw_bars, draw_objective, draw_parallel, render_tune_page
from cifake_ray.report.tune_text import format_recipe, format_trials


def make_search(num_trials: int = 10) -> tuple[list[dict[str, Any]], dict[int, Any]]:
    rng = np.random.default_rng(1)
    histories = {
        number: [
            {
                "epoch": epoch,
                "step": 10 * epoch,
                "train_s": 1.0,
                "val_accuracy": 0.5 + 0.05 * epoch + 0.01 * float(rng.random()),
            }
            for epoch in range(1, 2 + number % 4)
        ]
        for number in range(num_trials)
    }
    rows = [
        to_row(
            number,
            {"lr": 10 ** -float(rng.uniform(1, 4)), "model": "a|b" if number % 2 else "<script>"},
            "stopped by asha" if number % 3 else "all 4 epochs done",
            1234,
            history,
            "val_accuracy",
        )
        for number, history in histories.items()
    ]
    rows.append(to_row(num_trials, {"lr": 0.1, "model": "cnn"}, None, 99, [], "val_accuracy"))
    return rows, {**histories, num_trials: []}


SUMMARY: dict[str, Any] = {
    "out": "/run",
    "bundle": "/run/bundle",
    "recipe": "/run/recipe.yaml",
    "objective": "val_accuracy",
    "best_trial": 3,
    "best": 0.7,
    "best_interval": [0.65, 0.75],
    "baseline": 0.6,
    "chosen": {"lr": 0.1, "model": "cnn"},
    "epochs": 24,
    "epochs_planned": 44,
    "steps": 240,
}


def test_the_page_shows_every_trial_and_what_was_saved() -> None:
    rows, histories = make_search()
    page = render_tune_page(SUMMARY, rows, histories, "lr: 0.1\nmodel: cnn\n", "cifake-ray tune")
    rows_shown = re.findall(r'<tr( class="best")?><th scope="row">(\d+)', page)
    assert len(rows_shown) == 11
    assert [number for mark, number in rows_shown if mark] == ["3"]
    values = [float(x) for x in re.findall(r"</th><td>([\d.]+)</td>", page)]
    assert values == sorted(values, reverse=True)
    assert "of 44, 45.5% saved by stopping early" in page
    assert "3 (best)" in page
    assert "val_accuracy 0.7000; the recipe as it is has 0.6000." in page
    assert "95% interval 0.6500 to 0.7500" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<figure>") == 3
    assert "lr: 0.1\nmodel: cnn" in page


def test_nothing_that_others_named_becomes_an_element_or_a_formula() -> None:
    """The same elements with hostile names as with harmless ones, wherever a name can stand."""

    def render(names: list[str]) -> Elements:
        rows, histories = make_search()
        for number, row in enumerate(rows):
            row[names[0]] = names[number % len(names)]
            row["end"] = f"failed: {names[0]}"
        chosen = {names[0]: names[1], **SUMMARY["chosen"]}
        paths = dict.fromkeys(("bundle", "recipe", "out"), names[0])
        summary = {**SUMMARY, **paths, "chosen": chosen}
        page = render_tune_page(summary, rows, histories, names[0], names[0])
        page.encode()
        return Elements(page)

    harmless = render([f"name {n}" for n in range(len(HOSTILE))])
    for turn in range(len(HOSTILE)):
        page = render(HOSTILE[turn:] + HOSTILE[:turn])
        assert [(tag, set(attributes)) for tag, attributes in page.elements] == [
            (tag, set(attributes)) for tag, attributes in harmless.elements
        ]
        assert all(c.isprintable() or c == "\n" for c in page.text)


def test_a_small_search_shows_trials_side_by_side_and_no_importance() -> None:
    rows, histories = make_search(4)
    page = render_tune_page(SUMMARY, rows, histories, "", "cifake-ray tune")
    assert "Which options mattered needs 8 trials" in page
    assert page.count("<figure>") == 1
    heads = re.findall(r'<th scope="col"[^>]*>([^<]+)</th>', page)
    assert len(heads) == 6
    assert "Trial 3 (best)" in heads
    assert re.findall(r'<tr><th scope="row">(\w+)', page) == [
        *("val_accuracy", "Epochs", "Parameters", "State", "lr", "model"),
    ]


def test_only_options_that_varied_and_mattered_get_an_axis_and_a_column() -> None:
    rows, histories = make_search(40)
    rng = np.random.default_rng(0)
    for row in rows:
        row["fixed"] = 7
        row["noise"] = float(rng.random())
        if row["val_accuracy"] is not None:
            row["val_accuracy"] = 0.9 - 0.1 * row["lr"] - 0.3 * (row["model"] == "a|b")
    summary = {**SUMMARY, "chosen": {"noise": 0.5, "fixed": 7, "lr": 0.1, "model": "cnn"}}
    page = render_tune_page(summary, rows, histories, "", "cifake-ray tune")
    heads = re.findall(r'<th scope="col"[^>]*>([^<]+)</th>', page)
    assert heads[2] == "model"
    assert "noise" not in heads
    assert "The same in all trials: fixed 7." in page
    parallel = re.findall("<svg.*?</svg>", page, re.DOTALL)[2]
    assert ">model</text>" in parallel
    assert ">noise</text>" not in parallel


def test_figures_are_pictures_that_change_with_the_numbers() -> None:
    rows, histories = make_search()
    drawn = [
        draw_objective(histories, "val_accuracy", 3),
        draw_objective(histories, "val_accuracy", 2),
        draw_parallel(rows, ["lr", "model"], "val_accuracy", 3),
        draw_parallel(rows, ["lr"], "val_accuracy", 3),
        draw_bars({"lr": 0.75, "model": 0.25}, "Share"),
        draw_bars({"lr": 0.25, "model": 0.75}, "Share"),
    ]
    assert len(set(drawn)) == len(drawn)
    for svg in drawn:
        assert ElementTree.fromstring(svg).attrib["width"] == "360pt"


def test_the_table_is_best_first_and_says_who_waits() -> None:
    rows, _ = make_search()
    table = format_trials(rows, ["lr", "model"], "val_accuracy", width=60)
    assert max(map(len, table.splitlines())) == 60
    lines = table.splitlines()[2:]
    values = [float(line.split("|")[2]) for line in lines[:-1]]
    assert values == sorted(values, reverse=True)
    assert "waiting" in lines[-1]
    cut = format_trials(rows, ["lr", "model"], "val_accuracy", width=50).splitlines()
    assert not any(line.endswith("...") for line in cut), "a line that would not be written"


def test_the_table_of_losses_begins_with_the_lowest() -> None:
    rows = [
        to_row(
            n, {}, None, 1, [{"epoch": 1, "step": 1, "train_s": 1, "val_loss": loss}], "val_loss"
        )
        for n, loss in enumerate((0.5, 0.2, 0.9))
    ]
    lines = format_trials(rows, [], "val_loss", width=80).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "0", "2"]
    assert all("running" in line for line in lines)


def test_a_recipe_opens_with_its_command_and_what_it_reached() -> None:
    row = to_row(
        3, {}, None, 1, [{"epoch": 1, "step": 1, "train_s": 90, "val_auroc": 0.9}], "val_auroc"
    )
    facts: Any = {"command": "train it", "row": row, "objective": "val_auroc"}
    text = format_recipe({"lr": 0.1}, **facts, is_alone=True)
    assert "on their own" not in text
    assert "on their own" in format_recipe({"lr": 0.1}, **facts, is_alone=False)
    assert text.startswith("# Trial 3 of a search: val_auroc 0.9000 after epoch 1 of 1,\n# 1.5 min")
    assert "#   train it\n" in text
    assert text.endswith("lr: 0.1\n")


@pytest.mark.parametrize("objective", ["val_accuracy", "val_loss"])
def test_the_best_line_is_the_darkest_whichever_way_is_better(objective: str) -> None:
    rows = [
        {"trial": n, "lr": 0.1 * n, objective: value} for n, value in enumerate((0.2, 0.5, 0.9))
    ]
    assert draw_parallel(rows, ["lr"], objective, 0) != draw_parallel(rows, ["lr"], objective, 2)
