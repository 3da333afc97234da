"""Start Ray on this machine such that no other user and no other machine gets in.

Whoever reaches a Ray can run code with its user's rights. So the one that a command starts listens
on loopback only, asks for a token that only its own processes know, and has its folder, which Ray
opens to everyone, inside a private one. RAY_AUTH_MODE=disabled does without the token.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._common.utils import get_system_memory
from ray._private import ray_constants as constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from cifake_ray.errors import ResourceError

MAX_RAY_FOLDER = 40  # bytes: of the 107 of a socket's path Ray uses 64 below it
SHARED_MEMORY = "/dev/shm"
MAX_OBJECT_BYTES = 2e9  # as Ray has where there is no shared memory; little goes through its store
SHARED_FOLDERS = ("/tmp", "/var/tmp")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@contextmanager
def lock_doors() -> Iterator[None]:
    """Give the Ray that is started inside loopback and a token; afterwards forget the token here.

    The processes of that Ray inherit it from this one. A token that the user has set is used.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    is_cluster = constants.ENABLE_RAY_CLUSTER
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)  # between the ranks of a training
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not before["RAY_AUTH_TOKEN"] and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one to HOME
    _read_variables()
    # `_node_ip_address="127.0.0.1"` would become this machine's address. This is Ray's own switch,
    # for systems on which it offers no clusters.
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = is_cluster
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def stop_ray() -> None:
    """Disconnect, and end a Ray that was started here. The next one may have another token."""
    ray.shutdown()
    _read_variables()


def _read_variables() -> None:
    """Let Ray's native code, which remembers them, read the variables again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def choose_ray_folder() -> str:
    """Return the folder for Ray's sockets and logs, inside a private one.

    Its path is short, as the system wants those of sockets. ResourceError when there is none.
    """
    chosen = next(filter(None, map(os.environ.get, ("RAY_TMPDIR", "TMPDIR"))), "/tmp")
    for parent in (os.path.abspath(chosen), *SHARED_FOLDERS):
        private = parent if _is_private(parent) else os.path.join(parent, f"ray-{os.geteuid()}")
        folder = os.path.join(private, "ray")
        if len(os.fsencode(folder)) > MAX_RAY_FOLDER:
            continue
        with suppress(OSError):
            os.mkdir(private, 0o700)
        if _is_private(private) and os.access(private, os.W_OK | os.X_OK):
            return folder
    most = MAX_RAY_FOLDER - len("/ray")
    raise ResourceError(
        f"no private folder for Ray's sockets and logs: {chosen}, {' and '.join(SHARED_FOLDERS)}"
        f" cannot be written, have long paths, or their ray-{os.geteuid()} is not only yours; set"
        f" RAY_TMPDIR to a folder of at most {most} bytes that only you may enter (chmod 700)"
    )


def place_objects(ray_folder: str) -> dict[str, Any]:
    """Return the options of ray.init for a system whose /dev/shm is missing or read-only.

    Where it is merely small, as in Docker, Ray itself keeps its objects in its folder.
    """
    if sys.platform != "linux" or os.access(SHARED_MEMORY, os.W_OK):
        return {}
    most_bytes = int(min(MAX_OBJECT_BYTES, 0.3 * get_system_memory()))
    return {"_plasma_directory": os.path.dirname(ray_folder), "object_store_memory": most_bytes}


def _is_private(folder: str) -> bool:
    """Return whether a folder is ours and nobody else may enter it."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_ours and not status.st_mode & 0o077
