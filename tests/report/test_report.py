from __future__ import annotations

import io
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from cifake_ray.core.evaluation.calibration import Calibration
from cifake_ray.core.evaluation.metrics import compute_metrics
from cifake_ray.core.imaging.training_domain import ANY_SIDE, TrainingDomain
from cifake_ray.core.schema import FAKE, REAL
from cifake_ray.report import figures
from cifake_ray.report.evaluation import describe_verdict, split_slices
from cifake_ray.report.figures import INK, draw_figures
from cifake_ray.report.html import Example, render_report
from cifake_ray.report.svg import inline_svg
from cifake_ray.report.text import (
    describe_domain,
    describe_unlike,
    format_interval,
    format_metrics,
    model_card,
)

HOSTILE_KEY = "<script>alert(1)</script>\n\x1b[31m"
LONG_KEY = "a" * 250
HISTORY = [
    {"epoch": 1, "train_loss": 0.6, "val_loss": 0.5, "val_accuracy": 0.8, "lr": 1e-3, "x": "y"},
    {"epoch": 2, "train_loss": 0.4, "val_loss": float("nan"), "val_accuracy": 0.9, "lr": 1e-4},
]
DOMAIN = TrainingDomain(sides=(32, 1024), formats=("JPEG", "PNG"), jpeg_qualities=(75, 75))
ONLY_REAL = "camera $x$ 写真\n"


def make_metrics(num: int = 200, only: int | None = None):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, num) if only is None else np.full(num, only)
    logit = rng.normal(2.0 * label - 1, 1).astype(np.float32)
    rest: Any = {"operating_points": {}, "slices": {}, "real_vs_real": None}
    return rest | compute_metrics(logit, label, temperature=1.2, threshold=0.6, num_bootstrap=20)


def make_slice(metrics, value: str, label: str = "both", is_small: bool = False):
    return {
        **metrics,
        "value": value,
        "label": label,
        "is_small": is_small,
        "ranked_real": 100,
        "ranked_fake": 9,
        "accuracy_at_threshold": metrics["at_threshold"]["accuracy"],
    }


def make_example(key: str, label: int = REAL, p_fake: float = 0.9, **facts: Any) -> Example:
    sizes = {"width": 32, "height": 32, "image": encode_thumbnail()}
    return Example(key=key, label=label, p_fake=p_fake, **(sizes | facts))


@pytest.fixture(scope="module")
def metrics():
    return make_metrics()


@pytest.fixture(scope="module")
def drawn(metrics):
    return draw_figures(metrics, history=HISTORY)


@pytest.fixture(scope="module")
def page(metrics, drawn):
    auroc = {"value": 0.61, "low": 0.5, "high": 0.7}
    pair = {"higher": "<b>cat", "lower": "dog", "num_higher": 40, "num_lower": 30, "auroc": auroc}
    slices = [
        make_slice(metrics, "source=<b>sd</b>", "FAKE"),
        make_slice(make_metrics(30, only=REAL), ONLY_REAL, "REAL", is_small=True),
    ]
    points = {"fpr_0.01": {"threshold": 0.9, "confusion": [[96, 2], [50, 52]]}}
    return render_report(
        title="Report of <i>x</i>",
        context={"Detector": "small_cnn <u>"},
        warnings=["9 of 9 images are <unlike> those"],
        metrics=metrics
        | {
            "operating_points": points,
            "slices": {"source": slices},
            "real_vs_real": {"auroc": auroc, "pairs": [pair]},
        },
        figures=drawn,
        examples={
            "Worst": [
                make_example(HOSTILE_KEY, p_fake=0.99, source="<b>sd", format="<PNG>"),
                make_example(LONG_KEY, FAKE, 0.01, width=640, format="JPEG", jpeg_quality=75),
                make_example("\u202egpj.exe \udc80", gradient_map=encode_thumbnail()),
            ],
            "Random": [],
        },
        facts={"command": "cifake-ray evaluate 'a\"b' --out <o>", "version": "0.1"},
        errors={"truncated": 3, "empty": 0, "bad_key": 1200},
    )


def encode_thumbnail() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def test_hostile_keys_are_shown_and_do_nothing(page):
    assert "<script" not in page
    assert r"<script>alert(1)</script>\n\x1b[31m" in unescape(page)
    assert "\x1b" not in page
    assert r"\u202egpj.exe \udc80" in page
    assert LONG_KEY in page
    assert "&lt;b&gt;sd" in page
    assert "<i>x" not in page
    page.encode("utf-8")  # lone surrogates could not be written


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style><style>@import url(//evil)</style>",
    "</title><base href=//evil>",
    '<meta http-equiv="refresh" content="0;url=//evil">',
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt; &amp; &#60;",
    "\u202egpj.exe\u2066\u2069\u200f",
    "\x00\x08\x1b]0;title\x07\r\n\x85\u2028",
    "\ud800\udc80",
    r"$\frac{$",
]


FILES = ("metrics.json", "slices.csv", "predictions/", "figures/")  # beside the page
SVG_TAGS = {*["svg", "title", "defs", "clippath", "g", "path", "rect", "use", "text", "tspan"]}


class Elements(HTMLParser):
    """Every element of a page outside of its figures, and the text outside of its style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.is_figure = False  # how many ticks and lines a figure has depends on the numbers
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.is_figure |= tag == "svg"
        if self.is_figure:
            assert tag in SVG_TAGS
            assert all(str(value).startswith("#") for name, value in attrs if name == "href")
        else:
            self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.is_figure &= tag != "svg"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_that_others_named_becomes_an_element(metrics):
    """The same elements with hostile names as with harmless ones, wherever a name can stand."""
    figure = draw_figures(metrics)["roc"]

    def render(names: list[str]) -> Elements:
        return Elements(
            render_report(
                title=names[0],
                context={f"{name}.": name for name in names},
                warnings=names,
                metrics=metrics
                | {"slices": {names[0]: [make_slice(metrics, name) for name in names]}},
                figures=dict.fromkeys(names, figure),
                examples={
                    names[0]: [make_example(name, source=name, format=name) for name in names]
                },
                facts={f"{name}.": name for name in names},
                errors=dict.fromkeys(names, 1),
            )
        )

    harmless = render([f"name {n}" for n in range(len(HOSTILE))])
    for turn in range(len(HOSTILE)):
        page = render(HOSTILE[turn:] + HOSTILE[:turn])
        assert [(tag, set(attributes)) for tag, attributes in page.elements] == [
            (tag, set(attributes)) for tag, attributes in harmless.elements
        ]
        assert all(c.isprintable() or c == "\n" for c in page.text)
        for name in HOSTILE[:9]:
            assert page.text.count(name) >= 5
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "link", "form", "svg"}
        assert not any(name.startswith("on") for name in attributes)
        assert "style" not in attributes
        for name in {"src", "href", "action"} & set(attributes):
            assert str(attributes[name]).startswith(("data:image/png;base64,", "#", *FILES))


def test_the_policy_of_the_page_allows_its_own_style_and_images_and_nothing_else(page):
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in Elements(page).elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # A policy counts for what comes after it.
    assert page.index("Content-Security-Policy") < min(page.index("<title"), page.index("<style"))


def test_page_asks_for_nothing_outside_itself(page):
    sources = re.findall(r"""(?:src|href|action|srcset)\s*=\s*["']?([^"'> ]{0,30})""", page)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#", *FILES)) for source in sources)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in page


def test_page_has_its_parts_in_order_and_lists_them(page, metrics):
    headings = re.findall(r"<h2 id=\"([a-z]+)\">([^<]+)</h2", page)
    assert [heading for _, heading in headings] == [
        "Decisions",
        "Sources and other slices",
        "REAL against REAL",
        "Figures",
        "Other measures",
        "Images",
        "Images without a score",
        "How to reproduce these numbers",
    ]
    assert re.findall(r'<a href="#([a-z]+)">([^<]+)</a>', page) == headings
    verdict = page.index("Good on these images: AUROC")
    assert verdict < page.index("9 of 9 images are &lt;unlike&gt; those") < page.index("<dd>0.9")
    assert page.index("Accuracy at 0.5") < page.index("small_cnn &lt;u&gt;") < page.index("<h2")
    assert format_interval(metrics["average_precision"]) in page
    assert "1,200" in page
    assert ">empty<" not in page
    labels = re.findall('aria-label="([^"]+)"', page)
    assert len(set(labels)) == len(labels)  # else a screen reader cannot tell tables apart


def test_a_rate_that_rests_on_a_few_images_is_marked(page):
    row = next(line for line in page.splitlines() if "1% FPR on validation" in line)
    assert re.findall("<td>([^<]*)</td>", row) == [
        *("0.9", "74.0% (67.5-79.6)", "74.5%", "2 (2.0%)", "50 (49.0%)", "96.3%"),
    ]
    assert "†</th>" in row
    assert "† One of its rates" in page


def test_an_image_is_shown_with_all_that_is_known_of_it(page):
    (small, large, mapped) = re.findall("<details>.*?</details>", page, re.DOTALL)
    assert "p_fake 0.9900</b> REAL, called FAKE" in small
    assert "32 x 32 &lt;PNG&gt;" in small
    assert 'class="small"' in small
    assert "p_fake 0.0100</b> FAKE, called REAL" in large
    assert "640 x 32 JPEG 75" in large
    assert 'class="small"' not in large
    assert [each.count("<img") for each in (small, large, mapped)] == [1, 1, 2]
    assert "integrated gradients" in page


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.985, 0.98, 0.99, "Strong on these images: AUROC 0.985"),
        (0.85, 0.80, 0.9, "Fair on these images: AUROC"),
        (0.7, None, None, "Weak on these images: AUROC 0.700"),
        (0.6, 0.49, 0.7, "No better than chance on these images:"),
        (0.2, 0.1, 0.3, "Worse than chance on these images: are the labels swapped?"),
    ],
)
def test_a_verdict_in_words(metrics, value, low, high, verdict):
    auroc = {"value": value, "low": low, "high": high}
    assert describe_verdict(metrics | {"auroc": auroc}).startswith(verdict)


def test_page_of_one_class_and_nothing_else():
    metrics = make_metrics(5, only=FAKE)
    figures = draw_figures(metrics)
    assert "roc" not in figures
    page = render_report(
        title="t",
        context={},
        warnings=[],
        metrics=metrics,
        figures=figures,
        examples={},
        facts={},
        errors={},
    )
    assert "every image was scored" in page
    assert "of 5 FAKE" in page
    assert 'class="warning"' not in page


def test_a_long_list_of_slices_is_cut_and_says_so(metrics):
    many = [make_slice(metrics, f"s{n}") for n in range(60)]
    (table,) = split_slices({"format": many})
    assert (table[0], len(table[1]), table[2]) == ("REAL and FAKE by format", 50, 10)


def test_every_figure_is_an_svg_that_opens_alone_and_asks_for_nothing(drawn):
    assert list(drawn) == ["roc", "roc_log", "scores", "reliability", "loss", "accuracy"]
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        assert root.attrib["width"] == "360pt"
        assert 120 < float(root.attrib["height"].removesuffix("pt")) < 400
        assert len(svg) < 100_000
        assert not {"image", "script", "date"} & {e.tag.partition("}")[2] for e in root.iter()}
        assert b"var(" not in svg
        assert INK.encode() in svg


def test_a_figure_in_a_page_takes_its_colours_its_font_and_ids_of_its_own(drawn):
    shown = [inline_svg(svg, name) for name, svg in drawn.items()]
    shown.append(inline_svg(drawn["roc"], "the same again"))
    ids, used = [], []
    for svg in shown:
        assert "var(--ink)" in svg
        assert not re.findall(r": #[0-9a-f]{6}", svg)
        assert "font-family" not in svg
        assert "<style" not in svg
        ids += re.findall(r' id="([^"]+)"', svg)
        used += re.findall(r'(?:url\(|href=")#([^)"]+)', svg)
    assert len(set(ids)) == len(ids)
    assert set(used) <= set(ids)
    assert {"roc", "the same again"} < {re.findall("<title>(.*)</title>", svg)[0] for svg in shown}
    assert "var(--real)" in inline_svg(drawn["scores"], "")
    assert "var(--fake)" in inline_svg(drawn["scores"], "")


def test_reliability_shows_the_curve_before_calibration_too(metrics):
    before = {**metrics, "reliability_bins_uncalibrated": metrics["reliability_bins"]}
    assert figures.draw_reliability(before) != figures.draw_reliability(metrics)


def test_same_numbers_give_the_same_bytes(metrics, drawn):
    assert draw_figures(metrics, history=HISTORY) == drawn


@pytest.mark.parametrize("history", [[], HISTORY[:1], [{"epoch": 1}]])
def test_short_histories_are_drawn_or_left_out(metrics, history):
    drawn = draw_figures(metrics, history=history)
    assert ("loss" in drawn) == ("accuracy" in drawn) == bool(history)


def test_intervals_as_text():
    assert format_interval({"value": 0.9312, "low": 0.926, "high": 0.936}, percent=True) == (
        "93.1% (92.6-93.6)"
    )
    assert format_interval({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert format_interval({"value": None, "low": None, "high": None}) == "-"


def test_summary_tells_both_thresholds(metrics):
    text = format_metrics(metrics)
    assert text.startswith("Of 200 images ")
    assert "at threshold 0.6" in text
    assert "TPR at 0.1% FPR" in text
    widths = {len(line) for line in text.split("\n\n")[1].splitlines()}
    assert len(widths) == 1  # columns line up in a terminal


def test_model_card_has_a_hub_header_and_its_limits(metrics):
    yaml = pytest.importorskip("yaml")
    card = model_card(
        name="tiny {x}",
        architecture="resnet18",
        num_parameters=1_234_567,
        trained_on="CIFAKE,\n32x32",
        domain=DOMAIN,
        preprocessing={"image_size": 32},
        training={"note": "a|b\nc"},
        calibration=Calibration(
            temperature=1.5, threshold=0.5, threshold_fpr_1=None, threshold_fpr_01=0.99
        ),
        metrics=metrics,
    )
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "apache-2.0"
    assert "# tiny {x}\n" in body
    assert "1,234,567" in body
    assert "cifake-ray score DIR OUT --bundle BUNDLE" in body
    assert r"| a\|b c" in body
    assert "too few" in body  # about 100 REAL images promise nothing at 0.1%
    assert "| cannot be reached on validation |" in body
    assert "## Limits" in body
    assert "\nSides: 32 to 1,024 pixels; formats: JPEG, PNG; JPEG quality: 75.\n" in body


def test_a_domain_in_words():
    counts = {"size": 1502, "format": 0, "jpeg_quality": 7, "any": 1502}
    assert describe_unlike(counts, 2000, DOMAIN) == (
        "1,502 of 2,000 images are unlike the detector's training images: 1,502 by size (training:"
        " 32 to 1,024 pixels), 7 by JPEG quality (training: 75); their scores may be unreliable"
    )
    no_jpeg = TrainingDomain(sides=(32, 32), formats=("PNG",), jpeg_qualities=None)
    assert describe_domain(no_jpeg) == "Sides: 32 pixels; formats: PNG; JPEG quality: -."
    crops = TrainingDomain(sides=(128, ANY_SIDE), formats=("JPEG",), jpeg_qualities=(57, 100))
    assert describe_unlike({"size": 3, "format": 0, "jpeg_quality": 0, "any": 3}, 9, crops) == (
        "3 of 9 images are unlike the detector's training images: 3 by size (smaller than 128"
        " pixels); their scores may be unreliable"
    )
    assert describe_domain(crops).startswith("Sides: 128 or more pixels; formats: JPEG;")
    assert "not recorded" in describe_domain(None)
