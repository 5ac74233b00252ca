"""`GET /openapi.json` and `GET /docs`: this server's description for machines, and for people."""

from __future__ import annotations

import asyncio
from html import escape

import orjson
from starlette.requests import Request
from starlette.responses import Response

from embedstream.shared.settings import Settings

_ADDRESS = "(address)"
_NOTHING_FROM_OUTSIDE = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Description:
    """The endpoints for machines and for people; what they say is made once, when it is first asked for.

    Args:
        settings: as for `openapi.document`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._json = self._page = b""

    async def machines(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        del request
        await self._make()
        return Response(self._json, media_type="application/json")

    async def people(self, request: Request) -> Response:
        """`GET /docs`."""
        await self._make()
        # The way that this client has come; the server may stand behind another.
        address = escape(str(request.base_url).rstrip("/")).encode()
        page = self._page.replace(_ADDRESS.encode(), address)
        return Response(page, media_type="text/html", headers={"content-security-policy": _NOTHING_FROM_OUTSIDE})

    async def _make(self) -> None:
        if not self._json:  # in a thread: it takes some ten milliseconds
            self._json, self._page = await asyncio.to_thread(self._made)

    def _made(self) -> tuple[bytes, bytes]:
        # Brought by the first who asks: a process that only embeds starts without it.
        from .docs_page import page
        from .openapi import document

        described = document(self._settings)
        return orjson.dumps(described), page(described, _ADDRESS).encode()
