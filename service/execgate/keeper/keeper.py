"""The keeper itself: it starts workers, holds their descriptors, and does nothing else.

The theory. A *worker* is the asyncio service. It entrusts the keeper with a duplicate of every descriptor that must
outlive it: the listening sockets, and of each session the pipes, conmon's sync pipe, the pidfd. When the worker dies,
the next one gets them all back; meanwhile what a process writes waits in its pipe, what it reads does not end, and who
connects waits in the listener's queue. The keeper looks at none of it.

There are two workers at most. The *active* one has been given what is kept, and serves. The *heir* is the one that
comes next: one that stands by, its modules imported, so that a crash costs a moment only; or the one that a reload has
started, with the new code and the new configuration. An heir says `take` when it is ready to follow; it gets what is
kept when there is no active worker any more. In a reload the active one is asked to `leave` at that moment, not before:
a new version that cannot start changes nothing.

What it refuses to know: configuration, sessions, HTTP. It must never die, so it does as little as possible, in one
thread, on the standard library, and treats each worker as a stranger: one that floods, lies or hangs costs itself its
life and the keeper nothing.
"""

import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from execgate.keeper import protocol, systemd

_TAKE_TIMEOUT = 60.0
"""Seconds that a worker has to become ready to take over, and again to serve once it has taken over."""

_LEAVE_TIMEOUT = 15.0
"""Seconds that a worker has to hand over."""

_GIVE_TIMEOUT = 5.0
"""Seconds that a worker may take to receive one message."""

_STABLE = 1.0
"""Seconds of service after which a death counts as the first one."""

_DELAY_FIRST, _DELAY_SERVED_MAX, _DELAY_MAX = 0.1, 0.4, 10.0
"""Seconds before a worker is replaced that did not serve for long: doubled each time, up to the second number if it did
serve, to the third if it never came so far. Else there is none."""

_MAX_KEPT = 1_000_000
_MESSAGES_PER_TURN = 256
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_DEFAULTS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


class Worker:
    """A worker process, and our end of the socket to it."""

    __slots__ = ("asked", "control", "deadline", "leaving", "pid", "served_since")

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.asked = False  # it has said `take`
        self.leaving = False  # it was told `leave`
        self.served_since: float | None = None
        self.deadline: float | None = time.monotonic() + _TAKE_TIMEOUT  # by then it has to have said its next word

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal it; it is our child and not reaped yet, so the pid is its own."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Keeper:
    """Runs workers with `argv` and `environ` until it is told to end."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], kept: dict[str, int]) -> None:
        self._argv = list(argv)
        self._environ = dict(environ)
        self._kept = kept
        self._notifier = systemd.Notifier(self._environ)
        self._active: Worker | None = None
        self._heir: Worker | None = None
        self._poll = select.poll()
        self._wake, wake = socket.socketpair()
        self._signals: list[int] = []
        self._exit_code: int | None = None
        self._stopping = False
        self._stopped_by: set[int] = set()
        self._reloading = False
        self._has_served = False
        self._stand_by = False
        self._delay = 0.0
        self._nofile = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._start_at: float | None = None  # when the next heir is due
        self._promote_at = 0.0
        for one in (self._wake, wake):
            one.setblocking(False)
        self._wake_writer = wake
        self._poll.register(self._wake, select.POLLIN)

    def run(self) -> int:
        """Keep a worker running until told to end, or until none could ever be started.

        Returns the exit code, or minus the number of the signal that ended it at once.
        """
        with contextlib.suppress(OSError, ValueError):  # for what is kept; a worker gets the limit that we were given
            resource.setrlimit(resource.RLIMIT_NOFILE, (self._nofile[1], self._nofile[1]))
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        self._heir = self._spawn()
        while self._exit_code is None:
            ready = {fd for fd, _ in self._poll.poll(self._patience())}
            if self._wake.fileno() in ready:
                self._drain_wake()
            for worker in (self._active, self._heir):
                if worker is not None and worker.control.fileno() in ready:
                    self._listen(worker)
            self._reap()
            while self._signals and self._exit_code is None:
                self._signalled(self._signals.pop(0))
            self._check_deadlines()
        return self._exit_code

    # -- what happens ------------------------------------------------------------------------------------------------

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reload()
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stop(number)

    def _stop(self, number: int) -> None:
        """End the worker, and then ourselves; the same signal once more does not wait for its manners."""
        if number in self._stopped_by or not self._has_served:
            self._end(-number)
            return
        self._stopped_by.add(number)
        if self._stopping:
            return
        self._stopping = True
        self._notifier.tell("STOPPING=1")
        self._dismiss_heir()
        if self._active is None:
            self._end(0)
        elif self._notifier.stores and self._active.served_since is not None:
            self._ask_to_leave(self._active)
        else:
            self._active.deadline = time.monotonic() + _LEAVE_TIMEOUT
            self._tell_active("stop")

    def _reload(self) -> None:
        """Start a worker that is to follow the active one."""
        if self._stopping or self._reloading:
            return
        if self._active is None or self._active.served_since is None:
            say("a worker is being started already; it has the new configuration if that was there before it")
            return
        self._dismiss_heir()
        self._reloading = True
        self._notifier.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self._start_heir()

    def _listen(self, worker: Worker) -> None:
        """Take what a worker says, so much at a time."""
        for _ in range(_MESSAGES_PER_TURN):
            try:
                message = protocol.receive(worker.control)
            except BlockingIOError:
                return
            except OSError:
                message = None
            if message is None:  # it closed its end, which is the last thing that a worker does
                self._poll.unregister(worker.control)
                worker.deadline = time.monotonic() + _GIVE_TIMEOUT
                return
            self._told(worker, message)

    def _told(self, worker: Worker, message: protocol.Message) -> None:
        if message.verb == "take" and worker is self._heir:
            worker.asked, worker.deadline = True, None
            self._promote()
        elif message.verb == "ready" and worker is self._active:
            self._serves(worker, stand_by="standby" in message.words)
        elif message.verb == "keep" and worker is self._active and len(self._kept) < _MAX_KEPT:
            found = message.named()
            protocol.close_all(self._kept[name] for name in found if name in self._kept)
            self._kept |= found
        elif message.verb == "drop" and worker is self._active:
            protocol.close_all(self._kept.pop(name) for name in message.words if name in self._kept)
        else:
            protocol.close_all(message.fds)

    def _serves(self, worker: Worker, *, stand_by: bool) -> None:
        worker.deadline, worker.served_since = None, time.monotonic()
        self._has_served, self._stand_by, self._reloading = True, stand_by, False
        if stand_by and self._heir is None and not self._stopping:
            self._start_heir()
        self._notifier.tell("READY=1")

    def _died(self, worker: Worker, status: int) -> None:
        while self._told_all(worker):
            pass
        with contextlib.suppress(KeyError):
            self._poll.unregister(worker.control)
        worker.control.close()
        code = os.waitstatus_to_exitcode(status)
        if worker is self._active:
            self._active = None
            self._active_died(worker, code)
        elif worker is self._heir:
            self._heir = None
            self._heir_died(code)

    def _told_all(self, worker: Worker) -> bool:
        """Take what a dead worker has said last; return whether there may be more."""
        with contextlib.suppress(OSError):
            message = protocol.receive(worker.control)
            if message is not None:
                self._told(worker, message)
                return True
        return False

    def _active_died(self, worker: Worker, code: int) -> None:
        if self._stopping or not self._has_served:
            self._end(_shell_code(code))
            return
        if self._reloading and code == 0:  # it has handed over
            self._promote_at = 0.0
        else:
            self._count_failure(worker, code)
            self._promote_at = time.monotonic() + self._delay
        if self._heir is None:
            self._start_at = self._promote_at
        self._promote()

    def _heir_died(self, code: int) -> None:
        if self._reloading:
            self._reloading = False
            say(f"the reload failed: the new worker {ending(code)}; the old one goes on")
            self._tell_active("failed", f"the new worker {ending(code)}")
            self._notifier.tell("READY=1")
        elif not self._has_served:
            self._end(_shell_code(code))
            return
        else:
            say(f"the next worker {ending(code)} before it was ready")
        self._lengthen_delay()
        if self._active is None or self._stand_by:
            self._start_at = time.monotonic() + self._delay

    # -- what is done ------------------------------------------------------------------------------------------------

    def _promote(self) -> None:
        """Let the heir follow, if it is ready to and its time has come."""
        heir = self._heir
        if heir is None or not heir.asked or self._stopping:
            return
        if self._active is not None:
            if self._reloading:
                self._ask_to_leave(self._active)
            return
        if time.monotonic() < self._promote_at:
            return
        self._active, self._heir = heir, None
        heir.deadline = time.monotonic() + _TAKE_TIMEOUT
        try:
            heir.control.settimeout(_GIVE_TIMEOUT)
            for names, fds in protocol.batches(self._kept):
                protocol.send(heir.control, "kept", names, fds)
            protocol.send(heir.control, "go")
        except OSError as error:
            say(f"worker {heir.pid} does not take what is kept: {error}")
            heir.kill()
        heir.control.settimeout(0)
        for name in [name for name in self._kept if name.startswith(protocol.ONCE)]:
            os.close(self._kept.pop(name))

    def _ask_to_leave(self, worker: Worker) -> None:
        if worker.leaving:
            return
        worker.leaving = True
        worker.deadline = time.monotonic() + _LEAVE_TIMEOUT
        self._tell_active("leave")

    def _tell_active(self, verb: str, *words: str) -> None:
        if self._active is not None:
            with contextlib.suppress(OSError):  # it hangs, or is dying: its deadline, or its end, comes next
                protocol.send(self._active.control, verb, words)

    def _start_heir(self) -> None:
        self._start_at = None
        try:
            self._heir = self._spawn()
        except OSError as error:
            say(f"no worker can be started: {error}")
            self._lengthen_delay()
            self._start_at = time.monotonic() + self._delay

    def _spawn(self) -> Worker:
        ours, theirs = protocol.pair()
        with theirs:
            environ = {**self._environ, protocol.ENVIRONMENT: str(theirs.fileno())}
            if self._has_served and not self._reloading:
                environ[protocol.RESTARTED] = "1"
            # A session of its own: Ctrl-C is for us, and we pass it on once. And when we die, the kernel must not find
            # an orphaned process group, which would get a SIGHUP if anybody in it is stopped: a conmon that starts.
            pid = os.posix_spawn(self._argv[0], self._argv, environ, setsid=True, setsigmask=(), setsigdef=_DEFAULTS)
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, self._nofile)
        ours.setblocking(False)
        self._poll.register(ours, select.POLLIN)
        return Worker(pid, ours)

    def _dismiss_heir(self) -> None:
        """Part from an heir that is not needed; it has nothing, and what it may still say is nobody's."""
        heir, self._heir, self._start_at = self._heir, None, None
        if heir is not None:
            heir.kill(signal.SIGTERM)
            with contextlib.suppress(KeyError):
                self._poll.unregister(heir.control)
            heir.control.close()

    def _end(self, code: int) -> None:
        self._exit_code = code
        if self._active is not None:
            self._active.kill()
        elif self._notifier.stores and code == 0:
            self._notifier.store(
                {name: fd for name, fd in self._kept.items() if not name.startswith(protocol.ACTIVATED)}
            )

    # -- time and signals --------------------------------------------------------------------------------------------

    def _patience(self) -> float | None:
        """Return how many milliseconds may pass until something is due."""
        due = [self._start_at, *(one.deadline for one in (self._active, self._heir) if one is not None)]
        if self._active is None and self._heir is not None and self._heir.asked:
            due.append(self._promote_at)
        times = [time_ for time_ in due if time_ is not None]
        return max(0.0, min(times) - time.monotonic()) * 1000 + 1 if times else None

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for worker in (self._active, self._heir):
            if worker is not None and worker.deadline is not None and now > worker.deadline:
                say(f"worker {worker.pid} does not answer and is killed")
                worker.deadline = None
                worker.kill()
        if self._start_at is not None and now >= self._start_at and not self._stopping:
            self._start_heir()
        self._promote()

    def _count_failure(self, worker: Worker, code: int) -> None:
        if worker.served_since is None:
            self._lengthen_delay(_DELAY_MAX)
        elif time.monotonic() - worker.served_since < _STABLE:
            self._lengthen_delay(_DELAY_SERVED_MAX)
        else:
            self._delay = 0.0
        say(f"worker {worker.pid} {ending(code)}; another one follows in {self._delay:g} s")

    def _lengthen_delay(self, most: float = _DELAY_MAX) -> None:
        self._delay = min(most, max(_DELAY_FIRST, 2 * self._delay))

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass

    def _reap(self) -> None:
        """Reap whoever has ended: as the first process of a container we are everybody's parent."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                for worker in (self._active, self._heir):
                    if worker is not None and worker.pid == pid:
                        self._died(worker, status)


def run(argv: Sequence[str]) -> int:
    """Run `argv` as workers, with what the service manager has passed; return the exit code."""
    environ = dict(os.environ)
    try:
        kept = systemd.inherited(environ)
    except OSError as error:
        say(str(error.strerror))
        return 1
    code = Keeper(argv, environ, kept).run()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return _shell_code(code)


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def ending(code: int) -> str:
    """Say how a process ended, by `os.waitstatus_to_exitcode`."""
    if code >= 0:
        return f"ended with {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def say(text: str) -> None:
    """Tell the operator, on stderr; one who does not listen is no reason to die."""
    with contextlib.suppress(OSError, ValueError):
        print(f"execgate: keeper: {text}", file=sys.stderr, flush=True)
