"""The one place where a category of failure becomes a status and a body."""

import json
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from execgate.model.errors import (
    Conflict,
    ExecgateError,
    Exhausted,
    Internal,
    InvalidArgument,
    NotFound,
    StartFailed,
    TooLarge,
    Unavailable,
)

log = logging.getLogger(__name__)

_STATUS: dict[type[ExecgateError], int] = {
    InvalidArgument: 400,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    Exhausted: 429,
    Internal: 500,
    Unavailable: 503,
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def status_of(error: ExecgateError) -> int:
    """Return the HTTP status for a category."""
    if isinstance(error, StartFailed):
        # moby: 126 and 127 are the caller's mistake, all else is ours (docker-api.md: a detached start).
        return 400 if error.exit_code in (126, 127) else 500
    return next((status for category, status in _STATUS.items() if isinstance(error, category)), 500)


def json_error(status: int, message: str) -> web.Response:
    """Return Docker's error body. Lone surrogates from a decoded path are replaced: JSON is UTF-8 here."""
    body = json.dumps({"message": message}).encode()
    return web.Response(status=status, body=body, content_type="application/json")


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure in JSON, and keep tracebacks on this side."""
    try:
        return await handler(request)
    except ExecgateError as error:
        status = status_of(error)
        level = logging.ERROR if status >= 500 else logging.DEBUG
        log.log(level, "%s %s: %d %s%s", request.method, request.path, status, error, _hint(error))
        return json_error(status, error.message)
    except web.HTTPException as error:
        return _http_error(error)
    except ConnectionError:  # the client left; raised further it would be logged as a bug of ours
        return json_error(400, "the client is gone")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return json_error(500, "internal error; the service's log has the details")


def _hint(error: ExecgateError) -> str:
    return f" ({error.hint})" if error.hint else ""


def _http_error(error: web.HTTPException) -> web.Response:
    """Word aiohttp's own refusals as Docker would: to it, a wrong method is an unknown page."""
    if error.status in (404, 405):
        return json_error(404, "page not found")
    if error.status == 413:
        return json_error(413, "the request body is too large")
    return json_error(error.status, error.reason.lower())
