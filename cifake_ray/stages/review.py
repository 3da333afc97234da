"""review: the scores of a run -> one page that shows what to look at.

Scores are read once, shard by shard; then the images of the rows that were chosen are read from the
source, which may have changed or gone: what cannot be shown is said in its place.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from shlex import quote
from typing import Any

import pyarrow as pa

from cifake_ray.config import ReviewConfig
from cifake_ray.core.evaluation.score_summary import ScoreSummary, ShownRow
from cifake_ray.core.imaging.decode import inspect_image
from cifake_ray.core.imaging.thumbnail import make_thumbnail
from cifake_ray.core.imaging.training_domain import TrainingDomain
from cifake_ray.core.schema import SCORE_FIELDS, THUMBNAIL_FIELD
from cifake_ray.errors import CifakeError, ImageError, StorageError
from cifake_ray.report.review_page import Group, Picture, choose_groups, render_review
from cifake_ray.report.text import describe_unlike
from cifake_ray.storage.bundles.built_ins import locate_bundle
from cifake_ray.storage.bundles.bundle import BundleInfo, read_bundle_info
from cifake_ray.storage.io.files import exists, read_json
from cifake_ray.storage.io.paths import AnyPath, link_path
from cifake_ray.storage.runs.export import refuse_existing, write_export
from cifake_ray.storage.runs.read_scores import Scores, find_threshold, open_scores
from cifake_ray.storage.runs.run import require_run
from cifake_ray.storage.runs.settings import describe_detector, name_detector
from cifake_ray.storage.runs.shards import read_shard

MIN_GROUPS = 5  # that share the images of a page; where there are more, each gets fewer
MAX_READ_S = 60.0  # for all images: a store may answer slowly, or not at all
MAX_IMAGE_BYTES = 24 * 2**10  # of a thumbnail
MAX_PAGE_IMAGE_BYTES = 4 * 2**20  # of all: a page grows by a third more, in base64
QUEUE = "cifake-ray export {} tasks.json --format label-studio --sort margin --top 50 --by source"
DECISION_FIELDS = [
    pa.field("key", pa.string()),
    pa.field("verdict", pa.string()),
    pa.field("decided_by", pa.string()),
    pa.field("threshold", pa.float32()),
]


def review_scores(
    config: ReviewConfig,
    folder: AnyPath,
    file: AnyPath,
    decisions: AnyPath | None,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Write the page; return what the command prints. UsageError when the file exists."""
    refuse_existing(file, overwrite=config.overwrite)
    require_run(folder, "score")
    scores = open_scores(folder)
    bundle = _find_bundle(scores, config, log)
    domain = bundle.domain if bundle else None
    summary = summarise_scores(scores, domain, decisions, -(-config.images // MIN_GROUPS))
    groups = choose_groups(summary, config.images)
    pictures = read_pictures(scores, groups, config, log)
    finished = read_json(folder / "_SUCCESS")
    page = render_review(
        title=f"Review of {folder.name or folder}",
        context=_describe_context(scores, finished, summary, decisions),
        queue=QUEUE.format(quote(str(folder))),
        facts=_list_facts(scores, finished, bundle, decisions),
        summary=summary,
        groups=groups,
        pictures=pictures,
        notes=_list_notes(summary, bundle),
        has_decisions=decisions is not None,
    )
    write_export(file, [page.encode()], overwrite=config.overwrite)
    return {
        "command": "review",
        "out": link_path(file),
        "images": summary.images,
        "scored": summary.scored,
        "called_fake": summary.called_fake,
        "shown": sum(picture.data is not None for picture in pictures.values()),
        "not_shown": sum(picture.data is None for picture in pictures.values()),
    }


def _describe_context(
    scores: Scores, finished: dict[str, Any], summary: ScoreSummary, decisions: AnyPath | None
) -> dict[str, str]:
    """Return what was scored, with what and when, by name."""
    run = scores.require_run()
    low, high = summary.thresholds
    rule = f"p_fake >= {low:.4g}" if low == high else "by several thresholds"
    if decisions is not None or run.settings.get("policy"):
        rule += f", {decisions or run.settings['policy']}"
    return {
        "Images": scores.find_root(),
        "Detector": describe_detector(run.settings, run.config),
        "Finished": str(finished.get("finished_at", "-")),
        "FAKE is": rule,
    }


def _list_facts(
    scores: Scores, finished: dict[str, Any], bundle: BundleInfo | None, decisions: AnyPath | None
) -> dict[str, str]:
    """Return what was scored with what, by name."""
    run = scores.require_run()
    policy = run.settings.get("policy")
    facts = {
        "Scores": scores.folder,
        "Source": scores.find_root(),
        "Finished": finished.get("finished_at"),
        "Detector": name_detector(run.config),
        "Architecture": bundle.architecture if bundle else None,
        "Bundle sha256": run.settings.get("bundle"),
        "Precision": run.settings.get("precision", "float32"),
        "Policy": policy,
        "Threshold": finished.get("threshold"),
        "Run": run.identity,
        "Listed": f"{run.manifest.num_rows:,}",
        "Decisions": decisions,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _list_notes(summary: ScoreSummary, bundle: BundleInfo | None) -> list[str]:
    """Return the warnings on the whole of the scores."""
    if bundle is None or bundle.domain is None:
        return ["Whether these images are like the detector's training images is not known."]
    if not summary.unlike:
        return []
    return [f"{describe_unlike(dict(summary.unlike), summary.scored, bundle.domain)}."]


def _find_bundle(
    scores: Scores, config: ReviewConfig, log: Callable[[str], None]
) -> BundleInfo | None:
    """Return the bundle that has scored, None when it is gone or another has its place."""
    run = scores.require_run()
    try:
        place = locate_bundle(run.config.get("bundle"), config.store)
        bundle = read_bundle_info(
            place, allow_pickle=config.allow_pickle, fake_class=run.config.get("fake_class")
        )
    except CifakeError as error:
        log(f"review: which images are unlike the training images is not known: {error}")
        return None
    if bundle.identify(str(run.settings.get("precision"))) != run.settings.get("bundle"):
        log(f"review: {place} is another detector now than the one that scored")
        return None
    return bundle


def summarise_scores(
    scores: Scores, domain: TrainingDomain | None, decisions: AnyPath | None, per_group: int
) -> ScoreSummary:
    """Read the scores once. StorageError for a damaged shard, or decisions on other scores."""

    summary = ScoreSummary(per_group, domain.find_unlike if domain else None)
    for number, (path, rows) in enumerate(scores.read_shards(SCORE_FIELDS)):
        decided = None
        if decisions is not None:
            place = decisions / "decisions" / path.name
            decided = read_shard(place, DECISION_FIELDS) if exists(place) else None
            if decided is None or not decided.column("key").equals(rows.column("key")):
                raise StorageError(
                    f"{decisions}: no decisions on these scores;"
                    f" `cifake-ray decide {quote(str(scores.folder))} DIR` makes them"
                )
        threshold = find_threshold(rows)
        summary.add(number, rows, 0.5 if threshold is None else threshold, decided)
    return summary


def read_pictures(
    scores: Scores, groups: Sequence[Group], config: ReviewConfig, log: Callable[[str], None]
) -> dict[tuple[int, int], Picture]:
    """Return a thumbnail of each row of the groups, or why there is none, by shard and position."""
    wanted: dict[int, dict[int, ShownRow]] = defaultdict(dict)
    for group in groups:
        for shown in group.rows:
            wanted[shown.shard][shown.position] = shown
    count = sum(len(group.rows) for group in groups)
    limit = min(MAX_IMAGE_BYTES, MAX_PAGE_IMAGE_BYTES // max(count, 1))
    pictures, reason = {}, f"not read: more than {MAX_READ_S:.0f} s in all"
    is_stored = bool(scores.require_run().settings.get("thumbnails"))
    try:
        if is_stored:
            images = _read_thumbnails(scores, wanted)
        else:
            images = _read_images(scores, wanted, config)
        for place, data in images:
            pictures[place] = make_picture(data, limit, is_stored=is_stored)
    except CifakeError as error:
        reason = str(error)
        log(f"review: images are missing on the page: {error}")
    places = ((shard, position) for shard, rows in wanted.items() for position in rows)
    return {place: pictures.get(place) or Picture(None, reason) for place in places}


def _read_images(
    scores: Scores, wanted: dict[int, dict[int, ShownRow]], config: ReviewConfig
) -> Iterator[tuple[tuple[int, int], bytes | ImageError]]:
    """Yield images of the source, in order; end when MAX_READ_S have passed."""
    started_s = time.monotonic()
    source = scores.open_source(config.store, config.allow_prefix)
    for shard, shown in sorted(wanted.items()):
        positions = sorted(shown)
        listing = scores.read_listing(shard).take(positions)
        if listing.column("key").to_pylist() != [shown[n].row["key"] for n in positions]:
            raise StorageError(f"{scores.folder}: the manifest has other keys than the scores")
        for position, data in zip(positions, source.read_images(listing), strict=True):
            yield (shard, position), data
            if time.monotonic() - started_s > MAX_READ_S:
                return


def _read_thumbnails(
    scores: Scores, wanted: Mapping[int, Mapping[int, ShownRow]]
) -> Iterator[tuple[tuple[int, int], bytes | ImageError]]:
    """Yield what `score --thumbnails` has stored."""
    for shard, shown in sorted(wanted.items()):
        rows = read_shard(scores.paths[shard], [THUMBNAIL_FIELD]).take(sorted(shown))
        for position, data in zip(sorted(shown), rows[THUMBNAIL_FIELD.name], strict=True):
            yield (shard, position), data.as_py() or ImageError("empty", "no thumbnail")


def make_picture(data: bytes | ImageError, max_bytes: int, *, is_stored: bool = False) -> Picture:
    """Return a picture of at most so many bytes, or why there is none.

    A thumbnail that `is_stored` is taken as it is, if it is small enough.
    """
    if isinstance(data, ImageError):
        return Picture(None, str(data.error))
    try:
        if is_stored and len(data) <= max_bytes:
            header = inspect_image(data)
            if header.format == "WEBP":
                return Picture(data, "", max(header.width, header.height))
        webp, size = make_thumbnail(data, max_bytes)
    except ImageError as error:
        return Picture(None, error.error)
    return Picture(webp, "", size)
