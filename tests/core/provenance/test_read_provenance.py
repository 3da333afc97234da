"""What metadata claims of an image's origin: each kind, in each format that keeps it."""

from __future__ import annotations

import os
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from provenance_files import (
    IPTC,
    TC260,
    add_chunk,
    add_segment,
    add_store,
    encode,
    make_actions,
    make_box,
    make_exif,
    make_store,
    make_superbox,
    make_xmp,
)

from cifake_ray.core.imaging.decode import inspect_image
from cifake_ray.core.provenance import c2pa, metadata
from cifake_ray.core.provenance.read_provenance import (
    Provenance,
    count_provenance,
    list_columns,
    read_provenance,
)
from cifake_ray.core.schema import PROVENANCE_FIELDS

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF")
AI, PHOTO = f"{IPTC}trainedAlgorithmicMedia", f"{IPTC}digitalCapture"
STORE = make_store(make_actions(AI))


def read(data: bytes, verifies: bool = False) -> dict[str, Any]:
    """The claims that are made; the file must be an image."""
    found = asdict(read_provenance(data, inspect_image(data).format, verifies=verifies))
    return {name: value for name, value in found.items() if value is not None}


NOTHING = {"c2pa_present": False}


def test_the_columns_are_those_of_the_schema() -> None:
    assert list(Provenance.__dataclass_fields__) == [field.name for field in PROVENANCE_FIELDS]


@pytest.mark.parametrize("format", [*FORMATS, "GIF", "BMP"])
def test_an_image_without_metadata_claims_nothing(format: str) -> None:
    assert read(encode(format)) == ({} if format in ("GIF", "BMP") else NOTHING)


@pytest.mark.parametrize("format", FORMATS)
def test_a_manifest_store_is_found_and_its_source_type(format: str) -> None:
    data = add_store(encode(format), format, STORE)
    expected = {"c2pa_present": True, "c2pa_binding": "unknown"}
    assert read(data) == {**expected, "digital_source_type": "trainedAlgorithmicMedia"}


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_another_jumbf_box_is_no_manifest(format: str) -> None:
    other = make_superbox(b"json", "c2pa", make_box(b"json", b"{}"))
    assert read(add_store(encode(format), format, other)) == NOTHING
    two = add_store(add_store(encode("PNG"), "PNG", STORE), "PNG", other)
    assert read(two)["c2pa_present"]


def test_words_of_c2pa_elsewhere_are_no_manifest() -> None:
    assert read(add_chunk(encode("PNG"), b"tEXt", b"Comment\0" + STORE)) == NOTHING
    assert read(encode("JPEG") + STORE) == NOTHING
    assert read(add_segment(encode("JPEG"), 0xEB, b"HDR_RI ver=11")) == NOTHING


@pytest.mark.parametrize(
    ("manifests", "expected"),
    [
        ([make_actions(AI), make_actions(PHOTO)], "digitalCapture"),  # the last is the active one
        ([make_actions(AI), make_actions()], "trainedAlgorithmicMedia"),  # that of its ingredient
        ([make_actions(PHOTO, AI)], "trainedAlgorithmicMedia"),  # AI counts more in one manifest
        ([make_actions(AI, is_json=True)], "trainedAlgorithmicMedia"),
        ([make_actions("https" + AI[4:])], "trainedAlgorithmicMedia"),
        (
            [make_actions("http://c2pa.org/digitalsourcetype/empty")],
            "http://c2pa.org/digitalsourcetype/empty",
        ),
        ([make_actions("x" * 256)], "x" * 200),
        ([make_actions("x" * 300)], None),
        ([make_actions("")], None),
        ([], None),
    ],
)
def test_the_source_type_of_a_store(manifests: list[bytes], expected: str | None) -> None:
    data = add_store(encode("PNG"), "PNG", make_store(*manifests))
    assert read(data).get("digital_source_type") == expected


XMP = {
    f'e:DigitalSourceType="{AI}">': {"digital_source_type": "trainedAlgorithmicMedia"},
    f"><e:DigitalSourceType>\n {AI} </e:DigitalSourceType>": {
        "digital_source_type": "trainedAlgorithmicMedia"
    },
    f'><e:DigitalSourceType rdf:resource="{IPTC}algorithmicMedia"/>': {
        "digital_source_type": "algorithmicMedia"
    },
    f"><e:DigitalSourceType><rdf:Alt><rdf:li>{AI}</rdf:li></rdf:Alt></e:DigitalSourceType>": {
        "digital_source_type": "trainedAlgorithmicMedia"
    },
    'p:CreatorTool="Adobe Firefly 3">': {"generator": "Adobe Firefly 3"},
    'p:CreatorTool="Adobe Photoshop 25.0">': {},
    f"><TC260:AIGC>{TC260.replace(chr(34), '&quot;')}</TC260:AIGC>": {
        "tc260_label": "1",
        "generator": "TC260: 001191110108",
    },
    f'TC260:AIGC="{TC260.replace(chr(34), "&quot;").replace("1", "3", 1)}">': {
        "tc260_label": "3",
        "generator": "TC260: 001191110108",
    },
    "><TC260:AIGC>words</TC260:AIGC>": {},
    # A name in another namespace, and the words in a text.
    f'xmlns:o="http://example.org/" o:DigitalSourceType="{AI}">': {},
    f"><p:Label>DigitalSourceType={AI}</p:Label>": {},
}


@pytest.mark.parametrize("content", XMP)
def test_xmp(content: str) -> None:
    for format in ("JPEG", "WEBP", "AVIF", "HEIF"):
        assert read(encode(format, xmp=make_xmp(content))) == {**NOTHING, **XMP[content]}


def make_itxt(xmp: bytes, is_packed: bool) -> bytes:
    body = zlib.compress(xmp) if is_packed else xmp
    return b"XML:com.adobe.xmp\0" + bytes([is_packed, 0]) + b"\0\0" + body


@pytest.mark.parametrize("is_packed", [False, True])
def test_xmp_of_a_png(is_packed: bool) -> None:
    xmp = make_xmp(f'e:DigitalSourceType="{AI}">')
    data = add_chunk(encode("PNG"), b"iTXt", make_itxt(xmp, is_packed))
    assert read(data) == {**NOTHING, "digital_source_type": "trainedAlgorithmicMedia"}


SETTINGS = "a cat,\nin the sun\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Size: 512x512"
TEXTS = {
    ("parameters", f"{SETTINGS}, Model: v1-5-pruned"): "Stable Diffusion parameters: v1-5-pruned",
    ("parameters", SETTINGS): "Stable Diffusion parameters",
    ("parameters", f"{SETTINGS}, App: SD.Next, Model: FLUX.1-dev"): "SD.Next: FLUX.1-dev",
    ("parameters", "temperature=20 C"): None,
    ("prompt", '{"4": {"inputs": {"ckpt_name": "xl.safetensors"}, "class_type": "Loader"}}'): (
        "ComfyUI: xl.safetensors"
    ),
    ("workflow", '{"last_node_id": 10, "nodes": []}'): "ComfyUI",
    ("prompt", "write a poem"): None,
    ("parameters", '{"sui_image_params": {"prompt": "x", "model": "a/b"}}'): "SwarmUI: a/b",
    ("invokeai_metadata", '{"positive_prompt": "x", "model": {}}'): "InvokeAI",
    ("Description", "a fox --v 6 Job ID: 0a1b2c3d-1111-2222-3333-444455556666"): "Midjourney",
    ("Description", "A picture of Midjourney's founder"): None,
    ("Software", "NovelAI"): "NovelAI",
    ("Software", "Adobe Photoshop"): None,
    ("Source", "Stable Diffusion XL 7BCCAA2C"): "Stable Diffusion XL 7BCCAA2C",
    ("Author", "ComfyUI"): None,
}


@pytest.mark.parametrize(("key", "text"), TEXTS)
def test_texts_of_a_png(key: str, text: str) -> None:
    plain, packed = key.encode() + b"\0" + text.encode(), zlib.compress(text.encode())
    bodies = {
        b"tEXt": plain,
        b"zTXt": key.encode() + b"\0\0" + packed,
        b"iTXt": key.encode() + b"\0\1\0en\0\0" + packed,
    }
    for kind, body in bodies.items():
        assert read(add_chunk(encode("PNG"), kind, body)).get("generator") == TEXTS[key, text]


def test_the_label_of_tc260_as_a_text_of_a_png() -> None:
    data = add_chunk(encode("PNG"), b"tEXt", b"AIGC\0" + TC260.encode())
    assert read(data)["tc260_label"] == "1"


EXIF = {
    b"UNICODE\0" + SETTINGS.encode("utf-16-be"): "Stable Diffusion parameters",
    b"UNICODE\0" + SETTINGS.encode("utf-16-le"): "Stable Diffusion parameters",
    b"ASCII\0\0\0" + SETTINGS.encode(): "Stable Diffusion parameters",
    bytes(8) + SETTINGS.encode(): "Stable Diffusion parameters",
    SETTINGS.encode(): "Stable Diffusion parameters",
    b"UNICODE\0" + "Steps: a walk by Midjourney".encode("utf-16-be"): None,
}


@pytest.mark.parametrize("comment", EXIF)
def test_exif_comments(comment: bytes) -> None:
    for format in set(FORMATS) - {"TIFF"}:  # into which Pillow writes no such directory
        data = encode(format, exif=make_exif(comment=comment))
        assert read(data).get("generator") == EXIF[comment], format


@pytest.mark.parametrize("format", FORMATS)
def test_other_tags_of_exif(format: str) -> None:
    def find(**tags: Any) -> str | None:
        return read(encode(format, exif=make_exif(**tags))).get("generator")

    assert find(software="ComfyUI 0.3") == "ComfyUI 0.3"
    assert find(software="HDR+ 1.0.6", description="OLYMPUS DIGITAL CAMERA") is None
    assert find(description="ChatGPT was here") is None, "captions speak of generators"
    assert find(description=SETTINGS) == "Stable Diffusion parameters"


def test_the_label_of_tc260_in_exif() -> None:
    comment = f'{{"AIGC":{TC260.replace("1", "2", 1)}}}'.encode()
    assert read(encode("JPEG", exif=make_exif(comment=comment)))["tc260_label"] == "2"


# --- what is too large, broken or built to be costly ---------------------------------------------


def check_cost(data: bytes) -> dict[str, Any]:
    start_s = time.perf_counter()
    found = asdict(read_provenance(data, "PNG", verifies=False))
    assert time.perf_counter() - start_s < 8, "seconds for one image"
    return found


def test_large_xmp_is_read_in_part_and_said() -> None:
    xmp = make_xmp(f'e:DigitalSourceType="{AI}">' + "<p:x>y</p:x>" * 200_000)
    found = check_cost(add_chunk(encode("PNG"), b"iTXt", make_itxt(xmp, False)))
    assert found["digital_source_type"] == "trainedAlgorithmicMedia"
    assert found["provenance_unread"] == "xmp"
    bomb = zlib.compress(xmp + b" " * 2**28)
    body = b"XML:com.adobe.xmp\0\1\0\0\0" + bomb
    assert check_cost(add_chunk(encode("PNG"), b"iTXt", body))["provenance_unread"] == "xmp"


def test_xml_that_unfolds_or_nests_is_left() -> None:
    entities = '<!DOCTYPE x [<!ENTITY a "aaaa">]>'
    for xmp in (
        make_xmp(">").replace(b"<x:xmpmeta", entities.encode() + b"<x:xmpmeta", 1),
        make_xmp(">" + "<p:x>" * 100_000),
        b"<x>",
        b"\xff\xfe\x00",
    ):
        found = check_cost(encode("JPEG", xmp=xmp[:60_000]))
        assert found["provenance_unread"] == "xmp"


def test_texts_that_are_bombs_cost_their_first_bytes() -> None:
    text = SETTINGS.encode() + b"x" * 2**28
    data = add_chunk(encode("PNG"), b"zTXt", b"parameters\0\0" + zlib.compress(text))
    assert check_cost(data)["generator"] == "Stable Diffusion parameters"
    spaces = b"prompt\0" + (b'"class_type"' + b" " * 50) * 1000 + b"\n" * 2**20
    assert check_cost(add_chunk(encode("PNG"), b"tEXt", spaces))["generator"] is None


def test_many_pieces_and_deep_boxes_end() -> None:
    nested = STORE
    for _ in range(5000):
        nested = make_box(b"jumb", nested)
    check_cost(add_store(encode("PNG"), "PNG", nested))
    many = make_store(*[make_actions(AI)] * 3000)
    assert check_cost(add_store(encode("PNG"), "PNG", many))["c2pa_present"]
    for size in (0, 1, 7, 2**31, 2**32 - 1):
        broken = STORE[:40] + size.to_bytes(4, "big") + STORE[44:]
        assert check_cost(add_store(encode("PNG"), "PNG", broken))["c2pa_present"]
    jpeg = encode("JPEG")
    lots = jpeg[:2] + b"\xff\xfe\0\2" * 5000 + jpeg[2:]
    assert check_cost(lots)["provenance_unread"] == "container"
    assert check_cost(jpeg[:2] + b"\xff" * 2**20 + jpeg[2:])["c2pa_present"] is False


def test_a_store_that_is_too_large_is_present_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "MAX_STORE_BYTES", 64)
    for format in ("PNG", "JPEG", "WEBP"):
        found = read(add_store(encode(format), format, STORE))
        assert (found["c2pa_present"], found["provenance_unread"]) == (True, "c2pa")


def test_large_exif_is_said() -> None:
    data = add_chunk(encode("PNG"), b"eXIf", b"II*\0\x08\0\0\0" + bytes(2**18))
    assert check_cost(data)["provenance_unread"] == "exif"
    broken = add_chunk(encode("PNG"), b"eXIf", b"II*\0\xff\xff\xff\xff")
    assert check_cost(broken)["provenance_unread"] == "exif"


# --- encypher-c2pa and genuine files -------------------------------------------------------------


def test_a_manifest_that_nobody_signed_is_never_a_match() -> None:
    pytest.importorskip("encypher_c2pa")
    found = read(add_store(encode("PNG"), "PNG", STORE), verifies=True)
    assert found["c2pa_present"]
    assert found["c2pa_binding"] == "unknown"
    assert found["c2pa_trust"] != "trusted"


def test_a_library_that_fails_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def verify(*_: object, **options: object) -> None:
            assert options == {"online": False}
            raise KeyError("x")

    monkeypatch.setitem(sys.modules, "encypher_c2pa", Broken)
    found = read(add_store(encode("PNG"), "PNG", STORE), verifies=True)
    assert found["c2pa_trust"] == found["c2pa_binding"] == "unknown"
    assert found["provenance_unread"] == "c2pa"
    assert found["digital_source_type"] == "trainedAlgorithmicMedia"
    assert read(encode("PNG"), verifies=True) == NOTHING, "without a manifest it is not asked"


def test_it_is_asked_with_types_that_it_knows() -> None:
    library = pytest.importorskip("encypher_c2pa")
    asked = {c2pa.find_mime_type(format) for format in (*FORMATS, "MPO")}
    assert asked <= set(library.supported_mime_types())


GENUINE: dict[str, dict[str, Any]] = {
    "firefly_c2pa_11.jpg": {
        "c2pa_present": True,
        "c2pa_binding": "match",
        "c2pa_trust": "untrusted",
        "c2pa_issuer": "Adobe Systems Incorporated",
        "digital_source_type": "trainedAlgorithmicMedia",
    },
    "openai_c2pa_289-2.png": {
        "c2pa_present": True,
        "c2pa_binding": "match",
        "c2pa_trust": "untrusted",
        "c2pa_issuer": "Truepic",
        "digital_source_type": "trainedAlgorithmicMedia",
    },
    "midjourney_xmp.png": {**NOTHING, "digital_source_type": "trainedAlgorithmicMedia"},
    "comfyui_lora.png": {**NOTHING, "generator": "ComfyUI: v1-5-pruned-emaonly.ckpt"},
    "comfyui_sdxl_turbo.png": {**NOTHING, "generator": "ComfyUI: sd_xl_turbo_1.0_fp16.safetensors"},
}


def read_genuine(name: str) -> bytes:
    path = Path(os.environ.get("CIFAKE_TEST_DATA", "")) / "provenance" / name
    if not path.is_file():
        pytest.skip(f"CIFAKE_TEST_DATA names no folder with provenance/{name}")
    return path.read_bytes()


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_files(name: str) -> None:
    expected = GENUINE[name]
    if expected["c2pa_present"]:
        pytest.importorskip("encypher_c2pa")
    data = read_genuine(name)
    assert read(data, verifies=True) == expected
    plain = {"c2pa_binding": "unknown", "c2pa_trust": None, "c2pa_issuer": None}
    own = {**expected, **(plain if expected["c2pa_present"] else {})}
    assert read(data) == {key: value for key, value in own.items() if value is not None}


def test_a_changed_pixel_is_a_mismatch() -> None:
    pytest.importorskip("encypher_c2pa")
    data = bytearray(read_genuine("firefly_c2pa_11.jpg"))
    data[-1000] ^= 1
    assert read(bytes(data), verifies=True)["c2pa_binding"] == "mismatch"


# --- counts --------------------------------------------------------------------------------------


def test_counts() -> None:
    nothing = read_provenance(encode("PNG"), "PNG", verifies=False)
    ai = read_provenance(add_store(encode("PNG"), "PNG", STORE), "PNG", verifies=False)
    photo = make_xmp(f'e:DigitalSourceType="{PHOTO}">')
    camera = read_provenance(encode("JPEG", xmp=photo), "JPEG", verifies=False)
    comfy = read_provenance(encode("JPEG", exif=make_exif("ComfyUI")), "JPEG", verifies=False)
    read = [nothing, ai, camera, comfy, comfy, None]
    columns = {**list_columns(read), "is_fake": [True, False, False, False, True, None]}
    types = {field.name: field.type for field in PROVENANCE_FIELDS} | {"is_fake": pa.bool_()}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    assert count_provenance(table) == {
        "any": 4,
        "c2pa": 1,
        "digital_source_type": 2,
        "generator": 2,
        "tc260_label": 0,
        "ai": 3,
        "ai_called_real": 2,
        "unread": 0,
    }
    assert count_provenance(table.select(["is_fake"])) == {}
