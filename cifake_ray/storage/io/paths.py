"""Turn URIs into paths, and errors of a store into StorageErrors.

A path is a local `Path`, or a `UPath` in a bucket or another store that fsspec opens.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

from cifake_ray.config import StoreConfig, check_endpoint
from cifake_ray.errors import StorageError, UsageError

if TYPE_CHECKING:  # the libraries of stores take as long to import as all others of `convert`
    from botocore.exceptions import BotoCoreError, ClientError
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"

SCHEMES = ("s3", "gs", "az", "abfs", "hf", "memory")  # besides file; no http: see README, Security
REMEDIES = {  # of botocore's errors
    "ParamValidationError": "give s3://BUCKET/PREFIX with a valid name of a bucket",
    "ProfileNotFound": "check --s3-profile and AWS_PROFILE",
    "ConfigParseError": "fix the AWS configuration, or name another by AWS_CONFIG_FILE",
    "PartialCredentialsError": "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or neither",
    "InvalidRegionError": "check --s3-region and AWS_REGION",
    "SSLError": "check --s3-endpoint-url: http:// or https://, and its certificate",
    "EndpointConnectionError": "check --s3-endpoint-url and the network",
    "ConnectTimeoutError": "check --s3-endpoint-url and the network",
}
BOTOCORE_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
)
# What the libraries below fsspec raise besides OSError, by name: few of them are installed.
STORE_ERRORS = (
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
    ("huggingface_hub.errors", "HFValidationError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)
# Retries with growing pauses are botocore's; s3fs tries again on top of them.
S3_CONFIG = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"mode": "standard", "max_attempts": 5},
}
MAX_REASON_CHARS = 300  # of what a store answers
_CREDENTIALS = re.compile(
    r"://[^/]*@|[?&](X-Amz-\w|AWSAccessKeyId=|access_key=|secret|sig(nature)?=|pass(word)?=|token=)",
    re.IGNORECASE,
)


def resolve_path(uri: str, store: StoreConfig | None = None) -> AnyPath:
    """Return the path that a URI names; a local one becomes absolute.

    UsageError for a scheme that is not supported and for credentials inside the URI.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "file", uri
    if not rest:
        raise UsageError("an empty path was given; name a folder or file")
    if scheme == "file":
        rest = parse_file_uri(uri) if separator else rest
        return Path(os.path.abspath(os.path.expanduser(rest)))
    refuse_credentials(uri)
    if scheme not in SCHEMES:
        raise UsageError(
            f"{scheme}:// is not supported: {uri!r}; give a local path or one of"
            f" {', '.join(f'{name}://' for name in SCHEMES)}"
        )
    if scheme == "s3" and not rest.partition("/")[0]:
        raise UsageError(f"{uri!r} names no bucket; give s3://BUCKET/PREFIX")
    from upath import UPath

    options: dict[str, Any] = {}
    if scheme == "s3":
        from cifake_ray.storage.io.s3_session import StayingSession

        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            check_endpoint(os.environ.get(name), name)
        store = store or StoreConfig()
        options = {
            "anon": store.s3_anonymous,
            "requester_pays": store.s3_requester_pays,
            "endpoint_url": store.s3_endpoint_url,
            "profile": store.s3_profile,
            "client_kwargs": {"region_name": store.s3_region} if store.s3_region else {},
            "config_kwargs": {"http_session_cls": StayingSession, **S3_CONFIG},
            "use_listings_cache": False,
        }
    try:
        path: UPath = UPath(f"{scheme}://{rest.rstrip('/')}", **options)
        _ = path.fs  # imports what the scheme needs
    except ImportError as error:
        raise UsageError(f"{scheme}:// needs a package that is not installed: {error}") from error
    return path


def parse_file_uri(uri: str) -> str:
    """Return the path of a file:// URI (RFC 8089), or of a plain path behind `file://`.

    %20 is a space, unless a file of that very name is there and none with a space.
    """
    written = uri.removeprefix("file://")
    written = written.removeprefix("localhost") if written.startswith("localhost/") else written
    path = unquote(written)
    return written if os.path.lexists(written) and not os.path.lexists(path) else path


def refuse_credentials(uri: str) -> None:
    """Raise UsageError, which does not repeat them, when a URI holds credentials."""
    if _CREDENTIALS.search(uri):
        raise UsageError(
            f"a {uri.partition('://')[0]}:// URI holds credentials; leave them out: they come from"
            " the environment (the AWS chain, --s3-profile)"
        )


def link_path(path: AnyPath) -> str:
    """Return a link that terminals and browsers open: file://..., or the URI in a bucket."""
    return path.as_uri() if isinstance(path, Path) else str(path)


def is_inside(path: AnyPath, folder: AnyPath) -> bool:
    """Return whether a path is a folder or is below it; links are followed."""
    if isinstance(path, Path) and isinstance(folder, Path):
        real = os.path.realpath(path)  # Path.resolve raises for a link to itself
        return Path(real).is_relative_to(os.path.realpath(folder))
    return f"{str(path).rstrip('/')}/".startswith(f"{str(folder).rstrip('/')}/")


def resolve_local(uri: str, what: str) -> Path:
    """Return the local path a URI names. UsageError, with `what` it is for, if it is in a store."""
    path = resolve_path(uri)
    if not isinstance(path, Path):
        raise UsageError(f"{uri}: {what} must be a local folder; give a path on this machine")
    return path


def to_arrow(path: AnyPath) -> tuple[Any, str]:
    """Return what pyarrow and Ray take: a file system, None for the local one, and a path."""
    if isinstance(path, Path):
        return None, str(path)
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(path.fs)), path.path


@contextmanager
def explain_errors(path: AnyPath) -> Iterator[None]:
    """Turn what a store raises into a StorageError of one line, except FileExistsError."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise explain_os_error(error, path) from error
    except find_errors(BOTOCORE_ERRORS) as error:
        raise explain_store_error(error, path) from error
    except find_errors(STORE_ERRORS) as error:
        reason = _shorten(str(error)) or type(error).__name__
        raise StorageError(f"{path}: {reason}; check the network and the path") from error
    except (KeyError, TypeError, ValueError) as error:
        if not is_from_s3fs(error):
            raise
        reason = f"an answer that is not S3's ({_shorten(repr(error))})"
        raise StorageError(f"{path}: {reason}; check --s3-endpoint-url") from error


def is_from_s3fs(error: Exception) -> bool:
    """Return whether an error is of s3fs, or of botocore below it, whatever it was called by."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("s3fs") for frame, _ in frames)


def _shorten(text: str) -> str:
    return " ".join(text.split())[:MAX_REASON_CHARS]


def find_errors(names: Iterable[tuple[str, str]]) -> tuple[type[Exception], ...]:
    """Return those exceptions, named by module and class, whose library has been imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if kind is not None)


def explain_os_error(error: OSError, path: AnyPath | str) -> StorageError:
    """Return a one-line error for one of the operating system: path, reason and remedy."""
    remedies = {
        errno.ENOENT: "check the path",
        errno.EACCES: "check the permissions",
        errno.EPERM: "check the permissions",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "the quota is used up; free some space and run the same command again",
        errno.EFBIG: "the file would exceed a size limit; raise it and run the same command again",
        errno.ENOTDIR: "a file is where a folder is needed",
        errno.EISDIR: "a folder is where a file is needed",
        errno.EINVAL: "a pipe, a socket or a device is where a file is needed",
        errno.EOVERFLOW: "it is no such file; put the right one there",
        errno.ELOOP: "a link leads to itself; remove it",
    }
    remedy = remedies.get(error.errno or 0, "check the disk and run the same command again")
    reason = str(error.strerror or error).rstrip(".")
    if not isinstance(path, (Path, str)):  # fsspec's errors carry no errno
        reason = _shorten(reason) or type(error).__name__
        remedy = "run the same command again"
        if read_code(error) == "RequestTimeTooSkewed":
            remedy = "set the clock of this computer"
        elif isinstance(error, FileNotFoundError):
            remedy = "check the bucket and the path"
        elif isinstance(error, PermissionError):
            remedy = "check the credentials (AWS chain, --s3-profile) and the bucket's policy"
    return StorageError(f"{path}: {reason}; {remedy}")


def read_code(error: OSError) -> str:
    """Return the code of the answer that s3fs has made an OSError of; "" if there is none."""
    response: dict[str, dict[str, str]] = getattr(error.__cause__, "response", {})
    return response.get("Error", {}).get("Code", "")


def explain_loss(path: Path) -> StorageError:
    """Return a one-line error for a file or folder whose parent is gone."""
    return StorageError(
        f"{path}: {path.parent} was moved or deleted while a command wrote to it; put it back and"
        " run the same command again"
    )


def explain_store_error(error: BotoCoreError | ClientError, path: AnyPath | str) -> StorageError:
    """Return a one-line error for what botocore raises without an answer of the store."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if "NoCredentialsError" in names:
        remedy = "set up the AWS chain (variables, --s3-profile, a role) or give --s3-anonymous"
        return StorageError(f"{path}: no AWS credentials found; {remedy}")
    remedies = (REMEDIES[name] for name in names if name in REMEDIES)
    remedy = next(remedies, "run the same command again")
    return StorageError(f"{path}: {_shorten(str(error))}; {remedy}")
