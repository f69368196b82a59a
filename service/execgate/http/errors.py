"""The one place where a category of failure becomes a status and a body."""

import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from execgate.http.dialects import Dialect, dialect_of
from execgate.model.errors import (
    Conflict,
    ExecgateError,
    Exhausted,
    Forbidden,
    Internal,
    InvalidArgument,
    NotFound,
    StartFailed,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from execgate.oci.text import shown

log = logging.getLogger(__name__)

_STATUS: dict[type[ExecgateError], int] = {
    InvalidArgument: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    Exhausted: 429,
    Internal: 500,
    Unavailable: 503,
}

_TOLD = (401, 403)
"""What an operator is asked about, and has the hint for."""

_CHALLENGE = 'Bearer realm="execgate"'  # RFC 6750, 3

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def status_of(error: ExecgateError) -> int:
    """Return the HTTP status for a category."""
    if isinstance(error, StartFailed):
        # moby: 126 and 127 are the caller's mistake, all else is ours (docker-api.md: a detached start).
        return 400 if error.exit_code in (126, 127) else 500
    return next((status for category, status in _STATUS.items() if isinstance(error, category)), 500)


def error_json(dialect: Dialect, status: int, message: str) -> bytes:
    """Return the body of an error in the words of an API.

    Clients print it, and it quotes what it is about: nothing in it speaks to a terminal.
    """
    return json.dumps(dialect.error_body(status, *dialect.reworded(shown(message, len(message))))).encode()


def json_error(dialect: Dialect, status: int, message: str) -> web.Response:
    """Return an error as an answer."""
    return web.Response(status=status, body=error_json(dialect, status, message), content_type="application/json")


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure in JSON, and keep tracebacks on this side."""
    dialect = dialect_of(request.path)
    try:
        return await handler(request)
    except ExecgateError as error:
        status = status_of(error)
        level = logging.ERROR if status >= 500 else logging.INFO if status in _TOLD else logging.DEBUG
        log.log(level, "%s %s: %d %s%s", request.method, request.path, status, error, _hint(error))
        response = json_error(dialect, status, error.message)
        if isinstance(error, Exhausted):
            response.headers["Retry-After"] = str(error.retry_after)
        if isinstance(error, Unauthenticated):
            response.headers["WWW-Authenticate"] = _CHALLENGE
        return response
    except web.HTTPException as error:
        return _http_error(dialect, error)
    except ConnectionError:  # the client left; raised further it would be logged as a bug of ours
        return json_error(dialect, 400, "the client is gone")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return json_error(dialect, 500, "internal error; the service's log has the details")


def _hint(error: ExecgateError) -> str:
    return f" ({error.hint})" if error.hint else ""


def _http_error(dialect: Dialect, error: web.HTTPException) -> web.Response:
    """Word aiohttp's own refusals as Docker would: to it, a wrong method is an unknown page."""
    if error.status in (404, 405):
        return json_error(dialect, 404, "page not found")
    if error.status == 413:
        return json_error(dialect, 413, "the request body is too large")
    return json_error(dialect, error.status, error.reason.lower())
