"""A proxy on loopback in front of a real S3 server, which fails on demand.

Requests and answers pass byte for byte, the Host header of the signature included.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["status", "hang", "reset", "short", "drip"]
CODES = {403: "AccessDenied", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}
HOP = {"connection", "keep-alive", "transfer-encoding"}


@dataclass
class Fault:
    """What happens to the next requests that fit."""

    kind: Kind
    status: int = 503
    code: str | None = None  # of the XML; None: the usual one for the status
    times: float = 1  # so often; inf for ever
    method: str = "GET"
    path: str = ""  # a part of the raw target, the query included
    probability: float = 1.0
    headers: dict[str, str] = field(default_factory=dict)
    drip_s: float = 0.05  # between two bytes

    def fits(self, method: str, target: str) -> bool:
        return (
            self.times > 0
            and method == self.method
            and self.path in target
            and random.random() < self.probability
        )


@dataclass(frozen=True)
class Seen:
    method: str
    target: str
    headers: dict[str, str]
    at_s: float


class FaultProxy(ThreadingHTTPServer):
    """Listens at `endpoint`; `faults` is tried in order for each request."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.num_connections = 0
        self.num_in_flight = 0
        self.most_in_flight = 0
        self.delay_s = 0.0  # before each answer
        self.lock = threading.Lock()
        self.over = threading.Event()

    def fail(self, kind: Kind, **options: object) -> Fault:
        fault = Fault(kind, **options)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def requests(self, part: str = "") -> list[Seen]:
        return [seen for seen in self.seen if part in seen.target]

    def choose(self, method: str, target: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.fits(method, target):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def setup(self) -> None:
        super().setup()
        self.upstream: http.client.HTTPConnection | None = None
        with self.server.lock:
            self.server.num_connections += 1

    def finish(self) -> None:
        if self.upstream is not None:
            self.upstream.close()
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        target = self.requestline.split(" ")[1]
        with server.lock:
            server.seen.append(
                Seen(self.command, target, dict(self.headers.items()), time.monotonic())
            )
            server.num_in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.num_in_flight)
        try:
            fault = server.choose(self.command, target)
            server.over.wait(server.delay_s)
            if fault is None or fault.kind in ("short", "drip"):
                self._answer(*self._ask(target, body), fault)
            elif fault.kind == "status":
                code = fault.code or CODES.get(fault.status, "Error")
                xml = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
                self._answer(fault.status, list(fault.headers.items()), xml, None)
            else:
                if fault.kind == "hang":
                    server.over.wait(60)
                else:
                    linger = struct.pack("ii", 1, 0)  # closing sends RST
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
        finally:
            with server.lock:
                server.num_in_flight -= 1

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _ask(self, target: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The real answer, over a connection that is kept."""
        host, port = self.server.upstream.hostname, self.server.upstream.port
        for attempt in range(2):
            if self.upstream is None:
                self.upstream = http.client.HTTPConnection(str(host), port, timeout=30)
            try:
                self.upstream.putrequest(
                    self.command, target, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    self.upstream.putheader(name, value)
                self.upstream.endheaders(body or None)
                answer = self.upstream.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            except (http.client.HTTPException, OSError):
                self.upstream.close()
                self.upstream = None
                if attempt:
                    raise
        raise AssertionError

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault | None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP and not (
                name.lower() == "content-length" and self.command != "HEAD"
            ):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None:
            self.wfile.write(body)
        elif fault.kind == "short":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            for index in range(len(body)):
                self.wfile.write(body[index : index + 1])
                self.wfile.flush()
                if self.server.over.wait(fault.drip_s):
                    break


@contextmanager
def run_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy in front of `upstream`, until the block ends."""
    proxy = FaultProxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.over.set()
        proxy.shutdown()
        proxy.server_close()
        thread.join()
