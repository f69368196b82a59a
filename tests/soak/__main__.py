"""`python -m soak --seconds 600 --seed 1`: a random mix of everything, while everything around it is killed.

The time has three thirds, and a warm-up before them:

1. workers are killed and reloaded under load, and so are keepers;
2. the same without keepers: the last one lives from here to the end, so that what grows in it shows;
3. workers are left alone, for the same reason. Clients, conmons and containers die throughout.

What there is before and after is compared when everything that was made is removed: descriptors, processes,
directories, records are the same, memory is within `_GROWTH`. Before means after the warm-up, which does the same
work, and once each thing that replaces a worker: what a service holds for good is there by then.

The seed makes the choices: which work each hand does, and how, and what is disturbed after how long. It cannot make the
scheduler's, so a failure is more likely with its seed, and not certain.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from soak.errand import LOST, Cut, Errand, Field
from soak.unrest import Disturber, Unrest, pause, stop_monitors
from soak.watch import MIB, Inventory, Watch, resident
from soak.work import KINDS, Kind, recreated
from support.access import allow
from support.api import RawApi
from support.clients import DockerCli
from support.errors import HostError
from support.runtimes import RuntimeHost, crun_host, runc_host
from support.service import Service

HANDS = 6
SAMPLES = 6
WARM_UP = 0.1
WARM_UP_MAX = 60.0
QUIET = 90.0
"""Seconds in which everything has to be gone that was made."""

_GROWTH = {"keeper": 2 * MIB, "worker": 16 * MIB}
"""Bytes that a keeper and a worker may have grown by since the warm-up. A keeper of 11 MiB does not grow at all. A
worker of 61 MiB has grown by 5 after 1,000 pieces of work, by 7 after 5,000, and hardly any more: its heap gets full of
holes. Twice that leaves room for an hour, and shows a leak of a kilobyte a session there."""

_ENVIRONMENT = {"EXECGATE_RETENTION_SECONDS": "30", "EXECGATE_CREATED_LIFETIME_SECONDS": "60"}

Memory = Sequence[tuple[str, int, int]]
"""Of keeper and worker: the bytes before, and after."""


class Soak:
    """One run against one service."""

    def __init__(self, service: Service, where: Field, seed: int, restart: Callable[[], Service]) -> None:
        self.where = where
        self.seed = seed
        self.disturber = Disturber(service, where.unrest, restart)
        self.failures: list[str] = []
        self.interrupted = False
        self.weights: list[tuple[int, int]] = []
        """What the worker had in memory after so many pieces of work, in the last part that left it alone."""
        self._until = 0.0
        self._lock = threading.Lock()
        self.watch = Watch(lambda: self.disturber.service, self.where.unrest, self.over)

    @property
    def service(self) -> Service:
        """The service as it is now."""
        return self.disturber.service

    def over(self) -> bool:
        """Whether this part is over, or all of it."""
        return bool(self.failures) or self.interrupted or time.monotonic() > self._until

    def part(self, name: str, seconds: float, *, workers: bool, keepers: bool, only: Sequence[Kind]) -> None:
        """Work with every hand for so long, and disturb what is to be disturbed."""
        if self.failures or self.interrupted:
            return
        print(f"soak: {name}, {seconds:.0f} s", flush=True)
        self._until = time.monotonic() + seconds
        monitors, unrest = self._dice(f"{name}, monitors"), self._dice(f"{name}, workers")
        tasks: dict[str, Callable[[], None]] = {
            hand: partial(self._hand, hand, only) for hand in (f"{name}, hand {number}" for number in range(HANDS))
        }
        tasks |= {
            f"{name}, containers": lambda: self._hand(f"{name}, containers", [recreated]),
            f"{name}, monitors": lambda: stop_monitors(self.service, self.where.unrest, monitors, self.over),
            f"{name}, watch": self.watch.run,
        }
        if workers:
            tasks[f"{name}, workers"] = lambda: self.disturber.disturb(unrest, keepers=keepers, until=self.over)
        else:
            tasks[f"{name}, scales"] = lambda: self._weigh(seconds)
        threads = [threading.Thread(target=self._guarded, args=one) for one in tasks.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that signals are heard

    def _dice(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def _hand(self, name: str, kinds: Sequence[Kind]) -> None:
        """Do one piece of work after the other. Each has dice of its own: a crash in one changes no other."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a Ctrl-C is not for the programs that it starts
        choice = self._dice(name)
        number = 0
        while not self.over():
            kind = choice.choice(kinds)
            number += 1
            label = f"{name}, {number}"
            try:
                self._errand(kind, Errand(self.where, label.replace(" ", "-"), self._dice(label)))
            except Exception as error:
                self._failed(f"{label}, {kind.__name__}", error)

    def _errand(self, kind: Kind, errand: Errand) -> None:
        try:
            try:
                kind(errand)
            except LOST as error:
                if not errand.crashed:
                    raise
                raise Cut from error
            self._count(kind.__name__)
        except Cut:
            self._count("cut by a crash")
        errand.close()

    def _count(self, name: str) -> None:
        with self._lock:
            self.where.done[name] += 1

    def _weigh(self, seconds: float) -> None:
        """Note what the worker weighs, by what was done until then."""
        self.weights = []
        while not self.over():
            self.weights.append((self.where.done.total(), resident(self.service.pid)))
            pause(seconds / SAMPLES, self.over)

    def _guarded(self, name: str, task: Callable[[], None]) -> None:
        """Run one of the threads."""
        try:
            task()
        except Exception as error:
            self._failed(name, error)

    def _failed(self, who: str, error: Exception) -> None:
        places = [f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)]
        reasons = [f"{one!r}" for one in (error, error.__cause__, error.__context__) if one is not None]
        text = f"{time.strftime('%H:%M:%S')} {who}: {' <- '.join(dict.fromkeys(reasons))} at {' > '.join(places[-8:])}"
        with self._lock:
            self.failures.append(text)
        print(f"soak: {text}", file=sys.stderr, flush=True)

    # -- before and after --------------------------------------------------------------------------------------------

    def cleared(self) -> None:
        """Have everything forgotten; what still runs is killed."""
        api = RawApi(self.service.socket)
        for session in api.call("GET", "/exec/json").json:
            status = api.call("DELETE", f"/exec/{session['ID']}?force=1").status
            assert status in (204, 404), f"a removal at the end gave {status}"

    def inventory(self) -> Inventory:
        """Return what there is."""
        return Inventory.of(self.service, self.where.containers, self.where.made)

    def memory(self) -> dict[str, int]:
        """Return what keeper and worker have in memory, in bytes."""
        return {"keeper": resident(self.service.keeper), "worker": resident(self.service.pid)}

    def settled(self) -> Inventory:
        """Return what there is once it does not change any more."""
        self.cleared()
        deadline = time.monotonic() + QUIET
        last = self.inventory()
        while True:
            time.sleep(3)
            now = self.inventory()
            if now == last and not now.records and not now.cgroups and not now.monitors:
                return now
            assert time.monotonic() < deadline, f"there is no rest: {now.differences(last)}, {now}"
            last = now

    def compare(self, before: Inventory) -> Inventory:
        """Clear, and wait until all is as before; what is not after a while is a failure."""
        self.cleared()
        deadline = time.monotonic() + QUIET
        while differences := (now := self.inventory()).differences(before):
            if time.monotonic() > deadline:
                self.failures += [f"not as before: {one}" for one in differences]
                break
            time.sleep(0.5)
        return now


def summary(
    soak: Soak, before: Inventory, after: Inventory | None, memory: Sequence[tuple[str, int, int]]
) -> Iterator[str]:
    """Tell what was done and what came of it."""
    done = soak.where.done
    yield f"{done.total()} pieces of work: {', '.join(f'{name} {count}' for name, count in sorted(done.items()))}"
    yield f"disturbed: {soak.where.unrest}"
    most = {name: f"{n / MIB:.1f} MiB" if "bytes" in name else n for name, n in sorted(soak.watch.most.items())}
    yield f"at most: {', '.join(f'{name} {n}' for name, n in most.items())}; /_ping {soak.watch.slowest:.3f} s"
    yield f"before: {before}"
    yield f"after:  {after or 'not known: it has failed'}"
    for role, then, now in memory:
        yield f"memory of the {role}: {then / MIB:.1f} MiB before, {now / MIB:.1f} MiB after"
    shown = ", ".join(f"{size / MIB:.1f} ({number})" for number, size in soak.weights)
    yield f"memory of the last worker, MiB (after so many pieces of work): {shown}"


def soaked(soak: Soak, seconds: float, kinds: Sequence[Kind]) -> None:
    """Do all of it, and tell."""
    soak.disturber.everything_once()
    soak.part("warm-up", min(WARM_UP_MAX, WARM_UP * seconds), workers=False, keepers=False, only=kinds)
    if soak.failures:
        return
    before = soak.settled()
    weights = soak.memory()
    soak.where.done.clear()
    soak.part("first third", seconds / 3, workers=True, keepers=True, only=kinds)
    soak.part("second third", seconds / 3, workers=True, keepers=False, only=kinds)
    soak.part("last third", seconds / 3, workers=False, keepers=False, only=kinds)
    after, memory = None, []
    if not soak.failures:
        after = soak.compare(before)
        soak.watch.look()
        now = soak.memory()
        memory = [(role, weights[role], now[role]) for role in now]
        soak.failures += [
            f"the {role} has grown by {(end - begin) / MIB:.1f} MiB"
            for role, begin, end in memory
            if end - begin > _GROWTH[role]
        ]
    for line in summary(soak, before, after, memory):
        print(f"soak: {line}", flush=True)


def free_port() -> int:
    """Return a TCP port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(seconds: float, seed: int, kinds: Sequence[Kind]) -> int:
    """Set the scene, soak, and clear it; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as name, contextlib.ExitStack() as cleanup:
        directory = Path(name)
        hosts: list[RuntimeHost] = []
        for make, runtime in ((runc_host, "runc"), (crun_host, "crun")):
            try:
                hosts.append(make(directory / runtime))
            except HostError as error:
                print(f"soak: without {runtime}: {error}")
                continue
            cleanup.callback(hosts[-1].close)
        port = free_port()
        state = directory / "service"
        # What one creates, over the socket or over TCP, the other one ends.
        authorization = allow(state, "soak", ["uid:0", "token:soak"])
        flags = [f"--listen=unix://{state}/execgate.sock", f"--listen=tcp://127.0.0.1:{port}"]

        def start() -> Service:
            return Service.start(state, hosts, flags=flags, env=_ENVIRONMENT, own_session=True)

        service = start()
        unrest = Unrest()
        where = Field(
            service.socket,
            port,
            hosts,
            [host.run() for host in hosts],
            DockerCli.for_service(service),
            authorization,
            unrest,
        )
        soak = Soak(service, where, seed, start)

        def interrupt(number: int, frame: FrameType | None) -> None:
            if soak.interrupted:
                raise KeyboardInterrupt
            print(f"soak: {signal.Signals(number).name}: ends what is under way", flush=True)
            soak.interrupted = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        try:
            soaked(soak, seconds, kinds)
            if not soak.failures:
                soak.service.stop()
        except Exception as error:
            soak.failures.append(f"{error!r}")
            traceback.print_exc()
        finally:
            soak.service.kill()
        for failure in soak.failures:
            print(f"soak: FAILED (seed {seed}): {failure}", file=sys.stderr)
        if soak.failures:
            print("\n".join(["soak: what was done last:", *unrest.story]), file=sys.stderr)
            print(soak.service.log()[-8000:], file=sys.stderr)
            print(f"soak: failed; again with: make soak SECONDS={seconds:g} SEED={seed}", file=sys.stderr)
        return 1 if soak.failures else 0


def main() -> int:
    """Run the soak; return 0 when every promise was kept."""
    parser = argparse.ArgumentParser(prog="soak", description="A random mix of everything, and what must hold.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="default: one that is printed")
    parser.add_argument("--only", default="", help="kinds of work, with commas: to look for a cause")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else time.time_ns() % 10**6
    wanted = set(filter(None, options.only.split(",")))
    if unknown := wanted - {kind.__name__ for kind in KINDS}:
        parser.error(f"no such work: {', '.join(sorted(unknown))}")
    print(f"soak: seed {seed}, {options.seconds:g} s, on {os.cpu_count()} processors", flush=True)
    return run(options.seconds, seed, [kind for kind in KINDS if not wanted or kind.__name__ in wanted])


if __name__ == "__main__":
    sys.exit(main())
