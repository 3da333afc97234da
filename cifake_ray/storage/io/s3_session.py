"""The HTTP session of s3fs, which would follow a redirect to any host.

It would take the body and the session token along. Where a bucket is in another region,
botocore itself asks there.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class StayingSession(AIOHTTPSession):  # type: ignore[misc]
    """Sends requests to the host that they name, and to no other."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)
        return SimpleNamespace(request=partial(session.request, allow_redirects=False))
