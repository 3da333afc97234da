"""Quarantine: an image that ends its process becomes an error, and nothing else does."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from cifake_ray.errors import ImageError, ResourceError
from cifake_ray.stages.batch.quarantine import Quarantine

# Stands for a codec with a bug: it is found in the child alone, whose site imports it first.
SITECUSTOMIZE = """
import importlib, os, signal, sys, time

if "cifake_ray.stages.batch.quarantine" in sys.orig_argv:
    images = importlib.import_module("cifake_ray.core.imaging.decode")
    decode, read_header = images._decode, images._read_header

    def die(file, min_side):
        if b"KILL" in file.data:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(file, min_side)

    def hang(file):
        if b"HANG" in file.data:
            time.sleep(600)
        return read_header(file)

    images._decode, images._read_header = die, hang
"""


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture(scope="module")
def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    return buffer.getvalue()


def try_images(images: list[bytes | ImageError], *, decodes: bool) -> list[bytes | ImageError]:
    steps: list[None] = []
    with Quarantine(decodes=decodes, timeout_s=1) as quarantine:
        tried = quarantine.try_images(images, lambda: steps.append(None))
        child = quarantine.child
    assert len(steps) == len(images) == len(tried)
    assert child is None or child.process.returncode == 0, "the child has outlived its quarantine"
    return tried


def test_images_that_end_their_process_become_errors_and_the_others_pass(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch)
    gone = ImageError("not_found", "the file is gone")
    images = [image, image + b"KILL", b"words", gone, image + b"HANG", image + b"KILL", image, b""]
    tried = try_images(images, decodes=True)
    for number in (0, 2, 3, 6, 7):
        assert tried[number] is images[number]
    errors = [tried[number] for number in (1, 4, 5)]
    assert [(e.error, e.detail) for e in errors if isinstance(e, ImageError)] == [
        ("worker_crash", "the decoder died with signal 9"),
        ("worker_crash", "the decoder gave no answer within 1 s"),
        ("worker_crash", "the decoder died with signal 9"),
    ]


def test_only_what_the_work_does_is_tried(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch)
    assert try_images([image + b"KILL"], decodes=False) == [image + b"KILL"]


def test_a_child_that_does_not_start_ends_the_run(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ResourceError, match=r"did not start \(exit code 1\)"):
        try_images([image], decodes=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="no process can be started"):
        try_images([image], decodes=True)


def test_code_in_the_working_folder_is_not_run(
    image: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "PIL", "socket", "cifake_ray"):
        (tmp_path / f"{name}.py").write_text("open('EXECUTED', 'w'); raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    assert try_images([image], decodes=True) == [image]
    assert not (tmp_path / "EXECUTED").exists()
