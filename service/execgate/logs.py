"""Logs that a person can read, or a machine. Control characters never reach a terminal."""

import json
import logging
import re
import sys
import time

# C0 but newline and tab (tracebacks have them), DEL and C1; other ends of lines, and what turns the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO execgate.sessions.manager: message`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802, ARG002
        """See logging.Formatter: RFC 3339, UTC, milliseconds."""
        return timestamp(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """See logging.Formatter: one line, or a client could forge others; tracebacks keep theirs."""
        return super().formatMessage(record).replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        entry = {
            "time": timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def timestamp(record: logging.LogRecord) -> str:
    """Return a record's time as RFC 3339 in UTC with milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def set_up(level: str, form: str) -> None:
    """Log to stderr, from `level` on, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
