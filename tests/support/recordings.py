"""Recordings as a test reads them: all of one, and the services that make them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from execgate.gate.cast import Event, Played, Torn, What
from support.service import Service


@dataclass(slots=True)
class Recorded:
    """One recording, read to its end. `torn` says that this was not where it should have been."""

    path: Path
    head: dict[str, Any] = field(default_factory=dict)
    tty: bool = False
    events: list[Event] = field(default_factory=list)
    torn: bool = False

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        with path.open("rb") as file:
            played = Played(file)
            found = cls(path, played.head, played.tty)
            try:
                found.events.extend(played)
            except Torn:
                found.torn = True
        return found

    def bytes_of(self, what: What) -> bytes:
        return b"".join(event.data for event in self.events if event.what is what)

    @property
    def stdout(self) -> bytes:
        return self.bytes_of(What.STDOUT)

    @property
    def stderr(self) -> bytes:
        return self.bytes_of(What.STDERR)

    @property
    def stdin(self) -> bytes:
        return self.bytes_of(What.STDIN)

    @property
    def notes(self) -> list[str]:
        return [event.data.decode() for event in self.events if event.what is What.NOTE]


class Recordings:
    """The recordings below a directory, by the session's id."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def paths(self) -> list[Path]:
        return sorted(self.directory.glob("*.gz"))

    def path(self, session_id: str) -> Path:
        (path,) = self.directory.glob(f"*-{session_id[:12]}.*.gz")
        return path

    def of(self, session_id: str) -> Recorded:
        found = Recorded.read(self.path(session_id))
        assert not found.torn
        assert [event.time for event in found.events] == sorted(event.time for event in found.events)
        return found


def recording_service(
    new_service: Callable[..., Service], directory: Path, record: str = "output", **settings: Any
) -> tuple[Service, Recordings]:
    """Start a service that records everything in `directory`/recordings; `settings` are keys of its configuration."""
    where = settings.pop("recordings_dir", directory / "recordings")
    env = {"record": record, "recordings_dir": where, **settings}
    service = new_service(directory, env={f"EXECGATE_{name.upper()}": str(value) for name, value in env.items()})
    return service, Recordings(Path(str(where)))
