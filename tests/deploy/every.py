"""One test for a property that many cases must have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any


def for_every(cases: Iterable[Any]) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make a check of one case a test of all of them, which fails with every case that fails."""

    def decorate(check: Callable[[Any], None]) -> Callable[[], None]:
        @wraps(check)
        def test() -> None:
            tried, failed = 0, []
            for case in cases:
                tried += 1
                try:
                    check(case)
                except Exception as error:
                    failed.append(f"{case}: {type(error).__name__}: {error}")
            assert tried, "there is no case"
            assert not failed, "\n".join(failed)

        del test.__wrapped__  # type: ignore[attr-defined]  # pytest would look for its fixtures
        return test

    return decorate
