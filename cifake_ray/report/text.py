"""Format metrics as text: the summary for the terminal, and the model card of a bundle.

Tables are Markdown, padded so that they also read well as plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cifake_ray.core.imaging.training_domain import ANY_SIDE
from cifake_ray.core.schema import LABEL_NAMES
from cifake_ray.report.numbers import format_interval, format_share

if TYPE_CHECKING:
    from cifake_ray.core.evaluation.calibration import Calibration
    from cifake_ray.core.imaging.training_domain import Bounds, TrainingDomain

# Key of the metrics, display name, whether to show it as percent.
KEY_METRICS = (
    ("accuracy", "Accuracy at 0.5", True),
    ("auroc", "AUROC", False),
    ("average_precision", "Average precision", False),
    ("eer", "Equal error rate", True),
    ("tpr_at_fpr_1pct", "TPR at 1% FPR", True),
    ("tpr_at_fpr_0.1pct", "TPR at 0.1% FPR", True),
    ("ece", "Calibration (ECE)", False),
    ("brier", "Brier score", False),
    ("nll", "NLL (nats)", False),
)
BLOCKS = ("at_0.5", "at_threshold")


def list_decisions(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows of a metric's name, its value at 0.5 and its value at the threshold."""
    rows = []
    for key, name in (("accuracy", "Accuracy"), ("balanced_accuracy", "Balanced accuracy")):
        low, high = (format_interval(metrics[block][key], percent=True) for block in BLOCKS)
        rows.append((name, low, high))
    for name in LABEL_NAMES:
        for key in ("precision", "recall", "f1"):
            low, high = (format_share(metrics[block]["per_class"][name][key]) for block in BLOCKS)
            rows.append((f"{name} {key.replace('f1', 'F1')}", low, high))
    for i, name in enumerate(LABEL_NAMES):
        wrong = [metrics[block]["confusion"][i][1 - i] for block in BLOCKS]
        rows.append((f"{name} called {LABEL_NAMES[1 - i]}", f"{wrong[0]:,}", f"{wrong[1]:,}"))
    return rows


def describe_result(metrics: Mapping[str, Any]) -> str:
    """Summarise the result in one sentence."""
    right = [metrics["at_0.5"]["confusion"][i][i] for i in range(2)]
    totals = (metrics["num_real"], metrics["num_fake"])
    per_class = " and ".join(
        f"{hits:,} of {total:,} {name}"
        for hits, total, name in zip(right, totals, LABEL_NAMES, strict=True)
        if total
    )
    accuracy = format_interval(metrics["accuracy"], percent=True)
    return (
        f"Of {metrics['num_images']:,} images {accuracy} are classified correctly at 0.5:"
        f" {per_class}."
    )


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format `core.evaluation.metrics.compute_metrics` as Markdown: a sentence and two tables."""
    numbers = [
        (name, format_interval(metrics[key], percent=percent)) for key, name, percent in KEY_METRICS
    ]
    threshold = f"at threshold {metrics['threshold']:.4g}"
    return "\n\n".join(
        (
            describe_result(metrics),
            format_rows(("Metric", "Value (95% interval)"), numbers),
            format_rows(("Decision", "at 0.5", threshold), list_decisions(metrics)),
        )
    )


def describe_unlike(counts: Mapping[str, int], num_scored: int, domain: TrainingDomain) -> str:
    """Format the counts of `TrainingDomain.count_unlike` over `num_scored` images."""
    low, high = domain.sides
    reasons = {
        "size": f"size (smaller than {low:,} pixels)"
        if high == ANY_SIDE
        else f"size (training: {_format_range(domain.sides)} pixels)",
        "format": f"format (training: {', '.join(domain.formats)})",
        "jpeg_quality": f"JPEG quality (training: {_format_range(domain.jpeg_qualities)})",
    }
    found = ", ".join(f"{counts[key]:,} by {text}" for key, text in reasons.items() if counts[key])
    return (
        f"{counts['any']:,} of {num_scored:,} images are unlike the detector's training images:"
        f" {found}; their scores may be unreliable"
    )


def describe_domain(domain: TrainingDomain | None) -> str:
    """Describe the training images, for a model card."""
    if domain is None:
        return "Sizes, formats and JPEG qualities of these images were not recorded."
    low, high = domain.sides
    sides = f"{low:,} or more" if high == ANY_SIDE else _format_range(domain.sides)
    return (
        f"Sides: {sides} pixels; formats: {', '.join(domain.formats)};"
        f" JPEG quality: {_format_range(domain.jpeg_qualities)}."
    )


def _format_range(bounds: Bounds | None) -> str:
    """Format as `32` or `32 to 1,024`; a dash for None."""
    return "-" if bounds is None else " to ".join(f"{bound:,}" for bound in dict.fromkeys(bounds))


def model_card(
    *,
    name: str,
    architecture: str,
    num_parameters: int,
    trained_on: str,
    domain: TrainingDomain | None,
    preprocessing: Mapping[str, object],
    training: Mapping[str, object],
    calibration: Calibration,
    metrics: Mapping[str, Any],
) -> str:
    """Return README.md of a bundle, with the YAML header of the Hugging Face Hub.

    `trained_on` describes the training images in words, `domain` in numbers; `preprocessing` and
    `training` are shown unchanged; `metrics` were measured on validation, on which `calibration`
    was fitted.
    """
    num_real = metrics["num_real"]
    points = [
        ("highest balanced accuracy", f"{calibration.threshold:.6f}", "default"),
        *(
            (f"{share} of REAL called FAKE", format_threshold(cut), _rest(num_real, one_in))
            for share, cut, one_in in (
                ("1%", calibration.threshold_fpr_1, 100),
                ("0.1%", calibration.threshold_fpr_01, 1000),
            )
        ),
    ]
    return CARD.format(
        name=_flatten(name),
        architecture=_flatten(architecture),
        num_parameters=f"{num_parameters:,}",
        trained_on=_flatten(trained_on),
        domain=describe_domain(domain),
        preprocessing=_format_facts(preprocessing),
        training=_format_facts(training),
        metrics=format_metrics(metrics),
        temperature=f"{calibration.temperature:.4f}",
        python=_describe_python(architecture, preprocessing, calibration),
        points=format_rows(("Operating point", "p_fake at least", "based on"), points),
    )


def _describe_python(
    architecture: str, preprocessing: Mapping[str, object], calibration: Calibration
) -> str:
    """Return how Python scores an image with a bundle."""
    from cifake_ray.core.models.detector import OWN_ARCHITECTURES
    from cifake_ray.core.models.small_networks import is_small

    # Names that say a width, a depth or a residual are too many to be known in advance.
    is_named = is_small(architecture) and architecture not in OWN_ARCHITECTURES
    register = f'cifake_ray.timm.register("{architecture}")' if is_named else ""
    if preprocessing.get("fit") == "crops":
        return CROPS_USAGE.format(
            num_crops=preprocessing["num_crops"],
            opens=f"After `import cifake_ray.timm` and `{register}`, timm" if register else "timm",
        )
    return TIMM_USAGE.format(
        divisor=repr(calibration.temperature),
        views="torch.stack([image, image.flip(2)])"
        if preprocessing.get("test_time_flip")
        else "image[None]",
        note="  # of the bundle's size: it crops others, timm resizes them"
        if preprocessing.get("fit") == "crop"
        else "",
        register=register and f"\n{register}",
    )


def format_threshold(threshold: float | None) -> str:
    """Format a threshold of a bundle, which may have none for a false positive rate."""
    return "cannot be reached on validation" if threshold is None else f"{threshold:.6f}"


def _rest(num_real: int, one_in: int) -> str:
    """Return the images that a threshold for one false positive in `one_in` is based on."""
    allowed = num_real // one_in
    if allowed == 0:
        return f"too few: allows no error among {num_real:,} REAL images"
    return f"the {allowed:,} highest of {num_real:,} REAL images"


def _format_facts(facts: Mapping[str, object]) -> str:
    return format_rows(("Setting", "Value"), [(name, str(facts[name])) for name in facts])


def format_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded cells."""
    table = [[_flatten(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |"
        for row in table
    )


def _flatten(text: str) -> str:
    return " ".join(text.split())  # a line break would end the table row or the heading


TIMM_USAGE = """\
timm opens BUNDLE too:

```python
import timm, torch
from PIL import Image
import cifake_ray.timm  # tells timm of cnn, small_cnn and the like{register}

network = timm.create_model("local-dir:BUNDLE", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=network))
image = transform(Image.open("IMAGE").convert("RGB")){note}
with torch.inference_mode():
    z_real, z_fake = network({views}).mean(0)
p_fake = float(torch.sigmoid((z_fake - z_real) / {divisor}))
```
"""

CROPS_USAGE = """\
It looks at
images of any size in crops of their own resolution, {num_crops} at most, and `logit` is the mean of
theirs. {opens} opens the network, which takes one crop; Python that scores an image:

```python
from cifake_ray import load_detector

with open("IMAGE", "rb") as file:
    p_fake = float(load_detector("BUNDLE").predict([file.read()])[0])
```
"""

CARD = """\
---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- ai-generated-image-detection
metrics:
- accuracy
- roc_auc
---

# {name}

Classifies images as AI-generated (FAKE) or from a camera (REAL). {architecture}, {num_parameters}
parameters, two outputs [REAL, FAKE]. `logit = z_FAKE - z_REAL`, `p_fake = sigmoid(logit /
{temperature})`, `is_fake = p_fake >= threshold`.

## How to use

    cifake-ray score DIR OUT --bundle BUNDLE

DIR holds images, BUNDLE is this folder. OUT receives one row per image, with `p_fake` and `is_fake`
or an error. `--target-fpr` selects another operating point. {python}
{preprocessing}

## Training data

{trained_on}
{domain}

{training}

## Results on validation

The temperature and thresholds were fitted on these images: test results are more reliable.

{metrics}

## Operating points

{points}

## Limits

- It has seen only its training images: {trained_on}
- Do not trust it on other generators or image sizes, or on resized, cropped or re-encoded images,
  until you have evaluated it on labelled images like yours (`cifake-ray evaluate`).
- The false positive rates hold for REAL images like those of validation; another camera, site or
  year may have others. The precision of FAKE depends on the share of FAKE among your images.
- `p_fake` measures similarity to the training data; it is not evidence about a person. Never accuse
  anybody on a score alone.
"""
