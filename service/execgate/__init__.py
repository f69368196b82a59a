"""execgate: the Docker exec API for the OCI containers of a host.

A program takes what it needs from here: `open_engine` for an engine of its own, `Client` for a running service, and
the words that both speak. Each name is imported when it is first used, so that `import execgate` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from execgate.client import Client, ContainerInfo, Output, RunAnswer, SessionEnd, SessionInfo, Stream
    from execgate.config import Config
    from execgate.engine import Engine, open_engine
    from execgate.http.certificates import TlsFiles
    from execgate.model.config import ConsoleSize, ExecConfig, OnDisconnect
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
    from execgate.model.options import ExecOptions
    from execgate.model.session import ByteCounts, ExecSession, ExitSource, ExitStatus, SessionState
    from execgate.sessions.local import LocalStream
    from execgate.sessions.oneshot import RunResult

__version__ = "0.1.0"

__all__ = [
    "ByteCounts",
    "Client",
    "Config",
    "Conflict",
    "ConsoleSize",
    "ContainerInfo",
    "Engine",
    "ExecConfig",
    "ExecOptions",
    "ExecSession",
    "ExecgateError",
    "Exhausted",
    "ExitSource",
    "ExitStatus",
    "Forbidden",
    "Internal",
    "InvalidArgument",
    "LocalStream",
    "NotFound",
    "OnDisconnect",
    "Output",
    "RunAnswer",
    "RunResult",
    "SessionEnd",
    "SessionInfo",
    "SessionState",
    "StartFailed",
    "Stream",
    "TlsFiles",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "open_engine",
]

_MODULES = {
    "client": ("Client", "ContainerInfo", "Output", "RunAnswer", "SessionEnd", "SessionInfo", "Stream"),
    "config": ("Config",),
    "engine": ("Engine", "open_engine"),
    "http.certificates": ("TlsFiles",),
    "model.config": ("ConsoleSize", "ExecConfig", "OnDisconnect"),
    "model.errors": (
        "Conflict",
        "ExecgateError",
        "Exhausted",
        "Forbidden",
        "Internal",
        "InvalidArgument",
        "NotFound",
        "StartFailed",
        "TooLarge",
        "Unauthenticated",
        "Unavailable",
    ),
    "model.options": ("ExecOptions",),
    "model.session": ("ByteCounts", "ExecSession", "ExitSource", "ExitStatus", "SessionState"),
    "sessions.local": ("LocalStream",),
    "sessions.oneshot": ("RunResult",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # to a type checker a name that is not imported above does not exist

    def __getattr__(name: str) -> Any:
        """Import what is asked for (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
