"""What an s3:// URI names: its bucket and key, and whether the bucket answers."""

from __future__ import annotations

from dataclasses import replace

from botocore.exceptions import BotoCoreError

from cifake_ray.config import StoreConfig
from cifake_ray.storage.io.paths import AnyPath, resolve_path
from cifake_ray.storage.s3.errors import S3Error, explain_s3_error
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS, S3Limits

SCHEME = "s3://"
CHECK_ATTEMPTS = 3  # a wrong endpoint should be reported in seconds


def open_path(uri: str, store: StoreConfig) -> AnyPath:
    """Return the path a URI names; a bucket is checked first, so that errors show in seconds.

    UsageError for what is no path, StorageError when the bucket cannot be reached.
    """
    place = resolve_path(uri, store)
    if uri.startswith(SCHEME):
        check_bucket(store, *split_location(uri))
    return place


def check_bucket(
    store: StoreConfig, bucket: str, prefix: str = "", limits: S3Limits = DEFAULT_LIMITS
) -> None:
    """Raise StorageError, with the remedy, when these credentials cannot list a bucket."""
    from cifake_ray.storage.s3.client import open_client  # with botocore, which only buckets need

    limits = replace(limits, max_attempts=min(CHECK_ATTEMPTS, limits.max_attempts))
    try:
        query = {"prefix": prefix, "max-keys": "1"}
        open_client(store, limits, bucket).list_page(bucket, query)
    except (S3Error, BotoCoreError) as error:
        raise explain_s3_error(error, f"{SCHEME}{bucket}/{prefix}") from error


def split_location(location: str) -> tuple[str, str]:
    """Return bucket and key of s3://BUCKET/KEY, every character of the key unchanged."""
    bucket, _, key = location.removeprefix(SCHEME).partition("/")
    return bucket, key
