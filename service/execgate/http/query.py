"""Query parameters."""

from aiohttp import web


def flag(request: web.Request, key: str) -> bool:
    """Read a boolean as moby does: anything but these is true."""
    return request.query.get(key, "").lower() not in ("", "0", "no", "false", "none")
