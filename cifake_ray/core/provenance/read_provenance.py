"""Say what an image's metadata claims of its origin: the columns of `score --provenance`.

These are claims. Anybody can write or remove them, so their absence means nothing, and no score
and no verdict uses them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cifake_ray.core.imaging.tiff_pages import TiffPage
from cifake_ray.core.provenance.c2pa import C2paFacts, list_source_types, verify_c2pa
from cifake_ray.core.provenance.generator import find_generator, read_tc260, shorten
from cifake_ray.core.provenance.metadata import (
    FREE_TEXT_KEYS,
    MAX_TEXT_BYTES,
    PROGRAM_KEYS,
    SETTINGS_KEYS,
    TC260_KEY,
    Metadata,
    find_metadata,
    open_directory,
)
from cifake_ray.core.provenance.xmp import read_xmp

# Source: cv.iptc.org/newscodes/digitalsourcetype. `algorithmicMedia` is procedural, not AI.
_IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
AI_SOURCE_TYPES = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")
_DESCRIPTION, _SOFTWARE, _EXIF_DIRECTORY, _USER_COMMENT = 270, 305, 34665, 37510


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The claims of one image; fields are those of `PROVENANCE_FIELDS`, where they are defined."""

    c2pa_present: bool | None
    c2pa_binding: str | None
    c2pa_trust: str | None
    c2pa_issuer: str | None
    digital_source_type: str | None
    generator: str | None
    tc260_label: str | None
    provenance_unread: str | None


def read_provenance(data: bytes, image_format: str, *, verifies: bool) -> Provenance:
    """Read the claims of an image that was decoded. Never raises.

    With `verifies` encypher-c2pa is asked about binding, trust and issuer.
    """
    found = find_metadata(data)
    comment, description, software = _read_exif(found)
    xmp: dict[str, str] = {}
    if found.xmp:
        xmp, is_xml = read_xmp(found.xmp)
        if not is_xml:
            found.unread.add("xmp")
    facts = C2paFacts() if found.c2pa else None
    if found.c2pa and verifies and (facts := verify_c2pa(data, image_format)) is None:
        facts = C2paFacts(trust="unknown")
        found.unread.add("c2pa")
    label, producer = read_tc260([xmp.get("tc260", ""), found.texts.get(TC260_KEY, ""), comment])
    texts = [found.texts.get(key, "") for key in (*SETTINGS_KEYS, *FREE_TEXT_KEYS)]
    programs = [found.texts.get(key, "") for key in PROGRAM_KEYS]
    generator = find_generator(
        [*texts, comment, description],
        [*programs, software, xmp.get("creator_tool", "")],
        [producer or ""],
    )
    return Provenance(
        c2pa_present=None if found.c2pa is None else bool(found.c2pa),
        c2pa_binding=facts and facts.binding,
        c2pa_trust=facts and facts.trust,
        c2pa_issuer=facts and facts.issuer,
        digital_source_type=_choose_source_type(
            [xmp.get("digital_source_type", ""), *list_source_types(found.c2pa or b"")]
        ),
        generator=generator,
        tc260_label=label,
        provenance_unread=", ".join(sorted(found.unread)) or None,
    )


def _choose_source_type(values: list[str]) -> str | None:
    """Return the first that names AI, else the first, without the address of IPTC's list."""
    terms = [shorten(value.replace("https:", "http:").removeprefix(_IPTC)) for value in values]
    terms = [term for term in terms if term]
    return next((term for term in terms if term in AI_SOURCE_TYPES), terms[0] if terms else None)


def _read_exif(found: Metadata) -> tuple[str, str, str]:
    """Return UserComment, ImageDescription and Software."""
    if not found.exif:
        return "", "", ""
    try:
        page = open_directory(found.exif)
        values = [page.get_bytes(tag)[:MAX_TEXT_BYTES] for tag in (_DESCRIPTION, _SOFTWARE)]
        offset = page.read_one(_EXIF_DIRECTORY, 0)
        comment = TiffPage(found.exif, offset).get_bytes(_USER_COMMENT) if offset else b""
    except (struct.error, OverflowError):
        found.unread.add("exif")
        return "", "", ""
    description, software = (value.decode("utf-8", "replace").strip("\0 ") for value in values)
    return _decode_comment(comment[:MAX_TEXT_BYTES]), description, software


def _decode_comment(comment: bytes) -> str:
    """Decode a UserComment, whose first 8 bytes name its alphabet; the byte order is not told."""
    code, text = comment[:8], comment[8:]
    if not code.startswith(b"UNICODE"):
        return (text if code[:5] in (b"ASCII", b"JIS\0\0", b"\0\0\0\0\0") else comment).decode(
            "utf-8", "replace"
        )
    is_little = text[1::2].count(0) > text[::2].count(0)
    return text.decode("utf-16-le" if is_little else "utf-16-be", "replace")


def count_provenance(rows: pa.Table) -> dict[str, int]:
    """Count the scored images that carry each claim; {} of a table without these columns.

    `any` counts each image once; `ai` those that claim to be generated or edited by AI, of which
    `ai_called_real` have `is_fake` false; `unread` those of which something could not be read.
    """
    if "c2pa_present" not in rows.schema.names:
        return {}
    given = {
        "c2pa": rows.column("c2pa_present").fill_null(False),
        **{
            name: pc.is_valid(rows.column(name))
            for name in ("digital_source_type", "generator", "tc260_label")
        },
    }
    is_any = is_ai = pc.is_in(
        rows.column("digital_source_type"), value_set=pa.array(AI_SOURCE_TYPES)
    )
    for name in ("generator", "tc260_label"):
        is_ai = pc.or_(is_ai, given[name])
    for column in given.values():
        is_any = pc.or_(is_any, column)
    is_real = pc.invert(rows.column("is_fake")).fill_null(False)
    counted = {
        "any": is_any,
        **given,
        "ai": is_ai,
        "ai_called_real": pc.and_(is_ai, is_real),
        "unread": pc.is_valid(rows.column("provenance_unread")),
    }
    return {name: pc.sum(column).as_py() or 0 for name, column in counted.items()}


def list_columns(read: list[Provenance | None]) -> dict[str, list[Any]]:
    """Return the columns of PROVENANCE_FIELDS; nulls for images that could not be read."""
    return {f.name: [p and getattr(p, f.name) for p in read] for f in fields(Provenance)}
