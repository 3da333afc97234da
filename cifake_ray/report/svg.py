"""Put an SVG file into a page, with the page's colours and fonts."""

from __future__ import annotations

import hashlib
import re
from xml.etree import ElementTree

from markupsafe import Markup

from cifake_ray.report.figures import BEFORE, COLOURS, GRID, INK, MUTED

# The CSS variables of `page.html.j2` for the colours of a figure; black and #cccccc are
# matplotlib's own, for frames.
PAGE_COLOURS = {
    INK: "--ink",
    "#000000": "--ink",
    MUTED: "--muted",
    GRID: "--line",
    "#cccccc": "--line",
    "#ffffff": "--page",
    COLOURS["REAL"].lower(): "--real",
    COLOURS["FAKE"].lower(): "--fake",
    BEFORE.lower(): "--before",
}
HREF = "{http://www.w3.org/1999/xlink}href"


def inline_svg(svg: bytes, title: str) -> Markup:
    """Return a figure of `figures.encode_figure` as an element with ids of its own."""
    root = ElementTree.fromstring(svg)
    prefix = hashlib.sha256(ascii(title).encode() + svg).hexdigest()[:8]
    for parent in root.iter():
        for child in list(parent):
            # The style is for everything in the document, which is the page now.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]  # HTML has no namespaces
        found = element.attrib
        name = found.pop("id", None)
        if name and element.tag != "g":  # nothing refers to a group
            found["id"] = prefix + name
        if HREF in found:
            found["href"] = found.pop(HREF).replace("#", f"#{prefix}", 1)
        if "clip-path" in found:
            found["clip-path"] = found["clip-path"].replace("#", f"#{prefix}", 1)
        if "style" in found:
            style = re.sub(r"font-family: [^;]*;? ?", "", found["style"])
            for colour, variable in PAGE_COLOURS.items():
                style = style.replace(colour, f"var({variable})")
            found["style"] = style
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib.clear()
    root.attrib |= {"viewBox": f"0 0 {width} {height}", "role": "img"}
    heading = ElementTree.Element("title")
    heading.text = title
    root.insert(0, heading)
    return Markup(ElementTree.tostring(root, encoding="unicode"))
