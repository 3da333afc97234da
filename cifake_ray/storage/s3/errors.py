"""Why a request to S3 failed: the parsed answer, and one line for the user."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    LoginError,
    MetadataRetrievalError,
    ParamValidationError,
    SSOError,
    TokenRetrievalError,
)

from cifake_ray.errors import StorageError
from cifake_ray.storage.io.paths import explain_store_error

THROTTLED = {"SlowDown", "ServiceUnavailable", "TooManyRequests", "RequestLimitExceeded"}
MOVED = "moved"  # our own code: the bucket is in another region, where the next attempt goes
STALE_CREDENTIALS = {"ExpiredToken", "RequestTimeout"}  # signed anew with the next attempt
BAD_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}
MAX_DETAIL_CHARS = 200

BREAKS = {  # urllib3's names of what broke a connection
    "ConnectTimeoutError": "no connection in time",
    "ReadTimeoutError": "no answer in time",
    "NewConnectionError": "no connection",
    "NameResolutionError": "the host name is not known",
    "ProtocolError": "the connection broke",
    "IncompleteRead": "the answer ended early",
    "SSLError": "no trusted TLS connection",
}


class S3Error(Exception):
    """A request failed for good: `status` and `code` of the answer; 0 and "" without one."""

    def __init__(self, status: int, code: str, detail: str, pause_s: float = 0.0) -> None:
        detail = " ".join(detail.split())[:MAX_DETAIL_CHARS]  # may be of the store
        super().__init__(f"{code or status or 'no answer'}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.pause_s = pause_s  # what the store asks to wait

    @property
    def is_throttled(self) -> bool:
        return self.status in (429, 503) or self.code in THROTTLED

    @property
    def is_transient(self) -> bool:
        return (
            self.is_throttled
            or self.status in (0, 408)
            or 200 <= self.status < 300  # of another kind than can be right
            or (self.status >= 500 and self.status != 501)
            or self.code in STALE_CREDENTIALS
        )


class TooLarge(Exception):
    """The body has more bytes than were asked for."""


class CredentialsError(BotoCoreError):  # type: ignore[misc]
    """The AWS chain names credentials, but they cannot be had: every request would fail alike."""

    fmt = "no AWS credentials from profile {profile} ({reason}); {remedy}"
    pause_s = 0.0
    is_throttled = False
    code = ""

    def __init__(self, *, is_transient: bool, **words: str) -> None:
        super().__init__(**words)
        self.is_transient = is_transient


class MfaNeeded(ValueError):
    """A role asks for a code, which nobody can type into a worker."""


NO_CREDENTIALS_NOW = (  # a service that is asked over the network did not answer well
    ConnectionError,
    HTTPClientError,
    MetadataRetrievalError,
    CredentialRetrievalError,
    RuntimeError,  # botocore's: "refreshed, but still expired"
)


def explain_credentials(error: Exception, profile: str) -> CredentialsError:
    """Return why the credentials of a profile cannot be had, with the remedy."""
    is_transient = isinstance(error, NO_CREDENTIALS_NOW)
    reason = " ".join(str(error).split())[:MAX_DETAIL_CHARS] or type(error).__name__
    remedy = f"check profile {profile} in the AWS configuration"
    if isinstance(error, SSOError | TokenRetrievalError):
        remedy = f"run `aws sso login --profile {profile}`"
    elif isinstance(error, LoginError):
        remedy = f"run `aws login --profile {profile}`"
    elif isinstance(error, MfaNeeded):
        remedy = (
            f'run `eval "$(aws configure export-credentials --profile {profile} --format env)"`,'
            " which asks for it, and leave --s3-profile and AWS_PROFILE out"
        )
    elif isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        is_transient = status >= 500 or "Throttl" in reason
        remedy = "check the role and who may assume it"
    elif isinstance(error, OSError):
        reason = f"{error.filename}: {error.strerror}" if error.filename else reason
        remedy = f"install it, or fix profile {profile} in the AWS configuration"
    elif is_transient:
        remedy = f"check the network and profile {profile} in the AWS configuration"
    return CredentialsError(
        is_transient=is_transient, profile=profile, reason=reason, remedy=remedy
    )


def parse_xml(data: bytes) -> ET.Element:
    """Parse XML of bounded expansion. ValueError when it is none."""
    try:
        return ET.fromstring(data)
    except (ET.ParseError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise ValueError(f"not XML ({error})") from error


def parse_error_body(data: bytes) -> dict[str, str]:
    """Return the fields of an XML error, such as Code, Message and Region; {} if it is none."""
    try:
        root = parse_xml(data)
    except ValueError:
        return {}
    return {
        child.tag.rpartition("}")[2]: " ".join((child.text or "").split())[:MAX_DETAIL_CHARS]
        for child in root
    }


def describe_break(error: Exception) -> str:
    """Return one short line on what broke a connection."""
    name = type(error).__name__
    return BREAKS.get(name) or " ".join(f"{name}: {error}".split())[:MAX_DETAIL_CHARS]


def explain_s3_error(error: S3Error | BotoCoreError, place: str) -> StorageError:
    """Return a one-line error for a request that failed for good: path, reason, remedy."""
    if isinstance(error, ParamValidationError):
        return StorageError(f"{place}: not a valid name of a bucket; give s3://BUCKET/PREFIX")
    if isinstance(error, CredentialsError):
        return StorageError(f"{place}: {error}")
    if isinstance(error, BotoCoreError):
        return explain_store_error(error, place)
    reason, remedy = error.detail or str(error), "run the same command again"
    if error.code == "NoSuchBucket":
        reason, remedy = "no such bucket", "check its name and --s3-endpoint-url"
    elif error.code in BAD_CREDENTIALS or error.status == 401:
        reason = f"the store does not accept the credentials ({error.code or error.status})"
        remedy = "check the AWS chain (variables, --s3-profile, a role)"
    elif error.code == "RequestTimeTooSkewed":
        reason = "the store says that the clock of this computer is wrong"
        remedy = "set the clock and run the same command again"
    elif error.status == 403:
        reason = f"access denied ({error.code or error.status})"
        remedy = (
            "the credentials need s3:ListBucket and s3:GetObject; a public bucket needs"
            " --s3-anonymous, one whose readers pay --s3-requester-pays"
        )
    elif error.is_throttled:
        reason = f"the store kept asking to slow down ({error.code or error.status})"
        remedy = "run the same command again later"
    elif error.status == 0:
        reason = f"no usable answer from the store ({error.detail})"
        remedy = "check --s3-endpoint-url and the network"
    elif 300 <= error.status < 400:
        remedy = "check --s3-region and --s3-endpoint-url"
    return StorageError(f"{place}: {reason}; {remedy}")
