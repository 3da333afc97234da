"""Read from XMP what it says of an image's origin.

expat streams, so nothing is kept but the values; a document type, by which a small file could
unfold into a large one, ends the reading.
"""

from __future__ import annotations

import re
from xml.parsers import expat

MAX_VALUE_CHARS = 2**14  # the label of TC260 is JSON
MAX_DEPTH = 64
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
# Namespaces as their owners write them, whatever prefix and date a file gives them.
_WANTED = {
    "digital_source_type": re.compile(
        r"http://iptc\.org/std/Iptc4xmpExt/[\d-]+/ digitalsourcetype", re.IGNORECASE
    ),
    "creator_tool": re.compile(r"http://ns\.adobe\.com/xap/1\.0/ CreatorTool"),
    "tc260": re.compile(r"https?://www\.tc260\.org\.cn/ns/AIGC/[\d.]+/? AIGC"),
}


def read_xmp(xmp: bytes) -> tuple[dict[str, str], bool]:
    """Return the values of digital_source_type, creator_tool and tc260, and whether it was XML.

    Of a broken packet what stands before the break.
    """
    reader = _Reader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartDoctypeDeclHandler = reader.refuse
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.add_text
    try:
        parser.Parse(xmp.rstrip(b"\0 \r\n\t"), True)
    except (expat.ExpatError, ValueError, LookupError):
        return reader.values, False
    return reader.values, True


class _Reader:
    """Collects the wanted values, as attributes, elements or resources."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.depth = 0
        self.name: str | None = None  # of the value that is being read
        self.name_depth = 0
        self.text = ""

    def refuse(self, *declaration: object) -> None:
        raise ValueError("a document type")

    def start(self, element: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        for attribute, value in attributes.items():
            if name := _find_name(attribute):
                self._keep(name, value)
        if self.name is None and (name := _find_name(element)):
            self.name, self.name_depth, self.text = name, self.depth, ""
            self.add_text(attributes.get(f"{_RDF} resource", ""))

    def end(self, element: str) -> None:
        if self.name is not None and self.depth == self.name_depth:
            self._keep(self.name, self.text)
            self.name = None
        self.depth -= 1

    def add_text(self, text: str) -> None:
        if self.name is not None:
            self.text = (self.text + text)[:MAX_VALUE_CHARS]

    def _keep(self, name: str, value: str) -> None:
        if value := value.strip()[:MAX_VALUE_CHARS]:
            self.values.setdefault(name, value)


def _find_name(full_name: str) -> str | None:
    found = (name for name, pattern in _WANTED.items() if pattern.fullmatch(full_name))
    return next(found, None)
