"""Every key of a bucket once, by many listings at the same time.

A listing is 1,000 keys a page, one page after another. While threads are idle, a
listing that is not at its end gives the keys behind a branch of its names to them: at
`train/FAKE/0999.jpg` it finds out, by listings of one key, that there are keys behind
`train/FAKE/0...`, and hands over `train/FAKE/1`, `train/FAKE/2` and so on, or, where that folder
ends, `train/R`. So it needs to know nothing of the names, and memory does not grow with them.

Two orders of keys are in use: that of the bytes (AWS), and folder by folder (SeaweedFS). In both,
keys with the same beginning stand together, which is all that is relied on; a listing in neither
order is not divided.

A listing may end early. The ranges that are left can then be listed elsewhere; one that was begun
goes on behind its last key.
"""

from __future__ import annotations

import operator
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from botocore.exceptions import BotoCoreError

from cifake_ray.storage.s3.errors import S3Error
from cifake_ray.storage.s3.page import Page

PAGE_KEYS = 1000
MAX_KEY_BYTES = 1024
LAST_CHAR = "\U0010ffff"
MAX_EMPTY_PAGES = 100  # one after another; a store may scan what was deleted
WAKE_S = 0.2  # how soon a thread that waits for room sees that all is over

Query: TypeAlias = dict[str, str]


class KeyRange(NamedTuple):
    """The keys with a prefix that come after `after`; "" is before all."""

    prefix: str
    after: str = ""


class _Watch:
    """Notices pages that come again, and disorder where a listing was divided by its order.

    A page is compared with the one after 1, 2, 4, 8 ... pages, so any circle is found, and nothing
    is remembered of a listing however long.
    """

    def __init__(self, after: str) -> None:
        self.num_pages = 0
        self.num_empty = 0
        self.kept: tuple[str | None, str | None] = (None, None)  # last key and token of a page
        self.last_key = after or None

    def check(self, page: Page, *, is_divided: bool) -> None:
        """Raise S3Error when this page cannot be the one that follows."""
        keys = page.keys
        self.num_empty = 0 if keys else self.num_empty + 1
        last_key = keys[-1] if keys else None
        if (last_key and last_key == self.kept[0]) or (page.token and page.token == self.kept[1]):
            raise _make_error("the same page comes again")
        if self.num_empty > MAX_EMPTY_PAGES:
            raise _make_error("pages without a key do not end")
        keys = [self.last_key, *keys] if self.last_key else keys
        if not _is_ascending(keys):
            if len(set(keys)) < len(keys):
                raise _make_error("it has a key twice")
            if is_divided and not _is_in_order(keys):
                raise _make_error("its keys are in no order")
        self.num_pages += 1
        if self.num_pages & (self.num_pages - 1) == 0:
            self.kept = last_key, page.token
        self.last_key = last_key or self.last_key


def _make_error(detail: str) -> S3Error:
    return S3Error(0, "", f"what it lists is not right: {detail}")


class _UnknownOrderError(Exception):
    """The keys behind a branch look like those of the branch."""


class KeyLister:
    """Lists all keys of some ranges with several threads, or about `max_keys` of them.

    `ask` answers a query of ListObjectsV2 and may raise S3Error or BotoCoreError; the first such
    error ends the listing. `left` are the ranges that were not listed, once all pages are read.
    """

    def __init__(
        self,
        ask: Callable[[Query], Page],
        num_threads: int,
        page_keys: int = PAGE_KEYS,
        max_keys: int | None = None,
    ) -> None:
        self.ask = ask
        self.num_threads = num_threads
        self.page_keys = page_keys
        self.max_keys = max_keys
        self.num_listed = 0
        self.left: list[KeyRange] = []
        self.todo: deque[KeyRange] = deque()
        self.num_busy = 0
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.failure: Exception | None = None
        # None: a thread is through.
        self.pages: queue.Queue[Page | None] = queue.Queue(2 * num_threads)

    def list_pages(self, ranges: Iterable[KeyRange]) -> Iterator[Page]:
        """Yield pages in no particular order, none without a key."""
        self.todo.extend(ranges)
        # Daemons: a server that hangs must not keep the process from ending.
        for _ in range(self.num_threads):
            threading.Thread(target=self._work, name="list", daemon=True).start()
        num_running = self.num_threads
        try:
            while num_running:
                page = self.pages.get()
                if page is None:
                    num_running -= 1
                elif not self.stop.is_set():
                    yield page
                if self.stop.is_set():
                    raise self.failure or RuntimeError("a thread that lists ended unexpectedly")
            self.left += self.todo
        finally:
            self.stop.set()
            with self.changed:
                self.changed.notify_all()

    def _work(self) -> None:
        is_well = False
        try:
            while (todo := self._take()) is not None:
                self._list_range(todo)
                with self.changed:
                    self.num_busy -= 1
                    self.changed.notify_all()
            is_well = True
        except (S3Error, BotoCoreError) as error:
            self.failure = self.failure or error
        finally:
            if not is_well:
                self.stop.set()
                with self.changed:
                    self.changed.notify_all()
            self._put(None)

    def _take(self) -> KeyRange | None:
        """Return the next range; None when all are listed, or enough keys."""
        with self.changed:
            while not self.todo and self.num_busy and not self.stop.is_set():
                self.changed.wait()
            if self.stop.is_set() or not self.todo or self._is_enough:
                return None
            self.num_busy += 1
            return self.todo.popleft()

    def _put(self, page: Page | None) -> None:
        while True:
            try:
                return self.pages.put(page, timeout=WAKE_S)
            except queue.Full:
                if self.stop.is_set():  # the consumer may be gone
                    return None

    @property
    def _is_enough(self) -> bool:
        return self.max_keys is not None and self.num_listed >= self.max_keys

    @property
    def _num_idle(self) -> int:
        return self.num_threads - self.num_busy - len(self.todo)

    def _list_range(self, todo: KeyRange) -> None:
        block = todo.prefix  # shrinks when what lies behind it is given away
        query = self._make_query(todo, self.page_keys)
        pages_until_split, wait_pages = 1, 1
        watch = _Watch(todo.after)
        while not self.stop.is_set():
            page = self._ask(todo, query)
            watch.check(page, is_divided=block != todo.prefix or bool(todo.after))
            if block != todo.prefix:
                page = _cut_page(page, block)
            keys = page.keys
            if keys:
                with self.changed:
                    self.num_listed += len(keys)
                self._put(page)
            if page.token is None:
                return
            if keys and self._is_enough and _is_text(keys[-1]) and _is_in_order(keys):
                self.left.append(KeyRange(block, keys[-1]))
                return
            query.pop("start-after", None)
            query["continuation-token"] = page.token
            pages_until_split -= 1
            if keys and pages_until_split <= 0 and self._num_idle > 0:
                narrower = self._split(block, keys)
                wait_pages = 1 if narrower else 2 * wait_pages
                pages_until_split = wait_pages
                block = narrower or block

    def _ask(self, todo: KeyRange, query: Query) -> Page:
        page = self.ask(query)
        # What is between two keys of a prefix has it, too.
        for key in (min(page.keys), max(page.keys)) if page.keys else ():
            if not key.startswith(todo.prefix):
                raise _make_error(f"{key!r} is not below {todo.prefix!r}")
        return page

    def _make_query(self, todo: KeyRange, max_keys: int) -> Query:
        query = {"prefix": todo.prefix, "max-keys": str(max_keys), "encoding-type": "url"}
        if todo.after:
            query["start-after"] = todo.after
        return query

    def _probe(self, todo: KeyRange) -> str | None:
        """Return the first key of a range."""
        keys = self._ask(todo, self._make_query(todo, 1)).keys
        return keys[0] if keys else None

    def _split(self, block: str, keys: list[str]) -> str | None:
        """Give away what lies behind the last key that was listed.

        Returns the narrower block that is left to do, or None if there was nothing to give.
        """
        last = keys[-1]
        if not _is_text(last) or not _is_in_order(keys):
            return None
        ranges: list[KeyRange] = []
        try:
            position = self._find_branch(block, last)
            if position is None:
                return None
            stem, narrower = last[:position], last[: position + 1]
            branch = narrower
            while (key := self._find_behind(stem, branch)) is not None:
                if len(ranges) >= self.num_threads:
                    ranges.append(KeyRange(stem, branch + LAST_CHAR))
                    break
                branch = key[: position + 1]
                ranges.append(KeyRange(branch))
        except _UnknownOrderError:
            return None
        with self.changed:
            self.todo.extend(ranges)
            self.changed.notify_all()
        return narrower

    def _find_branch(self, block: str, last: str) -> int | None:
        """Return the first position behind `block` where other keys follow `last`.

        The later the position, the more lies behind it, so it is found by halving.
        """
        low, high = len(block), len(last) - 1
        while high >= low and len((last[: high + 1] + LAST_CHAR).encode()) > MAX_KEY_BYTES:
            high -= 1
        if high < low or not self._has_more(block, last[: high + 1]):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._has_more(block, last[: middle + 1]):
                high = middle
            else:
                low = middle + 1
        return low

    def _has_more(self, block: str, branch: str) -> bool:
        return self._find_behind(block, branch) is not None

    def _find_behind(self, stem: str, branch: str) -> str | None:
        """Return the first key that begins with `stem` behind all that begin with `branch`."""
        key = self._probe(KeyRange(stem, branch + LAST_CHAR))
        if key is None:
            return None
        if len(key) <= len(stem) or key.startswith(branch) or not _is_text(key):
            raise _UnknownOrderError  # the last of all characters is in a key, or it is no order
        return key


def _cut_page(page: Page, block: str) -> Page:
    """Return what a page has of a block whose keys come first; without a token if more follows."""
    num_keys = next((n for n, key in enumerate(page.keys) if not key.startswith(block)), None)
    if num_keys is None:
        return page
    return Page(page.keys[:num_keys], page.sizes[:num_keys], page.etags[:num_keys], None)


def _is_text(key: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in key)


def _is_ascending(keys: list[str]) -> bool:
    return all(map(operator.lt, keys, keys[1:]))


def _is_in_order(keys: list[str]) -> bool:
    """Return whether keys are in one of the two orders; code points sort as their UTF-8 bytes."""
    return keys == sorted(keys) or keys == sorted(keys, key=lambda key: key.split("/"))
