"""A small S3 server in memory that tells the truth until it is told to lie.

A lie sees each request first: it answers it as it likes and returns True, changes the request and
returns False, or does nothing. `lies` are asked in their order. What no lie answers is answered
truly: GET, HEAD, PUT, copies, DELETE, POST ?delete, and ListObjectsV2.
"""

from __future__ import annotations

import hashlib
import http.server
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from xml.sax.saxutils import escape

Lie = Callable[["Request"], "bool | None"]


class LyingStore(http.server.ThreadingHTTPServer):
    """Listens at `endpoint`; `objects` are its only bucket, whatever a request calls it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}
        self.lies: list[Lie] = []
        self.seen: list[str] = []  # method and raw target
        self.lock = threading.Lock()
        self.over = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle of an answer does right."""


class Request(http.server.BaseHTTPRequestHandler):
    """One request, and what may be done with it."""

    protocol_version = "HTTP/1.1"
    server: LyingStore

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> bool:
        """Send an answer whose headers are true, unless given: `Content_Length` and so on."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **given}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if "Content-Length" in given and self.command != "HEAD":
            self.close_connection = True
        return True

    def answer_error(self, status: int, code: str, **headers: str) -> bool:
        """Send an error as S3 writes it."""
        body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>"
        return self.answer(status, body.encode(), **headers)

    def repeat(self, start: bytes, again: bytes, every_s: float = 0.0) -> bool:
        """Send raw bytes, then others again and again until the client goes away."""
        self.close_connection = True
        self.wfile.write(start)
        while not self.server.over.wait(every_s):
            self.wfile.write(again)
        return True

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urllib.parse.urlsplit(self.requestline.split(" ")[1])
        self.bucket, _, key = parts.path[1:].partition("/")
        self.key = urllib.parse.unquote(key)
        self.query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        with self.server.lock:
            self.server.seen.append(f"{self.command} {self.requestline.split(' ')[1]}")
        if not any(lie(self) for lie in self.server.lies):
            self.tell_truth()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def tell_truth(self) -> bool:
        """Answer as S3 does."""
        objects, key = self.server.objects, self.key
        with self.server.lock:
            data = objects.get(key)
            if self.command == "PUT":
                if self.headers.get("If-None-Match") and data is not None:
                    return self.answer_error(412, "PreconditionFailed")
                if source := self.headers.get("x-amz-copy-source"):
                    objects[key] = objects[source.partition("/")[2]]
                    return self.answer(200, b"<CopyObjectResult><ETag>e</ETag></CopyObjectResult>")
                objects[key] = self.body
                return self.answer(200, ETag=make_etag(self.body))
            if self.command == "DELETE":
                objects.pop(key, None)
                return self.answer(204)
            if self.command == "POST":
                for part in self.body.decode().split("<Key>")[1:]:
                    objects.pop(part.partition("</Key>")[0], None)
                return self.answer(200, b"<DeleteResult/>")
            if not key:
                return self.answer(200, self.make_page())
        if data is None:
            return self.answer_error(404, "NoSuchKey")
        etag = make_etag(data)
        if self.headers.get("If-Match", etag) != etag:
            return self.answer_error(412, "PreconditionFailed")
        if text := self.headers.get("Range"):
            first, last = (int(n) for n in text.removeprefix("bytes=").split("-"))
            part = data[first : last + 1]
            place = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            return self.answer(206, part, ETag=etag, Content_Range=place)
        return self.answer(200, data, ETag=etag)

    def make_page(self) -> bytes:
        """The page of ListObjectsV2 that was asked for."""
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        after = self.query.get("continuation-token") or self.query.get("start-after", "")
        keys = sorted(k for k in self.server.objects if k.startswith(prefix) and k > after)
        folders: list[str] = []
        if delimiter:
            below = {k: k[len(prefix) :].partition(delimiter) for k in keys}
            folders = sorted({prefix + name + "/" for name, slash, _ in below.values() if slash})
            keys = [k for k in keys if not below[k][1]]
        size = int(self.query.get("max-keys", "1000"))
        page = [(k, self.server.objects[k]) for k in keys[:size]]
        return make_xml(
            [(key, str(len(data)), make_etag(data)) for key, data in page],
            token=keys[size - 1] if len(keys) > size else None,
            folders=folders,
        )


def make_etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def make_xml(
    entries: list[tuple[str, str, str]],
    token: str | None = None,
    folders: list[str] | None = None,
    is_truncated: str | None = None,
) -> bytes:
    """A page of keys with their sizes and etags."""
    contents = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>{escape(etag)}</ETag>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for key, size, etag in entries
    )
    contents += "".join(
        f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
        for folder in folders or ()
    )
    truncated = is_truncated or ("false" if token is None else "true")
    following = "" if token is None else f"<NextContinuationToken>{token}</NextContinuationToken>"
    return (
        "<ListBucketResult>"
        f"<IsTruncated>{truncated}</IsTruncated>{following}{contents}</ListBucketResult>"
    ).encode()


@contextmanager
def run_lying_store() -> Iterator[LyingStore]:
    """A store without a lie, until the block ends."""
    store = LyingStore()
    thread = threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.over.set()
        store.shutdown()
        store.server_close()
        thread.join()
