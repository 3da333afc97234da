"""What encoders leave in files is read from the files that they write."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from cifake_ray.core.imaging.encoding_facts import EncodingFacts, read_encoding

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta>'


def encode(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(buffer, kind, **options)
    return buffer.getvalue()


def make_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    return exif.tobytes()


def test_tables_tell_qualities_and_not_pictures_apart() -> None:
    digests = [read_encoding(encode("JPEG", quality=q)).quantization for q in (75, 75, 76, 90)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("name", ["4:2:0", "4:2:2", "4:4:4"])
def test_subsampling_and_scans_of_a_jpeg(name: str) -> None:
    facts = read_encoding(encode("JPEG", subsampling=name, progressive=name == "4:2:2"))
    assert facts.subsampling == name
    assert facts.is_progressive == (name == "4:2:2")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_kind_of_metadata_is_seen_alone(kind: str) -> None:
    empty = (0, 0, 0, 0)
    assert list_sizes(encode(kind)) == empty
    assert [size > 0 for size in list_sizes(encode(kind, exif=make_exif()))] == [1, 0, 0, 0]
    xmp: dict[str, Any] = {"xmp": XMP}
    if kind == "PNG":
        xmp = {"pnginfo": PngImagePlugin.PngInfo()}
        xmp["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    assert [size > 0 for size in list_sizes(encode(kind, **xmp))] == [0, 1, 0, 0]
    assert [size > 0 for size in list_sizes(encode(kind, icc_profile=bytes(200)))] == [0, 0, 1, 0]


def list_sizes(data: bytes) -> tuple[int, int, int, int]:
    facts = read_encoding(data)
    return facts.exif_bytes, facts.xmp_bytes, facts.icc_bytes, facts.text_bytes


def test_comments_and_texts_are_seen() -> None:
    assert list_sizes(encode("JPEG", comment=b"made by hand")) == (0, 0, 0, 12)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat")
    info.add_text("workflow", "{}" * 200, zip=True)
    assert list_sizes(encode("PNG", pnginfo=info))[3] > 20


def test_webp_is_lossy_or_lossless() -> None:
    assert read_encoding(encode("WEBP")).quantization == "lossy"
    assert read_encoding(encode("WEBP", lossless=True)).quantization == "lossless"
    options = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))], "lossless": True}
    assert read_encoding(encode("WEBP", **options)).quantization == "lossless"


def test_an_interlaced_png_is_progressive() -> None:
    data = bytearray(encode("PNG"))
    assert not read_encoding(bytes(data)).is_progressive
    data[28] = 1
    assert read_encoding(bytes(data)).is_progressive


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_have_no_tables(kind: str) -> None:
    assert read_encoding(encode(kind)).quantization is None


@given(st.sampled_from(["PNG", "WEBP", "JPEG"]), st.integers(0, 200), st.binary(max_size=40))
def test_broken_files_raise_nothing(kind: str, cut: int, rest: bytes) -> None:
    assert isinstance(read_encoding(encode(kind)[:cut] + rest), EncodingFacts)
