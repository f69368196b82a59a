"""What the service asks of its host and does not need."""

import errno
import os

import pytest

from execgate import app


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EINVAL])
@pytest.mark.parametrize("call", ["sched_getscheduler", "sched_setscheduler", "setpriority"])
def test_a_host_that_grants_no_priority(monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    """A seccomp filter says what it likes; musl has no sched_setscheduler; gVisor does not know the flag."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("sched_setscheduler", "setpriority"):
        monkeypatch.setattr(os, name, lambda *_: None)
    monkeypatch.setattr(os, call, refuse)
    app._come_first()
