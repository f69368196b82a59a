"""What happened, in the form of Docker's event stream."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from execgate.model.ids import ContainerId


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a container.

    `action` is Docker's: `exec_create: CMD`, `exec_start: CMD`, `exec_die`, `exec_detach`. `time_ns` is
    nanoseconds since the epoch. `attributes` never holds an environment value. `owner` is whose session it is about
    (`Principal.id`): for us, not for those who look.
    """

    action: str
    container_id: ContainerId
    time_ns: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""

    @property
    def verb(self) -> str:
        """The action without its command: what a filter `event=exec_create` means."""
        return self.action.partition(":")[0]
