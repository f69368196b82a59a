"""Descriptors that outlive the service: somebody else holds a duplicate of each, under a name.

The keeper (`execgate.keeper`) is that somebody; a program that embeds the engine has none. The words are systemd's
(FDSTORE, sd_notify(3)): what is stored comes back to the next service on the same state directory.

A duplicate is the same open file: as long as the store has the write end of a pipe, its reader sees no end of file,
whatever we close. So whoever *ends* something has to `drop` it too; whoever merely lets go of it has not.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Protocol

from execgate.model.ids import SessionId
from execgate.wire import stdcopy


class FdStore(Protocol):
    """Keeps descriptors. Nothing here blocks or fails: a store that is gone keeps nothing, and says so in the log."""

    def keep(self, descriptors: Mapping[str, int]) -> None:
        """Have a duplicate of each descriptor kept under its name, until it is dropped; ours stays ours."""

    def drop(self, names: Iterable[str]) -> None:
        """Have what is kept under these names closed. Names that nothing is kept under are no error."""

    def take(self, name: str) -> int | None:
        """Return a descriptor that was kept for an earlier service, close-on-exec, the caller's from now on; once.

        It stays in the store as well. None when nothing was kept under that name, or it was taken already.
        """


class NoFdStore:
    """The store of those who have none."""

    def keep(self, descriptors: Mapping[str, int]) -> None:
        """See `FdStore.keep`."""

    def drop(self, names: Iterable[str]) -> None:
        """See `FdStore.drop`."""

    def take(self, name: str) -> int | None:
        """See `FdStore.take`."""


class Role(StrEnum):
    """What a descriptor is to its session: a pipe, conmon's attach socket, conmon's sync pipe, the process's pidfd."""

    STDIN = "stdin"
    STDOUT = "stdout"
    STDERR = "stderr"
    TERMINAL = "terminal"
    SYNC = "sync"
    PROCESS = "process"


OUTPUT_ROLES = {stdcopy.STDOUT: Role.STDOUT, stdcopy.STDERR: Role.STDERR}
"""What a stream of output is to its session."""


def stream_name(session_id: SessionId, role: Role) -> str:
    """Return the name under which a session's descriptor is kept."""
    return f"{session_id[:32]}.{role}"


def drop_all(store: FdStore, session_id: SessionId) -> None:
    """Have nothing of a session kept any more."""
    store.drop([stream_name(session_id, role) for role in Role])
