"""What is done to the service under load: workers, their heirs, keepers and conmons are killed, stopped, replaced.

Only one thing at a time is done to keeper and workers. `Unrest` counts it from before it is done until the service
answers again, so that whoever loses something can say whether that was owed to it.
"""

import contextlib
import os
import random
import select
import signal
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from execgate.runtime.pidfd import exit_status
from execgate.runtime.readiness import Descriptor
from support.api import RawApi
from support.leaks import monitors
from support.processes import children
from support.service import Service

ANSWERS_WITHIN = 10.0
"""Seconds after which a service must answer again. docs/reliability.md says 2: the load here takes all processors."""

_CALM = (0.5, 6.0)
_STOPPED = (0.05, 1.0)


@dataclass(frozen=True, slots=True)
class Moment:
    """How much had been done by then. An odd number says that it was being done just then."""

    crashes: int
    replacements: int


@dataclass(slots=True)
class Unrest:
    """What has been done so far. A crash is a replacement too: of a worker that had no time to hand over."""

    crashes: int = 0
    replacements: int = 0
    done: Counter[str] = field(default_factory=Counter)
    answered: list[float] = field(default_factory=list)
    story: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    """What was done last, and when it was begun."""

    def now(self) -> Moment:
        """Return what to compare with later."""
        return Moment(self.crashes, self.replacements)

    def crashed_since(self, moment: Moment) -> bool:
        """Whether a worker was killed at any time since then."""
        return self.crashes != moment.crashes or moment.crashes % 2 == 1

    def replaced_since(self, moment: Moment) -> bool:
        """Whether a worker was killed or has handed over at any time since then."""
        return self.replacements != moment.replacements or moment.replacements % 2 == 1

    def tell(self, what: str) -> None:
        """Note what is about to be done, for those who look for the cause of a failure."""
        self.story.append(f"{time.strftime('%H:%M:%S')}.{time.time_ns() // 10**6 % 1000:03d} {what}")

    @contextlib.contextmanager
    def crash(self) -> Iterator[None]:
        """Hold what kills a worker, until another one serves."""
        self.crashes += 1
        try:
            with self.replacement():
                yield
        finally:
            self.crashes += 1

    @contextlib.contextmanager
    def replacement(self) -> Iterator[None]:
        """Hold what replaces a worker, until the other one serves."""
        self.replacements += 1
        try:
            yield
        finally:
            self.replacements += 1

    def __str__(self) -> str:
        answered = (
            f"; answered again after {statistics.median(self.answered):.3f} s (median), {max(self.answered):.3f} s"
            " at most"
            if self.answered
            else ""
        )
        return ", ".join(f"{name} {count}" for name, count in sorted(self.done.items())) + answered


class Disturber:
    """The hand that disturbs. `restart` starts the service anew on its directory, after its keeper has been killed."""

    def __init__(self, service: Service, unrest: Unrest, restart: Callable[[], Service]) -> None:
        self.service = service
        self.unrest = unrest
        self._restart = restart

    def everything_once(self) -> None:
        """Do each of it once, as nobody looks: what there is afterwards is what can be compared with the end."""
        for act in (self.crash, self.reload, self.kill_keeper):
            act()

    def disturb(self, dice: random.Random, *, keepers: bool, until: Callable[[], bool]) -> None:
        """Do it again and again."""
        acts: list[tuple[Callable[[], None], int]] = [
            (self.crash, 8), (self.reload, 8), (lambda: self.crash_in_reload(dice.uniform(0.0, 1.5)), 3),
            (self.kill_heir, 2), (self.kill_keeper, 4 if keepers else 0),
        ]  # fmt: skip
        while not until():
            act = dice.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
            pause(dice.uniform(*_CALM), until)
            act()

    # -- keeper and workers ------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """Kill the worker that serves."""
        with self._measured("crash"), self.unrest.crash():
            self.service.crash()

    def reload(self) -> None:
        """Have it replaced."""
        with self._measured("reload"), self.unrest.replacement():
            self.service.reload()

    def crash_in_reload(self, after: float) -> None:
        """Kill a worker that is to be replaced, at some moment before or after it has handed over."""
        worker = os.pidfd_open(self.service.pid)
        try:
            with self._measured("crash in a reload"), self.unrest.crash():
                self.service.process.send_signal(signal.SIGHUP)
                time.sleep(after)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker, signal.SIGKILL)
                self.service.await_ready()
        finally:
            os.close(worker)

    def kill_heir(self) -> None:
        """Kill the worker that stands by: nobody may notice."""
        heirs = children(self.service.keeper) - {self.service.pid}
        self.unrest.tell(f"heir killed ({heirs})")
        for pid in heirs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.unrest.done["heir killed"] += 1

    def kill_keeper(self) -> None:
        """Kill the keeper, and have the next `execgate serve` take over from its worker."""
        with self._measured("keeper killed"), self.unrest.replacement():
            worker = Descriptor(os.pidfd_open(self.service.pid))
            try:
                self.service.process.kill()
                self.service.process.wait()
                self.service.kill()  # what is left of it is our end of its notification socket
                self.service = self._restart()
                assert select.select([worker], [], [], ANSWERS_WITHIN)[0], "an orphan stays when its heir serves"
                status = exit_status(worker)
                assert status is None or status.code == 0, f"an orphan did not hand over, but ended with {status.code}"
            finally:
                worker.close()

    @contextlib.contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        """Take the time until the service answers again, and hold it to its bound."""
        self.unrest.tell(f"{name} (worker {self.service.pid}, keeper {self.service.keeper})")
        begun = time.monotonic()
        yield
        assert RawApi(self.service.socket).call("GET", "/_ping").status == 200
        took = time.monotonic() - begun
        self.unrest.done[name] += 1
        if name == "crash":  # the others last as long as the old one serves
            self.unrest.answered.append(took)
        assert took < ANSWERS_WITHIN + 10 * (name != "crash"), f"after {name} it took {took:.1f} s to answer again"


def stop_monitors(service: Service, unrest: Unrest, dice: random.Random, until: Callable[[], bool]) -> None:
    """Stop one conmon after the other for a moment; nobody may notice."""
    while not until():
        pause(dice.uniform(0.2, 2.0), until)
        if not (found := sorted(monitors(service.state_dir))):
            continue
        with contextlib.suppress(ProcessLookupError):
            pid = dice.choice(found)
            monitor = os.pidfd_open(pid)
            try:
                if pid not in monitors(service.state_dir):  # it has ended, and the number is somebody else's
                    continue
                signal.pidfd_send_signal(monitor, signal.SIGSTOP)
                time.sleep(dice.uniform(*_STOPPED))
                signal.pidfd_send_signal(monitor, signal.SIGCONT)
                unrest.done["conmon stopped"] += 1
            finally:
                os.close(monitor)


_never = threading.Event()


def pause(seconds: float, until: Callable[[], bool]) -> None:
    """Wait, but not beyond the end."""
    deadline = time.monotonic() + seconds
    while not until() and (left := deadline - time.monotonic()) > 0:
        _never.wait(min(left, 0.2))
