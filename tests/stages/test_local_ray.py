"""Where the Ray of a command has its folder, and what its processes inherit."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import services

from cifake_ray.errors import ResourceError
from cifake_ray.stages import local_ray
from cifake_ray.stages.local_ray import choose_ray_folder, lock_doors, place_objects

OURS = f"ray-{os.geteuid()}"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder like /tmp, with a short path and the only one that there is."""
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as folder:
        os.chmod(folder, 0o1777)
        monkeypatch.setattr(local_ray, "SHARED_FOLDERS", (folder,))
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_rays_folder_is_inside_one_that_nobody_else_may_enter(shared: Path) -> None:
    for umask in (0, 0o022, 0o077):
        before = os.umask(umask)
        try:
            assert choose_ray_folder() == str(shared / OURS / "ray")
        finally:
            os.umask(before)
        assert stat.S_IMODE((shared / OURS).stat().st_mode) == 0o700
        (shared / OURS).rmdir()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_is_private_already_is_taken_as_it_is(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (mine := shared / "mine").mkdir(mode=0o700)
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(name, str(mine))
    assert choose_ray_folder() == str(mine / "ray")


def test_a_path_that_is_too_long_for_sockets_is_passed_over(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (long := shared / ("d" * 60)).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert choose_ray_folder() == str(shared / OURS / "ray")


@pytest.mark.parametrize("prepared", ["open", "a link", "a file", "another user's", "read-only"])
def test_a_folder_that_someone_else_prepared_is_never_used(shared: Path, prepared: str) -> None:
    path = shared / OURS
    if prepared == "a link":
        (shared / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(shared / "elsewhere")
    elif prepared == "a file":
        path.touch(mode=0o700)
    else:
        path.mkdir(mode=0o700)
    if prepared == "open":
        path.chmod(0o711)
    if prepared == "read-only":
        path.chmod(0o500)
    if prepared == "another user's" or (prepared == "read-only" and os.geteuid() == 0):
        if os.geteuid() != 0:
            pytest.skip("only root makes folders of others")
        os.chown(path, 12345, 12345)
    with pytest.raises(ResourceError, match=r"set RAY_TMPDIR to a folder of at most 36 bytes"):
        choose_ray_folder()


def test_without_shared_memory_objects_are_in_rays_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ray, "SHARED_MEMORY", str(tmp_path))
    assert place_objects("/tmp/ray-0/ray") == {}
    monkeypatch.setattr(local_ray, "SHARED_MEMORY", str(tmp_path / "none"))
    options = place_objects("/tmp/ray-0/ray")
    assert options["_plasma_directory"] == "/tmp/ray-0"
    assert 75 * 2**20 < options["object_store_memory"] <= 2e9


@pytest.mark.parametrize(
    ("given", "inherited"),
    [
        ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "new"}),
        ({"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "new"}),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"},
        ),
        (
            {"RAY_AUTH_TOKEN_PATH": "/mine"},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/mine"},
        ),
        ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "disabled"}),
    ],
)
def test_each_ray_has_a_token_of_its_own_unless_the_user_gave_one(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], inherited: dict[str, str]
) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    # The Ray of other tests runs in this process.
    monkeypatch.setattr(local_ray, "_read_variables", lambda: None)
    before, tokens = dict(os.environ), set[str]()
    for _ in range(2):
        with lock_doors():
            seen = {n: v for n, v in os.environ.items() if n.startswith("RAY_AUTH")}
            assert services.get_node_ip_address() == "127.0.0.1"
        if inherited.get("RAY_AUTH_TOKEN") == "new":
            tokens.add(seen["RAY_AUTH_TOKEN"])
            seen["RAY_AUTH_TOKEN"] = "new"
        if inherited["RAY_AUTH_MODE"] == "disabled":  # nobody asks for a token then
            seen.pop("RAY_AUTH_TOKEN", None)
        assert seen == inherited
        assert dict(os.environ) == before, "it would be told to whatever this process starts"
    assert len(tokens) in (0, 2)
    assert all(len(token) == 64 for token in tokens)
