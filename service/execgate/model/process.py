"""How a process is named so that another one is never hit: by pid *and* start time, within one boot."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process of the host.

    `start_time` is field 22 of `/proc/PID/stat`: clock ticks since boot. A reused pid has another one.
    """

    pid: int
    start_time: int
