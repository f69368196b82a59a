"""Who sends a request: the peer of its connection, or whoever its bearer token stands for.

A token that is sent decides: a client that shows one is what it says and nothing else, and one that is void is refused
even where the connection alone would have been enough. Without one it is the connection's peer; where that has none,
on plain TCP, nobody is let in.
"""

import logging

from aiohttp import web

from execgate.gate.access import Access, Gate
from execgate.gate.tokens import Tokens
from execgate.http.errors import Handler
from execgate.http.front import front_of
from execgate.model.errors import Unauthenticated
from execgate.model.principal import Principal

log = logging.getLogger(__name__)

_ACCESS = web.RequestKey("access", Access)
_BEARER = "bearer "


class Doorkeeper:
    """Gives each request the access of its sender."""

    def __init__(self, gate: Gate, tokens: Tokens) -> None:
        self._gate = gate
        self._tokens = tokens

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let nobody in whom nobody knows."""
        request[_ACCESS] = self._gate.access(self._principal(request))
        return await handler(request)

    def _principal(self, request: web.Request) -> Principal:
        headers = request.headers.getall("Authorization", [])
        if not headers:
            if (peer := front_of(request).peer) is None:
                raise Unauthenticated("a bearer token is needed here: Authorization: Bearer TOKEN")
            return peer
        if len(headers) > 1 or not headers[0].lower().startswith(_BEARER):
            raise Unauthenticated("the only authorization understood here is one bearer token")
        principal = self._tokens.principal(headers[0][len(_BEARER) :].strip())
        if principal is None:
            log.info("%s %s: a token that is unknown, revoked or expired", request.method, request.path)
            raise Unauthenticated("the token is unknown, revoked or expired")
        return principal


def access_of(request: web.Request) -> Access:
    """Return what the sender of a request may do."""
    return request[_ACCESS]
