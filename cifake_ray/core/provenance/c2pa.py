"""Read a C2PA manifest store: whether there is one, its source types, and what its signature says.

Presence and source types are read here. Binding, trust and issuer need cryptography and come from
the optional package encypher-c2pa, which is asked for facts, never for a verdict: it calls genuine
files of OpenAI and Adobe invalid or untrusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from cifake_ray.core.imaging.decode import call_decoder
from cifake_ray.core.provenance.generator import shorten
from cifake_ray.errors import ImageError

# Source: C2PA 2.2, section 11.1; ISO 19566-5. A type is four letters and this tail.
_TAIL = bytes.fromhex("00110010800000aa00389b71")
_STORE, _MANIFESTS, _ASSERTIONS = b"c2pa", (b"c2ma", b"c2um"), b"c2as"
_ACTIONS = b"c2pa.actions"
MAX_BOXES = 10_000
_SOURCE_TYPE = re.compile(rb"digitalSourceType(?:\"\s{0,8}:\s{0,8}(\"))?")
_MIME_TYPES = {"MPO": "image/jpeg", "HEIF": "image/heic"}  # of Pillow's names


class _Box(NamedTuple):
    """A box of a store: its type, and where its content is."""

    kind: bytes
    start: int
    end: int


class _Store:
    """The boxes of a store, of which at most MAX_BOXES are read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.boxes_left = data, MAX_BOXES

    def list_boxes(self, start: int, end: int) -> Iterator[_Box]:
        while start + 8 <= end and self.boxes_left > 0:
            self.boxes_left -= 1
            size, body = int.from_bytes(self.data[start : start + 4], "big"), start + 8
            if size == 1:
                size, body = int.from_bytes(self.data[body : body + 8], "big"), start + 16
            stop = min(start + size, end) if size else end
            if stop < body:
                return
            yield _Box(self.data[start + 4 : start + 8], body, stop)
            start = stop

    def list_superboxes(self, start: int, end: int) -> Iterator[tuple[bytes, bytes, _Box]]:
        """Yield type, label and content of the superboxes in a range."""
        for box in self.list_boxes(start, end):
            if box.kind != b"jumb":
                continue
            head = next(self.list_boxes(box.start, box.end), None)
            if head is None or head.kind != b"jumd":
                continue
            kind = self.data[head.start : head.start + 16]
            label = self.data[head.start + 17 : head.end].partition(b"\0")[0]
            if kind[4:] == _TAIL:
                yield kind[:4], label, _Box(box.kind, head.end, box.end)


def is_c2pa_store(data: bytes) -> bool:
    """Return whether bytes begin a C2PA manifest store, not another JUMBF box."""
    return data[4:8] == b"jumb" and data[12:16] == b"jumd" and data[16:32] == _STORE + _TAIL


def list_source_types(data: bytes) -> list[str]:
    """Return the digitalSourceType of the actions of the active manifest, or of its ingredients.

    The active manifest is the last. The one nearest to it that states any counts, since an
    application that only stores or converts an image states none.
    """
    store = _Store(data)
    for _, _, content in store.list_superboxes(0, len(data)):
        manifests = [
            box
            for kind, _, box in store.list_superboxes(content.start, content.end)
            if kind in _MANIFESTS
        ]
        for manifest in reversed(manifests):
            if found := list(_list_actions(store, manifest)):
                return found
        break
    return []


def _list_actions(store: _Store, manifest: _Box) -> Iterator[str]:
    for kind, _, assertions in store.list_superboxes(manifest.start, manifest.end):
        if kind != _ASSERTIONS:
            continue
        for _, label, box in store.list_superboxes(assertions.start, assertions.end):
            if label.startswith(_ACTIONS):
                yield from _find_source_types(store.data[box.start : box.end])


def _find_source_types(actions: bytes) -> Iterator[str]:
    """Yield the values of digitalSourceType in CBOR or JSON."""
    for found in _SOURCE_TYPE.finditer(actions):
        start = found.end()
        if found[1]:
            value = actions[start : start + 256].partition(b'"')[0]
        else:  # a text of CBOR: its length in the head, or in the one or two bytes behind
            head = actions[start] if start < len(actions) else 0
            extra = max(head - 0x77, 0)
            size = int.from_bytes(actions[start + 1 : start + 1 + extra], "big") or head - 0x60
            if not 0x60 <= head <= 0x79 or size > 256:
                continue
            value = actions[start + 1 + extra : start + 1 + extra + size]
        yield value.decode("utf-8", "replace")


class C2paFacts(NamedTuple):
    """What is known of a manifest store beside its presence."""

    binding: str = "unknown"  # match, mismatch or unknown: do its hashes fit the image
    trust: str | None = None  # trusted, untrusted or unknown; None if nobody looked
    issuer: str | None = None  # of the certificate that signed the active manifest


def find_mime_type(image_format: str) -> str:
    """Return the MIME type of one of Pillow's formats."""
    return _MIME_TYPES.get(image_format, f"image/{image_format.lower()}")


def verify_c2pa(data: bytes, image_format: str) -> C2paFacts | None:
    """Ask encypher-c2pa about an image with a manifest store; None if it gives no answer."""
    try:
        return call_decoder(partial(_ask_verifier, find_mime_type(image_format)), data)
    except ImageError:
        return None


def _ask_verifier(mime_type: str, data: bytes) -> C2paFacts:
    """Ask offline and without telemetry, which stays unset: False would write a file."""
    import encypher_c2pa

    report: Any = encypher_c2pa.verify(data, mime_type, online=False)
    manifests = report["manifest_report"]
    active = manifests["manifests"].get(manifests["active_manifest"]) or {}
    signer = active.get("signature_info") or {}
    issuer = signer.get("issuer") or signer.get("common_name")
    trust = manifests["provenance_verdict"]["trust"]
    binding = report["hard_binding"]
    return C2paFacts(
        binding if binding in ("match", "mismatch") else "unknown",
        trust if trust in ("trusted", "untrusted") else "unknown",
        shorten(issuer) if isinstance(issuer, str) else None,
    )
