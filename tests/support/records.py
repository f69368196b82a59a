"""Session records for tests that need no container."""

import time
from typing import Any

from execgate.model.config import ExecConfig, ResolvedUser
from execgate.model.container import ContainerBinding
from execgate.model.ids import ContainerId, new_session_id
from execgate.model.process import ProcessIdentity
from execgate.model.session import ExecSession, SessionState


def new_binding(container_id: str = "c1", *, pid: int = 4_000_000) -> ContainerBinding:
    """Return a binding to a container that nobody has (the kernel's pids are smaller)."""
    return ContainerBinding(ContainerId(container_id), container_id, ProcessIdentity(pid, 7), "boot")


def new_session(*, container: str = "c1", args: tuple[str, ...] = ("true",), **changes: Any) -> ExecSession:
    """Return a created session; `changes` go to its configuration, but `created_at`, which is its own."""
    created_at = changes.pop("created_at", None)
    return ExecSession(
        id=new_session_id(),
        container=new_binding(container),
        config=ExecConfig(args=args, **changes),
        user=ResolvedUser(uid=0, gid=0),
        state=SessionState.CREATED,
        created_at=time.time() if created_at is None else created_at,
        since=time.monotonic(),
    )
