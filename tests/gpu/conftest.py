"""Tests of a GPU, with torch and `cifake_ray.core` alone: no Ray, no data set, no network.

    python -m pytest -s --confcutdir=tests/gpu tests/gpu

They take less than 8 minutes and end with a table of rates. Without a GPU they are skipped by name;
CIFAKE_TEST_DEVICE=cpu runs all but what only CUDA has, so that they are known to work.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import pytest
import torch
from gpu_cases import RATES

from cifake_ray.core.models.precision import exact_products


@pytest.fixture(scope="session")
def device() -> str:
    asked = os.environ.get("CIFAKE_TEST_DEVICE")
    if asked is None and not torch.cuda.is_available():
        pytest.skip("no GPU; CIFAKE_TEST_DEVICE=cpu runs what a CPU can")
    return asked or "cuda"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Share out no small network among cores that may be busy: their threads would wait in turn."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def exact_float32() -> Iterator[None]:
    with exact_products():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RATES:
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    terminalreporter.write_line(f"\nImages/s on {name}, torch {torch.__version__}\n")
    widths = [max(map(len, column)) for column in zip(*RATES, strict=True)]
    for row in (RATES[0], ["-" * width for width in widths], *RATES[1:]):
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(f"| {' | '.join(cells)} |")
