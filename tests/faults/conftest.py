"""The environment of the commands that these tests run."""

from __future__ import annotations

import pytest
from faults.command import make_env
from s3_server import S3Server


@pytest.fixture(scope="session")
def env() -> dict[str, str]:
    return make_env()


@pytest.fixture
def store_env(s3_env: S3Server) -> dict[str, str]:
    """The same, with the rights of the S3 server's administrator."""
    return make_env()
