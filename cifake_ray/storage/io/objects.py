"""Write and list the objects of a store that may not keep what it promises.

S3 is spoken by many servers, and by caches and gateways in front of them. Some ignore
`If-None-Match`, show an object only after a while, or lose what they have said yes to.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.paths import read_code

if TYPE_CHECKING:
    from upath import UPath

MAX_PUT_BYTES = 5 * 2**30  # S3 takes no more in one PUT
LOOK_AGAIN_S = (0.5, 1.0, 2.0, 4.0)  # pauses for a store that is behind
MAX_VAIN_PAGES = 100  # of a listing, one after another without a new name
SETTLE_S = 2.0  # longer than another process takes from its look at a name to its PUT


def read_object(path: UPath) -> bytes:
    """Return the content of an object, by one request: what is there now, whole."""
    return bytes(path.fs.cat_file(path.path))


def put_object(path: UPath, data: bytes, mode: str = "overwrite") -> None:
    """Write an object in one request, so that it appears whole or not at all."""
    options = {"chunksize": MAX_PUT_BYTES} if path.protocol == "s3" else {}
    path.fs.pipe_file(path.path, data, mode=mode, **options)


def replace_object(path: UPath, data: bytes) -> None:
    """Write an object, and write it again as long as an S3 store has none of its size."""
    for pause_s in LOOK_AGAIN_S:
        put_object(path, data)
        if path.protocol != "s3" or _find_size(path) == len(data):
            return
        time.sleep(pause_s)  # it is behind, or another process writes the same object
    raise _explain_lost(path)


def create_object(path: UPath, data: bytes) -> bool:
    """Write an object that does not exist yet. Return False, and change nothing, if it does.

    Of two processes one succeeds, also where `If-None-Match` is ignored.
    """
    if path.exists() or not _put_new(path, data):
        return False
    if _put_new(path, data):  # a store that keeps its word refuses the second
        time.sleep(SETTLE_S)  # who did not see this one has written by then: the last one counts
    for pause_s in LOOK_AGAIN_S:
        try:
            return read_object(path) == data
        except FileNotFoundError:
            time.sleep(pause_s)
    raise _explain_lost(path)


def _put_new(path: UPath, data: bytes) -> bool:
    """Write an object unless there is one; S3 is told so by `If-None-Match: *`."""
    try:
        put_object(path, data, "create")
    except OSError as error:
        if read_code(error) != "PreconditionFailed" and not path.exists():
            raise
        return False
    return True


def _find_size(path: UPath) -> int | None:
    try:
        return int(path.fs.info(path.path)["size"])
    except FileNotFoundError:
        return None


def _explain_lost(path: UPath) -> StorageError:
    return StorageError(
        f"{path}: the store said that it was written, and does not have it as it was written; check"
        " the store and what is in front of it, then run the same command again"
    )


def list_objects(folder: UPath, delimiter: str = "") -> dict[str, int]:
    """Return the names below a folder on S3, sorted, and their sizes in bytes.

    With a delimiter a name ends behind the first one, and has no size: -1.

    OSError when the store answers with what is no listing, or with one that does not end.
    """
    bucket, _, prefix = folder.path.rstrip("/").partition("/")
    prefix = f"{prefix}/" if prefix else ""
    query = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    sizes: dict[str, int] = {}
    vain_pages = 0
    while True:
        try:
            page: dict[str, Any] = folder.fs.call_s3("list_objects_v2", **query)
        except FileNotFoundError:
            return {}
        found = {entry.get("Key", ""): entry.get("Size", -1) for entry in page.get("Contents", ())}
        found |= {entry.get("Prefix", ""): -1 for entry in page.get("CommonPrefixes", ())}
        if outside := [key for key in found if not key.startswith(prefix)]:
            raise OSError(f"its listing has {outside[0]!r}, which is not below {prefix!r}")
        found = {key.removeprefix(prefix): size for key, size in found.items()}
        vain_pages = 0 if found.keys() - sizes.keys() else vain_pages + 1
        sizes |= found
        if page.get("IsTruncated") is False:
            return dict(sorted(sizes.items()))
        if vain_pages > MAX_VAIN_PAGES or not page.get("NextContinuationToken"):
            raise OSError("its listing has no end")
        query["ContinuationToken"] = page["NextContinuationToken"]
