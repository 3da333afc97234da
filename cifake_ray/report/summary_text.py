"""Say the result of a command in sentences, for a person at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cifake_ray.report.audit_text import describe_verdicts
from cifake_ray.report.compare_table import describe_comparison
from cifake_ray.report.grid import describe_grid
from cifake_ray.report.numbers import format_interval, format_share
from cifake_ray.report.slices_text import describe_floor, describe_matrix, describe_worst

Record = Mapping[str, Any]
# Names of BundleInfo.list_thresholds.
TARGETS = {
    "default": "the default",
    "fpr_0.01": "--target-fpr 0.01",
    "fpr_0.001": "--target-fpr 0.001",
}
RESULTS = {
    "audit": "audit",
    "convert": "shards",
    "score": "scores",
    "evaluate": "predictions",
}
DONE = {"audit": "audited", "convert": "converted"}  # and else: scored
MATRIX = "train --leave-one-source-out"
# Unless it is a dry run.
MADE = {"train": "bundle", "tune": "bundle", MATRIX: "report", "pipeline": "report"}
UNTOLD = {"unusable", "untracked"}  # not said by any sentence
# What the sentences on a batch say; `unlike_training` is a warning of its own.
BATCH_FIELDS = {
    "command",
    "out",
    "listed",
    "done",
    "failed",
    "errors",
    "unlike_training",
    "left_out",
    "shards_total",
    "shards_resumed",
    "shards_retried",
    "elapsed_s",
    "images_per_s",
    "steady_images_per_s",
    "ran_on",
    "precision",
    "threshold",
    "policy",
    "thresholds",
    "called_fake",
    "provenance",
    "metrics",
    "verdicts",
    "report",
}


def split_summary(record: Record) -> tuple[list[str], dict[str, Any]]:
    """Return sentences on a result, and its other fields that are not empty."""
    command = str(record.get("command"))
    sentences, said = list[str](), set[str]()
    if command in RESULTS and "done" in record:
        sentences, said = _describe_batch(command, record), BATCH_FIELDS
    elif command in DESCRIBE and MADE.get(command, "command") in record:
        sentences, said = DESCRIBE[command](record), set(record) - UNTOLD
    empty: tuple[object, ...] = (None, {}, [], ())
    return sentences, {n: v for n, v in record.items() if n not in said and v not in empty}


def _describe_batch(command: str, record: Record) -> list[str]:
    done, out = record["done"], record["out"].rstrip("/")
    sentences = []
    if command == "evaluate":
        sentences += _describe_metrics(record.get("metrics") or {})
    elif command == "audit":
        sentences += describe_verdicts(record.get("verdicts") or [])
    elif record.get("called_fake") and done:
        sentences.append(_describe_verdicts(record))
    if record.get("provenance"):
        sentences += _describe_provenance(record["provenance"], done)
    verb = DONE.get(command, "scored")
    errors = ", ".join(f"{count:,} {error}" for error, count in record["errors"].items())
    failed = f"{record['failed']:,} unreadable: {errors}" if record["failed"] else "none unreadable"
    sentences.append(f"{done:,} of {record['listed']:,} images {verb}; {failed}.")
    if left_out := {reason: n for reason, n in record["left_out"].items() if n}:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
        if command == "evaluate":  # it leaves out nothing else
            reasons = f"{sum(left_out.values()):,} images of other splits or without a label"
        sentences.append(f"Left out: {reasons}.")
    sentences.append(
        f"Rows in {out}/{RESULTS[command]}, {_count(record['shards_total'], 'shard')}."
    )
    sentences.append(_describe_speed(record))
    if record.get("report"):
        sentences.append(f"Report: {record['report']}")
    return sentences


def _describe_verdicts(record: Record) -> str:
    called, thresholds = record["called_fake"], record["thresholds"]
    shares = {name: format_share(called.get(name, 0) / record["done"]) for name in thresholds}
    chosen = record.get("policy") or next(
        (name for name, value in thresholds.items() if value == record["threshold"]), "default"
    )
    others = "".join(
        f"; {share} with {TARGETS.get(name, name)} (p_fake >= {thresholds[name]:.3g})"
        for name, share in shares.items()
        if name != chosen
    )
    if record.get("policy"):
        by_policy = format_share(called.get("policy", 0) / record["done"])
        return f"Called FAKE: {by_policy} by {record['policy']}{others}."
    return f"Called FAKE: {shares[chosen]} (p_fake >= {record['threshold']:.3g}){others}."


def _describe_provenance(counts: Record, done: int) -> list[str]:
    claims = {"c2pa": "C2PA", "digital_source_type": "a digital source type"}
    claims |= {"generator": "a generator", "tc260_label": "a TC260 label"}
    kinds = ", ".join(f"{counts[key]:,} {name}" for key, name in claims.items() if counts[key])
    unread = f"; {counts['unread']:,} not read whole" if counts["unread"] else ""
    if not counts["any"]:
        return [f"Provenance: none of {done:,} images carries any{unread}, which says nothing."]
    return [
        f"Provenance: {counts['any']:,} of {done:,} images carry some ({kinds}){unread}.",
        f"{counts['ai']:,} claim to be made or edited by AI; of these {counts['ai_called_real']:,}"
        " are not called FAKE.",
    ]


def _describe_metrics(metrics: Record) -> list[str]:
    if not metrics:
        return []
    values = [f"Accuracy {format_interval(metrics['accuracy'], percent=True)} at 0.5"]
    missing = []
    for name, text, percent in (
        ("auroc", "AUROC", False),
        ("tpr_at_fpr_1pct", "FAKE found at 1% false positives", True),
    ):
        found = format_interval(metrics[name], percent=percent)
        if "reason" in metrics[name]:
            missing.append(f"{text}: no number, {found}.")
        else:
            values.append(f"{text} {found}")
    return [
        f"{', '.join(values)}, on {metrics['num_real']:,} REAL and {metrics['num_fake']:,} FAKE"
        " images (95% intervals).",
        *missing,
        *filter(None, [describe_worst(metrics.get("worst_source"))]),
        *filter(None, [describe_floor(metrics.get("real_vs_real"))]),
        *describe_grid(metrics.get("grid")),
    ]


def _describe_speed(record: Record) -> str:
    before = ""
    if record["shards_resumed"]:
        before = f"; {_count(record['shards_resumed'], 'shard')} had been done before"
    if record["shards_retried"]:
        before += f"; {_count(record['shards_retried'], 'shard')} started again after a crash"
    on = f" with {record['ran_on']}" if record.get("ran_on") else ""
    on += f" in {record['precision']}" if record.get("precision") else ""
    if not record["images_per_s"]:
        return f"{record['elapsed_s']:,.1f} s{on}{before}."
    return (
        f"{record['elapsed_s']:,.1f} s{on}, {record['images_per_s']:,.0f} images/s"
        f" ({record['steady_images_per_s']:,.0f} once started){before}."
    )


def _describe_decisions(record: Record) -> list[str]:
    from cifake_ray.report.decide_text import describe_decisions  # with scipy

    return describe_decisions(record)


def _describe_check(record: Record) -> list[str]:
    files, rows, damaged = record["files"], record["rows"], record["damaged"]
    checked = f"{_count(files, 'file')}, {_count(rows, 'row')} checked"
    if not damaged:
        nothing = "nothing to repair: " if record["command"] == "repair" else ""
        return [f"{nothing}{checked}, all as they were committed."]
    lost = [name for name in damaged if name.split("/")[0] in ("_manifest", "manifest")]
    remedy = (
        "the manifest cannot be repaired: start again in a new folder"
        if lost
        else f"run `cifake-ray repair {record['out']}`"
    )
    return [
        f"{checked}, {len(damaged):,} damaged: {remedy}.",
        *(f"{name}: {reason}" for name, reason in damaged.items()),
    ]


def _describe_pipeline(record: Record) -> list[str]:
    accuracy, auroc = format_share(record["accuracy"]), record["auroc"]
    sentences = [
        f"Of {record['test_images']:,} test images {accuracy} are classified correctly at 0.5"
        + ("." if auroc is None else f", AUROC {auroc:.3f}."),
        f"Report: {record['report']}",
        f"Scores: {record['scores']}",
        f"Detector: {record['bundle']}",
    ]
    if record["command"] == "demo":
        sentences += [
            "The sample is made up, and its detector knows nothing else. Next:",
            "cifake-ray score PHOTOS OUT (your images, a built-in detector)",
            "cifake-ray pipeline LABELLED ROOT (your own detector, from folders REAL and FAKE)",
        ]
    return sentences


def _describe_training(record: Record) -> list[str]:
    epochs = ", ".join(map(str, record["averaged_epochs"]))
    kept = f"the mean of epochs {epochs}" if "," in epochs else f"epoch {epochs}"
    sentences = [
        f"Accuracy {format_share(record['val_accuracy'])} on {record['val_images']:,} validation"
        f" images at 0.5, by {kept} ({record['stopped']}).",
    ]
    if record.get("threshold") is not None:
        rates = (("threshold_fpr_1", "fpr_0.01"), ("threshold_fpr_01", "fpr_0.001"))
        others = "".join(
            f"; >= {record[name]:.3g} with {TARGETS[target]}"
            for name, target in rates
            if record.get(name) is not None
        )
        sentences.append(f"FAKE is p_fake >= {record['threshold']:.3g}{others}.")
    return [
        *sentences,
        f"{record['elapsed_s']:,.1f} s; {_count(record['epochs'], 'epoch')} in"
        f" {record['train_s']:,.1f} s, {record['images_per_s']:,.0f} images/s.",
        *_describe_next(record),
    ]


def _describe_search(record: Record) -> list[str]:
    low, high = record["best_interval"] or (None, None)
    best = format_interval({"value": record["best"], "low": low, "high": high})
    recipe = (
        "" if record["baseline"] is None else f"; the recipe as it is: {record['baseline']:.3f}"
    )
    from cifake_ray.core.search.trial_table import format_value  # with all that a search needs

    chosen = ", ".join(f"{name} {format_value(value)}" for name, value in record["chosen"].items())
    ends = ", ".join(f"{count:,} {end}" for end, count in record["ends"].items())
    return [
        f"Best of {_count(record['trials'], 'trial')}: {record['best_trial']}, with"
        f" {record['objective']} {best}{recipe}.",
        f"It has {chosen}.",
        f"Trials ended: {ends}.",
        f"{record['elapsed_s']:,.1f} s; {record['epochs']:,} of {record['epochs_planned']:,} epochs"
        " trained.",
        f"Report: {record['report']}",
        f"Recipe: {record['recipe']}",
        *_describe_next(record),
    ]


def _describe_export(record: Record) -> list[str]:
    if "rows" in record:
        rows = _count(record["rows"], "row")
        rows += f" in {_count(record['files'], 'file')}" if "files" in record else ""
        return [f"{rows} written to {record['out']}{describe_counts(record['left_out'])}."]
    size, crops = record["image_size"], record["num_crops"]
    pooling = [f"An image's logit is the mean of those of its crops, {crops} at most."]
    return [
        f"Detector {record['architecture']} written to {record['out']}:"
        f" {'crops' if crops else 'images'} uint8[N, {size}, {size}, 3] to logit and p_fake,"
        " float32[N].",
        *(pooling if crops else []),
        f"ONNX Runtime agrees with the bundle on {record['images']:,} made-up images: logit within"
        f" {record['largest_logit_difference']:.2g}, p_fake within"
        f" {record['largest_p_fake_difference']:.2g},"
        f" {_count(record['verdicts_changed'], 'verdict')} changed.",
        f"Bundle: sha256 {record['bundle_sha256']}",
    ]


def _describe_review(record: Record) -> list[str]:
    scored = record["scored"]
    share = f"{record['called_fake'] / scored:.1%}" if scored else "-"
    missing = f"; {record['not_shown']:,} could not be shown" if record["not_shown"] else ""
    return [
        f"Called FAKE: {share} of {_count(scored, 'scored image')}.",
        f"{_count(record['shown'], 'image')} on the page{missing}.",
        f"Page: {record['out']}",
    ]


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return what follows a number of rows, such as `; 2 without a file`."""
    return "".join(f"; {count:,} {what}" for what, count in counts.items() if count)


def _describe_next(record: Record) -> list[str]:
    return [
        f"Detector: {record['bundle']}",
        f"Next: cifake-ray evaluate SHARDS --bundle {record['out']} --out REPORT",
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


DESCRIBE: dict[str, Callable[[Record], list[str]]] = {
    "train": _describe_training,
    "tune": _describe_search,
    "decide": _describe_decisions,
    "verify": _describe_check,
    "repair": _describe_check,
    "pipeline": _describe_pipeline,
    "demo": _describe_pipeline,
    "export": _describe_export,
    MATRIX: describe_matrix,
    "compare": describe_comparison,
    "review": _describe_review,
    "sample": lambda record: [f"{_count(record['images'], 'image')} written to {record['out']}."],
}
