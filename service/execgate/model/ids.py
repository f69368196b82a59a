"""Identifiers. A container id and a session id may both be 64 hex digits: types keep them apart."""

import re
import secrets
from typing import NewType

ContainerId = NewType("ContainerId", str)
SessionId = NewType("SessionId", str)

_SESSION_ID = re.compile(r"[0-9a-f]{64}")


def new_session_id() -> SessionId:
    """Return 256 random bits as 64 hex digits, the form of Docker's own exec ids."""
    return SessionId(secrets.token_hex(32))


def parse_session_id(text: str) -> SessionId | None:
    """Return `text` as a session id, or None when it cannot be one.

    Every id from outside passes here before anything is looked up or any path is built from it.
    """
    return SessionId(text) if _SESSION_ID.fullmatch(text) else None
