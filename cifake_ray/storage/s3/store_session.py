"""What botocore knows of a store: the credentials to sign with, and where its buckets answer."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import botocore.session
import urllib3
from botocore import UNSIGNED
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from cifake_ray.config import StoreConfig
from cifake_ray.storage.s3.answers import limit_answers
from cifake_ray.storage.s3.errors import MfaNeeded, explain_credentials

DEFAULT_REGION = "us-east-1"  # answers for every bucket with the region where it is


@dataclass(frozen=True)
class Address:
    """Where a bucket answers: addressing style, virtual host and region are botocore's choice."""

    pool: urllib3.HTTPConnectionPool
    region: str
    origin: str  # scheme://host:port
    list_path: str
    key_path: str  # an object's quoted key follows


class StoreSession:
    """botocore's session for one store. Safe to use from several threads."""

    def __init__(self, store: StoreConfig, max_in_flight: int) -> None:
        self._store, self._max_in_flight = store, max_in_flight
        self._session = botocore.session.Session(profile=store.s3_profile)
        self._credentials: Any = None
        self._addresses: dict[str, Address] = {}
        self._lock = threading.Lock()

    def find_credentials(self) -> ReadOnlyCredentials | None:
        """Return what to sign with now; None without signing. BotoCoreError when there is none."""
        if self._store.s3_anonymous:
            return None
        try:
            with self._lock:  # one thread asks; botocore locks the renewal itself
                if self._credentials is None:
                    chain = self._session.get_component("credential_provider")
                    chain.get_provider("assume-role")._prompter = _refuse_mfa
                    self._credentials = self._session.get_credentials()
            if self._credentials is None:
                raise NoCredentialsError
            frozen: ReadOnlyCredentials = self._credentials.get_frozen_credentials()
        except (ConfigParseError, NoCredentialsError, PartialCredentialsError, ProfileNotFound):
            raise  # of the configuration itself: explained as it is, see `explain_store_error`
        except (BotoCoreError, ClientError, OSError, ValueError, RuntimeError) as error:
            raise explain_credentials(error, self._session.profile or "default") from error
        return frozen

    def find_address(self, bucket: str, region: str | None = None) -> Address:
        """Return the address of a bucket; `region` changes it from now on."""
        address = self._addresses.get(bucket)
        if address is not None and region in (None, address.region):
            return address
        with self._lock:
            address = self._addresses.get(bucket)  # another thread may have been here
            if address is None or region not in (None, address.region):
                address = self._addresses[bucket] = self._make_address(bucket, region)
        return address

    def _make_address(self, bucket: str, region: str | None) -> Address:
        session = self._session
        region = region or self._store.s3_region or os.environ.get("AWS_REGION")
        region = region or session.get_config_variable("region") or DEFAULT_REGION
        bucket_url, key_url = _ask_urls(session, self._store.s3_endpoint_url, region, bucket)
        parts = urlsplit(key_url)
        origin = f"{parts.scheme}://{parts.netloc}"
        options: dict[str, Any] = {"maxsize": self._max_in_flight, "block": False}
        proxy = None
        if parts.scheme == "https":
            options["ca_certs"] = get_cert_path(session.get_config_variable("ca_bundle") or True)
            # Through a tunnel; an http:// proxy would get a URL, and normalise the key.
            proxy = get_environ_proxies(origin).get("https")
        pools = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
        pool = pools.connection_from_url(origin)
        limit_answers(pool)
        list_path = urlsplit(bucket_url).path or "/"
        return Address(pool, region, origin, list_path, parts.path.removesuffix("x"))


def _refuse_mfa(prompt: str) -> str:
    raise MfaNeeded(f"the role asks: {prompt.strip().rstrip(':')}")


def _ask_urls(
    session: botocore.session.Session, endpoint_url: str | None, region: str, bucket: str
) -> tuple[str, str]:
    """Return the URLs of a bucket and of its key `x` to which botocore would send requests."""
    urls: list[str] = []

    def answer(request: Any, **_: object) -> AWSResponse:
        urls.append(request.url)
        return AWSResponse(request.url, 200, {}, urllib3.HTTPResponse(io.BytesIO()))

    # Unsigned: the addresses need no credentials, and so cannot hold any.
    config = Config(signature_version=UNSIGNED)
    client = session.create_client(
        "s3", region_name=region, endpoint_url=endpoint_url, config=config
    )
    client.meta.events.register("before-send.s3", answer)  # nothing is sent
    client.head_bucket(Bucket=bucket)
    client.head_object(Bucket=bucket, Key="x")
    return urls[0], urls[1]
