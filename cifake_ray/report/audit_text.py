"""Say what an audit found, one verdict a line, each with the commands that help."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cifake_ray.config import AuditConfig, BatchConfig, ConvertConfig, SourceConfig, list_options
from cifake_ray.config.fields import StoreConfig
from cifake_ray.report.numbers import format_share

LEAK, NOTE, CLEAN = "LEAK", "NOTE", "CLEAN"
QUALITY = "jpeg:90"
MAX_ALONE = 0.1  # of the images may have a type that the other class lacks
SIDES = (32, 64, 96, 128, 224, 256, 384, 512, 768, 1024)  # pixels, to scale images to
COPIES = {
    "bytes_group": ("bytes", "the same bytes"),
    "pixels_group": ("pixels", "the same pixels"),
    "near_group": ("near", "nearly the same pixels"),
}
# Of each group of features, what `convert --match` mends it by; all are mended by `--reencode`.
MATCHED_BY: dict[str, str] = {
    "format": "quality",
    "size": "size",
    **dict.fromkeys(("mode", "JPEG quality", "quantisation", "subsampling"), "quality"),
    "metadata": "",
}


@dataclass(frozen=True)
class Verdict:
    """One thing that an audit says."""

    name: str
    level: str  # LEAK, NOTE or CLEAN
    text: str
    remedies: list[str]  # commands, of which one is enough


def judge_audit(findings: Mapping[str, Any], config: AuditConfig) -> list[dict[str, Any]]:
    """Return the verdicts on the findings of `write_audit`, those that matter first."""
    verdicts = [
        *_judge_leaks(findings, config),
        *_judge_copies(findings, config),
        *_judge_balance(findings, config),
        *_judge_columns(findings["balance"]),
    ]
    levels = (LEAK, NOTE, CLEAN)
    return [asdict(v) for v in sorted(verdicts, key=lambda v: levels.index(v.level))]


def describe_verdicts(verdicts: list[dict[str, Any]]) -> list[str]:
    """Return sentences for a terminal, with the commands below the first one that they mend."""
    sentences, shown = [], set[str]()
    for verdict in verdicts:
        if verdict["level"] != CLEAN:
            sentences.append(f"{verdict['level']} {verdict['text']}")
            sentences += [f"  {command}" for command in verdict["remedies"] if command not in shown]
            shown |= set(verdict["remedies"])
    clean = [verdict["text"] for verdict in verdicts if verdict["level"] == CLEAN]
    return [*sentences, f"CLEAN {'; '.join(clean)}."] if clean else sentences


def describe_null(findings: Mapping[str, Any]) -> str:
    """Return in one sentence what the files and their duplicates give away."""
    leaks, copies = findings["leaks"], findings["duplicates"]["near_group"]
    if not leaks:
        found = "There are too few labelled images of both classes to look for leaks"
    elif leaks["header"]["is_leak"] or leaks["zero-pixel null"]["is_leak"]:
        null = _format_auroc(leaks["zero-pixel null"])
        found = f"Without one pixel, files of REAL and FAKE are told apart with {null}"
    else:
        found = "Without one pixel, files of REAL and FAKE cannot be told apart"
    if not copies["pairs"]:
        return f"{found}; there are no duplicates."
    across = copies["pairs_across_splits"]
    return f"{found}; pairs of duplicates: {copies['pairs']:,}, {across:,} across splits."


def _judge_leaks(findings: Mapping[str, Any], config: AuditConfig) -> list[Verdict]:
    leaks, matched = findings["leaks"], findings["matched"]
    if not leaks:
        text = "Too few labelled images of both classes to look for leaks."
        return [Verdict("leaks", NOTE, text, [])]
    verdicts = []
    for name, trait in MATCHED_BY.items():
        text = f"{name} {_format_auroc(leaks[name])}"
        if not leaks[name]["is_leak"]:
            verdicts.append(Verdict(name, CLEAN, text, []))
            continue
        remedies = [_reencode(findings, config, name == "size")]
        if trait and matched[trait]:
            kept = f"{matched[trait]:,} of {findings['images']:,} images stay"
            remedies.append(f"{_convert(config, match=(trait,))}  # {kept}")
        typical = findings["typical"][name]
        text = f"{text}: REAL is most often {typical['REAL']}, FAKE {typical['FAKE']}."
        verdicts.append(Verdict(name, LEAK, text, remedies))
    return [*verdicts, *_judge_combined(findings, config)]


def _judge_combined(findings: Mapping[str, Any], config: AuditConfig) -> list[Verdict]:
    leaks = findings["leaks"]
    null, header, size = leaks["zero-pixel null"], leaks["header"], leaks["bytes"]
    text = f"zero-pixel null {_format_auroc(null)}"
    if header["is_leak"]:
        found = Verdict(
            "zero-pixel null",
            LEAK,
            f"{text}: so much follows from the files without one pixel; no score on these images"
            " means more than what goes beyond it.",
            [_reencode(findings, config, leaks["size"]["is_leak"])],
        )
    elif size["is_leak"]:
        found = Verdict(
            "zero-pixel null",
            NOTE,
            f"Sizes in bytes differ, {_format_auroc(size)}, in files whose headers are alike: they"
            " follow from the pixels, or from how hard an encoder worked.",
            [],
        )
    else:
        found = Verdict("zero-pixel null", CLEAN, text, [])
    name, pixels, linear = (
        leaks[group] for group in ("name", "pixel statistics", "pixel statistics, linear")
    )
    named = Verdict("name", CLEAN, f"name {_format_auroc(name)}", [])
    if name["is_leak"]:
        text = (
            f"File names tell the classes apart, {_format_auroc(name)}: no verb here reads them;"
            " keep them from classifiers of your own."
        )
        named = Verdict("name", LEAK, text, [])
    text = (
        f"Ten trivial pixel statistics reach {format_share(linear['accuracy'])} by logistic"
        f" regression ({_format_auroc(linear)}) and {format_share(pixels['accuracy'])} by trees"
        f" ({_format_auroc(pixels)}): the floor for a detector, not 50%."
    )
    return [found, named, Verdict("pixel statistics", NOTE, text, [])]


def _judge_copies(findings: Mapping[str, Any], config: AuditConfig) -> list[Verdict]:
    verdicts, said = [], 0
    for column, (word, what) in COPIES.items():
        counts = findings["duplicates"][column]
        name = f"{word} duplicates"
        if counts["images"] == said:  # no more than by the stricter comparison
            if not said:
                verdicts.append(Verdict(name, CLEAN, f"no two images with {what}", []))
            continue
        said = counts["images"]
        across, between = counts["pairs_across_splits"], counts["pairs_across_classes"]
        text = (
            f"{said:,} images have a copy with {what}; pairs: {counts['pairs']:,}, across splits"
            f" {across:,}, with different labels {between:,}."
        )
        level = LEAK if across or between else NOTE
        verdicts.append(Verdict(name, level, text, [_convert(config, dedupe=word)]))
    return verdicts


def _judge_balance(findings: Mapping[str, Any], config: AuditConfig) -> list[Verdict]:
    real, fake = findings["classes"]["REAL"], findings["classes"]["FAKE"]
    if not real or not fake:
        return []
    if max(real, fake) <= 1.5 * min(real, fake):
        return [Verdict("balance", CLEAN, f"balance ({real:,} REAL, {fake:,} FAKE)", [])]
    text = f"{real:,} REAL and {fake:,} FAKE: accuracy at 0.5 depends on it, AUROC does not."
    remedies = [_convert(config, match=("size",))] if findings["matched"]["size"] else []
    return [Verdict("balance", NOTE, text, remedies)]


def _judge_columns(balance: Mapping[str, Any]) -> list[Verdict]:
    """Return notes on sources and on columns of types that the classes do not share."""
    notes = []
    for name in ("REAL", "FAKE"):
        sources = [row["value"] for row in balance.get("source", []) if row[name]]
        if len(sources) == 1:
            text = f"All {name} come from one source: a detector may learn that source instead."
            notes.append(Verdict(f"sources of {name}", NOTE, text, []))
    for column, rows in balance.items():
        if column in ("label", "source", "format", "mode", "subsampling"):
            continue
        alone = sum(row["REAL"] + row["FAKE"] for row in rows if not row["REAL"] * row["FAKE"])
        share = alone / max(sum(row["REAL"] + row["FAKE"] for row in rows), 1)
        if share > MAX_ALONE:
            text = (
                f"{column}: {format_share(share)} of images have a value that one class alone has."
            )
            notes.append(Verdict(column, NOTE, text, []))
    return notes


def choose_side(median_side: float) -> int:
    """Return the largest of SIDES that is not above the median shorter side."""
    return max((side for side in SIDES if side <= median_side), default=SIDES[0])


def _format_auroc(leak: Mapping[str, Any]) -> str:
    if leak["constant"] is not None:
        return f"AUROC 0.500 ({leak['constant']} throughout)"
    return f"AUROC {leak['auroc']:.3f} [{leak['low']:.3f}, {leak['high']:.3f}]"


def _reencode(findings: Mapping[str, Any], config: AuditConfig, resizes: bool) -> str:
    size = {"reencode_size": choose_side(findings["median_side"])} if resizes else {}
    return _convert(config, reencode=QUALITY, **size)


def _convert(config: AuditConfig, **options: Any) -> str:
    """Return the command that converts the same source with these options."""
    own = {field.name for field in fields(SourceConfig)} - {f.name for f in fields(BatchConfig)}
    own |= {field.name for field in fields(StoreConfig)}
    same = {name: getattr(config, name) for name in own - {"out"}}
    if "reencode" not in options:
        options["audit"] = config.out
    words = list_options(ConvertConfig(out="CLEAN", **same, **options))
    return shlex.join(["cifake-ray", "convert", *words])
