"""Broken metadata: whatever the bytes, claims or none, soon, and in bounded memory.

In a process of its own, so that a crash of native code and its memory can be seen.
`python tests/core/provenance/test_fuzz_provenance.py 100000 1` looks longer and elsewhere.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
import zlib
from dataclasses import asdict

from provenance_files import (
    IPTC,
    TC260,
    add_chunk,
    add_store,
    encode,
    make_actions,
    make_exif,
    make_store,
    make_xmp,
)

from cifake_ray.core.provenance.c2pa import verify_c2pa
from cifake_ray.core.provenance.read_provenance import read_provenance

NUM_EXAMPLES = 4000
MAX_CALL_S = 5.0
MAX_GROWTH_BYTES = 200 * 2**20
MAX_CELL_CHARS = 200
NUMBERS = (0, 1, 2, 3, 7, 8, 127, 255, 0x7FFF, 0xFFFF, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def make_seeds() -> list[tuple[str, bytes]]:
    ai = f"{IPTC}trainedAlgorithmicMedia"
    xmp = make_xmp(
        f'e:DigitalSourceType="{ai}"><TC260:AIGC>{TC260.replace(chr(34), "&quot;")}</TC260:AIGC>'
    )
    exif = make_exif("ComfyUI", "x", b"UNICODE\0" + "Steps: 20, Model: m".encode("utf-16-be"))
    store = make_store(make_actions(ai), make_actions(ai, is_json=True), make_actions())
    seeds = []
    for format in ("JPEG", "WEBP", "AVIF", "HEIF"):
        data = encode(format, xmp=xmp, exif=exif)
        seeds.append((format, add_store(data, format, store)))
    png = encode("PNG", exif=exif)
    for kind, body in (
        (b"tEXt", b"parameters\0x\nSteps: 20, Model: m"),
        (b"zTXt", b"workflow\0\0" + zlib.compress(b'{"last_node_id": 1}')),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
    ):
        png = add_chunk(png, kind, body)
    seeds.append(("PNG", add_store(png, "PNG", store)))
    seeds.append(("TIFF", add_store(b"", "TIFF", store)))
    seeds.append(("GIF", encode("GIF")))
    return seeds


def mutate(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Most of what parsers believe stands at the beginning."""
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(min(len(data), rng.choice((200, 1000, 10_000))) or 1)
        head, tail, size = data[:place], data[place:], rng.randint(1, 64)
        match rng.randrange(6):
            case 0:
                data = head + bytes([(tail or b"\0")[0] ^ rng.randint(1, 255)]) + tail[1:]
            case 1:
                number = rng.choice(NUMBERS).to_bytes(4, rng.choice(("big", "little")))
                data = head + number + tail[4:]
            case 2:
                data = head + rng.randbytes(size) + tail
            case 3:
                data = head + tail[:size] * rng.randint(2, 300) + tail
            case 4:
                data = head + tail[size:]
            case 5:
                data = head + other[rng.randrange(len(other)) :]
    return data


def check_promises(data: bytes, format: str) -> None:
    """No exception, no long time; every cell is short text that Parquet takes."""
    start_s = time.perf_counter()
    found = asdict(read_provenance(data, format, verifies=False))
    assert time.perf_counter() - start_s < MAX_CALL_S, data[:64]
    for value in found.values():
        if isinstance(value, str):
            assert 0 < len(value.encode()) <= 4 * MAX_CELL_CHARS
            assert value.isprintable()


def fuzz(num_examples: int, seed: int) -> None:
    seeds, rng = make_seeds(), random.Random(seed)
    claims = [read_provenance(data, format, verifies=False) for format, data in seeds]
    assert [claim.c2pa_present for claim in claims] == [*[True] * 6, None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        import encypher_c2pa  # noqa: F401
    except ImportError:
        verifies = False
    else:
        verifies = True
    for number in range(num_examples):
        format, data = rng.choice(seeds)
        data = mutate(data, rng, rng.choice(seeds)[1])
        check_promises(data, format)
        if verifies and number % 4 == 0:
            verify_c2pa(data, format)  # whether we find a manifest in it or not
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < MAX_GROWTH_BYTES, f"{growth / 2**20:.0f} MiB"


def test_broken_metadata_gives_claims_or_none() -> None:
    child = subprocess.run(
        [sys.executable, __file__, str(NUM_EXAMPLES), "0"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr[-4000:]
    assert child.stdout == ""


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), int(sys.argv[2]))
