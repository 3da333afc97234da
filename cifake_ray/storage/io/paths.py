"""Places: what a URI names, and how the errors of a store are told.

A place is a local `Path`, or a `UPath` in a bucket or another store that fsspec
opens. Both have `/`, `name`, `parent` and `str()`; files are read and written by
`storage.io.files`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    ConnectTimeoutError,
    EndpointConnectionError,
    InvalidRegionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from pyarrow.fs import FSSpecHandler, PyFileSystem
from upath import UPath

from cifake_ray.config import StoreConfig, check_endpoint
from cifake_ray.errors import StorageError, UsageError

AnyPath: TypeAlias = Path | UPath

SCHEMES = ("s3", "gs", "az", "abfs", "hf", "memory")  # beside file; no http: see README, Security
REMEDIES: dict[type[Exception], str] = {
    ParamValidationError: "give s3://BUCKET/PREFIX with a valid name of a bucket",
    ProfileNotFound: "check --s3-profile and AWS_PROFILE",
    ConfigParseError: "mend the AWS configuration, or name another by AWS_CONFIG_FILE",
    PartialCredentialsError: "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or neither",
    InvalidRegionError: "check --s3-region and AWS_REGION",
    SSLError: "check --s3-endpoint-url: http:// or https://, and its certificate",
    EndpointConnectionError: "check --s3-endpoint-url and the network",
    ConnectTimeoutError: "check --s3-endpoint-url and the network",
}
# Retries with growing pauses are botocore's; s3fs tries again on top of them.
S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"mode": "standard", "max_attempts": 5},
}
_CREDENTIALS = re.compile(
    r"://[^/]*@|[?&](X-Amz-\w|AWSAccessKeyId=|access_key=|secret|sig(nature)?=|pass(word)?=|token=)",
    re.IGNORECASE,
)


def resolve_path(uri: str, store: StoreConfig | None = None) -> AnyPath:
    """The place a URI names; a local path becomes absolute.

    UsageError for a scheme that is not supported and for credentials inside the URI.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "file", uri
    if not rest:
        raise UsageError("an empty path was given; name a folder or file")
    if scheme == "file":
        return Path(os.path.abspath(os.path.expanduser(rest)))
    refuse_credentials(uri)
    if scheme not in SCHEMES:
        raise UsageError(
            f"{scheme}:// is not supported: {uri!r}; give a local path or one of"
            f" {', '.join(f'{name}://' for name in SCHEMES)}"
        )
    if scheme == "s3" and not rest.partition("/")[0]:
        raise UsageError(f"{uri!r} names no bucket; give s3://BUCKET/PREFIX")
    options = {}
    if scheme == "s3":
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            check_endpoint(os.environ.get(name), name)
        options = _s3_options(store or StoreConfig())
    try:
        place: UPath = UPath(f"{scheme}://{rest.rstrip('/')}", **options)
        _ = place.fs  # imports what the scheme needs
    except ImportError as error:
        raise UsageError(f"{scheme}:// needs a package that is not installed: {error}") from error
    return place


def refuse_credentials(uri: str) -> None:
    """UsageError, which does not repeat them, when a URI holds credentials."""
    if _CREDENTIALS.search(uri):
        raise UsageError(
            f"a {uri.partition('://')[0]}:// URI holds credentials; leave them out: they come from"
            " the environment (the AWS chain, --s3-profile)"
        )


def is_inside(place: AnyPath, folder: AnyPath) -> bool:
    """Whether a place is a folder or lies below it; links are followed."""
    if isinstance(place, Path) or isinstance(folder, Path):
        return (
            isinstance(place, Path)
            and isinstance(folder, Path)
            and place.resolve().is_relative_to(folder.resolve())
        )
    return f"{str(place).rstrip('/')}/".startswith(f"{str(folder).rstrip('/')}/")


def resolve_local(uri: str, what: str) -> Path:
    """The local path a URI names. UsageError, naming `what` it is for, when it is in a store."""
    place = resolve_path(uri)
    if not isinstance(place, Path):
        raise UsageError(f"{uri}: {what} must be a local folder; give a path on this machine")
    return place


def _s3_options(store: StoreConfig) -> dict[str, Any]:
    return {
        "anon": store.s3_anonymous,
        "endpoint_url": store.s3_endpoint_url,
        "profile": store.s3_profile,
        "client_kwargs": {"region_name": store.s3_region} if store.s3_region else {},
        "config_kwargs": S3_CONFIG,
        "use_listings_cache": False,
    }


def to_arrow(place: AnyPath) -> tuple[Any, str]:
    """A place as pyarrow and Ray want it: a file system, or None for a local one, and a path."""
    if isinstance(place, Path):
        return None, str(place)
    return PyFileSystem(FSSpecHandler(place.fs)), place.path


@contextmanager
def explain_errors(place: AnyPath) -> Iterator[None]:
    """Whatever a store raises becomes a StorageError of one line; FileExistsError passes."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise explain_os_error(error, place) from error
    except (BotoCoreError, ClientError) as error:
        raise explain_store_error(error, place) from error


def explain_os_error(error: OSError, place: AnyPath | str) -> StorageError:
    """One line for an operating-system error: what failed, where, and what to do."""
    remedies = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check the permissions",
        errno.EPERM: "check the permissions",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the quota is used up; free some space and run the same command again",
        errno.EFBIG: "the file would exceed a size limit; raise it and run the same command again",
        errno.ENOTDIR: "a file stands where a folder is needed",
        errno.EISDIR: "a folder stands where a file is needed",
    }
    remedy = remedies.get(error.errno or 0, "check the disk and run the same command again")
    reason = str(error.strerror or error).rstrip(".")
    if isinstance(place, UPath):  # fsspec's errors carry no errno
        reason, remedy = reason or type(error).__name__, "run the same command again"
        if isinstance(error, FileNotFoundError):
            remedy = "check the bucket and the path"
        elif isinstance(error, PermissionError):
            remedy = "check the credentials (AWS chain, --s3-profile) and the bucket's policy"
    return StorageError(f"{place}: {reason}; {remedy}")


def explain_store_error(error: BotoCoreError | ClientError, place: AnyPath | str) -> StorageError:
    """One line for what botocore raises before or without an answer of the store."""
    for kind, remedy in REMEDIES.items():
        if isinstance(error, kind):
            return StorageError(f"{place}: {' '.join(str(error).split())}; {remedy}")
    if isinstance(error, NoCredentialsError):
        remedy = "set up the AWS chain (variables, --s3-profile, a role) or give --s3-anonymous"
        return StorageError(f"{place}: no AWS credentials found; {remedy}")
    return StorageError(f"{place}: {error}; run the same command again")
