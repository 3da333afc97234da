"""Accounts as people have them: SSO, roles, programs that give credentials, who pays, gateways."""

from __future__ import annotations

import http.server
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from cifake_ray.config import StoreConfig
from cifake_ray.errors import ImageError, StorageError, UsageError
from cifake_ray.storage.io.files import read_bytes
from cifake_ray.storage.io.paths import resolve_path
from cifake_ray.storage.s3.client import connect
from cifake_ray.storage.s3.limits import DEFAULT_LIMITS
from cifake_ray.storage.s3.location import check_bucket
from cifake_ray.storage.s3.prefetch import read_objects

LIMITS = replace(DEFAULT_LIMITS, first_pause_s=0.01, max_pause_s=0.02)


class Store(http.server.ThreadingHTTPServer):
    """A stand-in for S3 below a path; the bucket `payer` asks for the header of who pays."""

    root = ""
    seen: list[str]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{self.root}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        url = urllib.parse.urlsplit(self.path)
        if not url.path.startswith(self.server.root + "/"):
            return self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        bucket, _, key = url.path.removeprefix(self.server.root + "/").partition("/")
        if bucket == "payer" and self.headers.get("x-amz-request-payer") != "requester":
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        if "list-type" in url.query:
            entry = "<Contents><Key>a.jpg</Key><Size>3</Size><ETag>&quot;e&quot;</ETag></Contents>"
            text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entry}</ListBucketResult>"
            return self.answer(200, text.encode())
        return self.answer(200, b"abc") if key == "a.jpg" else self.answer(404, b"")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with Store(("127.0.0.1", 0), Answer) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")


def write_profile(tmp_path: Path, text: str) -> None:
    (tmp_path / ".aws").mkdir(exist_ok=True)
    (tmp_path / ".aws" / "config").write_text(text)


def write_program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


GOOD = """echo '{"Version": 1, "AccessKeyId": "x", "SecretAccessKey": "y"}'"""
SSO = "sso_account_id = 1\nsso_role_name = r\nsso_region = eu-west-1\n"
START = "sso_start_url = https://x.awsapps.com/start\n"
SOURCE = "[profile base]\naws_access_key_id = x\naws_secret_access_key = y\n"
ROLE = "role_arn = arn:aws:iam::123456789012:role/r\n"


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (
            f"[profile corp]\nsso_session = s\n{SSO}"
            f"[sso-session s]\nsso_region = eu-west-1\n{START}",
            "aws sso login --profile corp",
        ),
        (f"[profile corp]\n{SSO}{START}", "aws sso login --profile corp"),
        ("[profile corp]\ncredential_process = /no/such/program", "/no/such/program: No such file"),
        ("[profile corp]\ncredential_process = /etc/passwd", "Permission denied); install it"),
        ("[profile corp]\ncredential_process = echo hello", "profile corp"),
        ("[profile corp]\ncredential_process = echo 'x", "profile corp"),
        ("[profile corp]\ncredential_process = false", "profile corp"),
        (
            f"[profile corp]\n{ROLE}mfa_serial = arn:aws:iam::1:mfa/me\n"
            f"source_profile = base\n{SOURCE}",
            "aws configure export-credentials --profile corp",
        ),
        (f"[profile corp]\n{ROLE}source_profile = gone\n", "profile corp"),
        (f"[profile corp]\n{ROLE}web_identity_token_file = /no/token\n", "/no/token: No such file"),
    ],
    ids=[
        *("sso-session", "sso", "no-program", "no-executable", "no-json", "no-words", "exit-code"),
        *("mfa", "no-source-profile", "no-token-file"),
    ],
)
def test_credentials_that_cannot_be_had_are_one_line_with_the_remedy(
    store: Store, tmp_path: Path, text: str, remedy: str
) -> None:
    write_profile(tmp_path, text)
    config = StoreConfig(s3_endpoint_url=store.endpoint, s3_profile="corp")
    with pytest.raises(StorageError) as error:
        check_bucket(config, "b", limits=LIMITS)
    said = str(error.value)
    assert remedy in said
    assert said.startswith("s3://b/: ")
    assert "\n" not in said
    assert "run the same command again" not in said


def test_credentials_that_fail_for_a_while_are_asked_for_again(
    store: Store, tmp_path: Path
) -> None:
    script = f"echo >> {tmp_path}/n; [ $(wc -l < {tmp_path}/n) -ge 3 ] || exit 1\n{GOOD}"
    program = write_program(tmp_path / "give", script)
    write_profile(tmp_path, f"[profile corp]\ncredential_process = {program}\n")
    config = StoreConfig(s3_endpoint_url=store.endpoint, s3_profile="corp")
    assert list(read_objects(config, ["s3://b/a.jpg"], [3], ['"e"'], LIMITS)) == [b"abc"]


def test_credentials_that_stay_away_end_the_run_and_are_no_rows(
    store: Store, tmp_path: Path
) -> None:
    write_profile(tmp_path, "[profile corp]\ncredential_process = false\n")
    config = StoreConfig(s3_endpoint_url=store.endpoint, s3_profile="corp")
    with pytest.raises(StorageError, match="profile corp"):
        list(read_objects(config, ["s3://b/a.jpg"], [3], ['"e"'], LIMITS))


def test_many_threads_ask_for_credentials_once(store: Store, tmp_path: Path) -> None:
    program = write_program(tmp_path / "give", f"echo >> {tmp_path}/n; sleep 0.2\n{GOOD}")
    write_profile(tmp_path, f"[profile corp]\ncredential_process = {program}\n")
    client = connect(StoreConfig(s3_endpoint_url=store.endpoint, s3_profile="corp"), LIMITS)
    with ThreadPoolExecutor(16) as threads:
        got = list(threads.map(lambda _: client.get_object("b", "a.jpg", None, 10), range(16)))
    assert got == [b"abc"] * 16
    assert (tmp_path / "n").read_text().count("\n") == 1


@pytest.mark.parametrize("root", ["", "/", "/storage/v1/s3", "/swift/v1/"])
@pytest.mark.parametrize("by", ["option", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_may_have_a_path(
    store: Store, keys: None, monkeypatch: pytest.MonkeyPatch, root: str, by: str
) -> None:
    store.root = root.rstrip("/")
    url = f"http://127.0.0.1:{store.server_port}{root}"
    config = StoreConfig(s3_endpoint_url=url if by == "option" else None)
    if by != "option":
        monkeypatch.setenv(by, url)
        S3FileSystem.clear_instance_cache()  # other tests' have their own endpoints
    check_bucket(config, "b", limits=LIMITS)
    assert list(read_objects(config, ["s3://b/a.jpg"], [3], ['"e"'], LIMITS)) == [b"abc"]
    assert read_bytes(resolve_path("s3://b/a.jpg", config)) == b"abc"
    assert all(re.match(rf"\w+ {store.root}/b[/?]", line) for line in store.seen), store.seen


@pytest.mark.parametrize("url", ["http://u:p@h/x", "http://h/x?y=1", "http://h/#x", "ftp://h/x"])
def test_an_endpoint_with_more_than_a_path_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--s3-endpoint-url") as error:
        StoreConfig(s3_endpoint_url=url)
    assert url not in str(error.value)


def test_whoever_asks_pays_when_told_to(store: Store, keys: None) -> None:
    config = StoreConfig(s3_endpoint_url=store.endpoint, s3_requester_pays=True)
    check_bucket(config, "payer", limits=LIMITS)
    assert list(read_objects(config, ["s3://payer/a.jpg"], [3], ['"e"'], LIMITS)) == [b"abc"]
    assert read_bytes(resolve_path("s3://payer/a.jpg", config)) == b"abc"
    plain = replace(config, s3_requester_pays=False)
    with pytest.raises(StorageError, match="--s3-requester-pays"):
        check_bucket(plain, "payer", limits=LIMITS)
    (row,) = read_objects(plain, ["s3://payer/a.jpg"], [3], ['"e"'], LIMITS)
    assert isinstance(row, ImageError)
    assert row.error == "denied"
