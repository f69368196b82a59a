"""Why a start failed: the runtime's log lines to one message, and the message to 126, 127 or 128.

The rule is moby's (daemon/errors.go, setExitCodeFromError), because the docker CLI, docker-py and shell scripts read
these numbers: the shell's 126 for "found, cannot be executed", 127 for "not found", 128 for all else.
"""

import json
import re

from execgate.model.errors import StartFailed

LOG_LIMIT = 64 * 1024
"""Bytes of a runtime's log that are read, from its end: the last error is the one that counts."""

MESSAGE_LIMIT = 4096
"""Characters of a runtime's message that a client gets."""

# crun says "open executable: Operation not permitted" of a directory, where runc says "permission denied".
_CANNOT_EXECUTE = ("permission denied", "is a directory", "open executable: operation not permitted")
_NOT_FOUND = ("executable file not found", "no such file or directory", "not a directory")
# C0 but tab and newline, DEL and C1: a runtime quotes names that a hostile container chose. And lone surrogates, which
# no record could hold.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def start_failure(text: str) -> StartFailed:
    """Return the error for a runtime's own `text`, with the exit code that belongs to it."""
    message = f"OCI runtime exec failed: {printable(text) or 'the runtime gave no reason'}"
    lowered = message.lower()
    if any(words in lowered for words in _CANNOT_EXECUTE):
        # The docker CLI looks for these words to exit with 126 itself.
        suffix = "" if "permission denied" in lowered else ": permission denied"
        return StartFailed(message + suffix, 126)
    if any(words in lowered for words in _NOT_FOUND):
        return StartFailed(message, 127)
    return StartFailed(message, 128)


def last_error(log: bytes) -> str:
    """Return the message of the last error in a runtime's JSON log (`--log-format=json`), or "".

    Both runtimes write one object a line with `level` and `msg`. Lines that are no such thing are passed over.
    """
    for line in reversed(log.splitlines()):
        entry = _entry(line)
        if entry.get("level") in ("error", "fatal") and isinstance(entry.get("msg"), str):
            return str(entry["msg"])
    return ""


def _entry(line: bytes) -> dict[str, object]:
    try:
        entry = json.loads(line.decode(errors="replace"))  # crun quotes bytes as they are
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def printable(text: str) -> str:
    """Return `text` bounded, on one line, and without anything a terminal would obey."""
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.strip()[: 2 * MESSAGE_LIMIT])
    return " ".join(text.split())[:MESSAGE_LIMIT]
