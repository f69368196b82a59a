"""Who serves a state directory: a small file, for `execgate reload` and for whoever looks after the service."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from execgate import __version__
from execgate.model.errors import Unavailable
from execgate.model.process import ProcessIdentity
from execgate.runtime import pidfd

_NAME = "service.json"


@dataclass(frozen=True, slots=True)
class Status:
    """The keeper and the worker that serve; `failure` is why the last reload did not come about."""

    keeper: ProcessIdentity
    worker: ProcessIdentity
    version: str
    failure: str = ""
    failures: int = 0


def write_status(state_dir: Path, failure: str = "") -> None:
    """Note that this process serves, or that a reload to replace it has failed. Unavailable."""
    before = read_status(state_dir)
    keeper, worker = pidfd.identify(os.getppid()), pidfd.identify(os.getpid())
    if keeper is None or worker is None:
        raise Unavailable("this process is not to be found in /proc")
    failures = before.failures if before is not None else 0
    status = Status(keeper, worker, __version__, failure, failures + bool(failure))
    temporary = state_dir / f"{_NAME}.new"
    try:
        temporary.write_text(json.dumps(asdict(status)) + "\n", encoding="utf-8")
        temporary.replace(state_dir / _NAME)
    except OSError as error:
        raise Unavailable(f"the state directory {state_dir} cannot be used: {error.strerror}") from error


def read_status(state_dir: Path) -> Status | None:
    """Return who serves, or served last; None when nobody did."""
    try:
        fields = json.loads((state_dir / _NAME).read_text(encoding="utf-8"))
        keeper, worker = ProcessIdentity(**fields["keeper"]), ProcessIdentity(**fields["worker"])
        return Status(keeper, worker, str(fields["version"]), str(fields["failure"]), int(fields["failures"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
