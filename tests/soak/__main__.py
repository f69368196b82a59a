"""`python -m soak --seconds 600 --seed 1`: execs of all kinds, and kills of clients, workers, conmons; reloads.

Each kind of work knows what must come of it, also when its worker was killed meanwhile: the right exit code, or an
honest unknown where conmon was killed; every byte of captured output once; streams that are exact or were cut by a
crash, never wrong. At the end nothing may be left: no session's directory, no conmon, no descriptor in the keeper. A
failure prints the seed: the same seed makes the same choices, in the same order for each hand.
"""

import argparse
import collections
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from execgate.wire.stdcopy import Demultiplexer
from support.api import RawApi
from support.errors import HostError
from support.leaks import descriptors, monitors, resident_bytes
from support.runtimes import RuntimeHost, TestContainer, crun_host, runc_host
from support.service import Service

HANDS = 6
LINES = 3000
SCRIPT = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done; exit 7"
EXPECTED = b"".join(b"line %d\n" % number for number in range(LINES))
T = TypeVar("T")
WRONG = "wrong bytes"
LOST = (ConnectionError, EOFError, TimeoutError, OSError)


class Soak:
    """One run against one service."""

    def __init__(self, service: Service, containers: list[TestContainer], seed: int, seconds: float) -> None:
        self.service = service
        self.containers = containers
        self.seed = seed
        self.until = time.monotonic() + seconds
        self.done: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.crashes = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Work with every hand until the time is over, or until something failed."""
        hands = [threading.Thread(target=self._work, args=(number,)) for number in range(HANDS)]
        hands.append(threading.Thread(target=self._disturb))
        for hand in hands:
            hand.start()
        for hand in hands:
            hand.join()

    def _work(self, number: int) -> None:
        dice = random.Random(f"{self.seed} {number}")
        kinds: list[Callable[[RawApi, str, random.Random], None]] = [
            self.exit_code, self.captured, self.echo, self.killed, self.timed_out, self.lost_client, self.no_conmon,
        ]  # fmt: skip
        while time.monotonic() < self.until and not self.failures:
            kind = dice.choice(kinds)
            try:
                self._calm(kind, RawApi(self.service.socket), dice.choice(self.containers).id, dice)
                self.done[kind.__name__] += 1
            except Exception as error:
                with self._lock:
                    self.failures.append(f"{kind.__name__}: {error!r}")

    def _calm(self, kind: Callable[..., None], api: RawApi, container: str, dice: random.Random) -> None:
        """Do it; what broke because a worker was killed is no failure of the service, and is not done again."""
        before = self.crashes
        try:
            kind(api, container, dice)
        except LOST:
            if self.crashes == before:
                raise
            self.done["cut by a crash"] += 1
        except AssertionError as error:
            # A stream that a crash has cut ends early, and its process has not: that, and nothing else, is forgiven.
            if self.crashes == before or kind != self.echo or str(error).startswith(WRONG):
                raise
            self.done["cut by a crash"] += 1

    def _disturb(self) -> None:
        dice = random.Random(f"{self.seed} disturb")
        while time.monotonic() < self.until and not self.failures:
            time.sleep(dice.uniform(0.5, 4.0))
            if dice.random() < 0.5:
                self.service.reload()
                self.done["reload"] += 1
            else:
                self.crashes += 1
                self.service.crash()
                self.crashes += 1
                self.done["crash"] += 1

    # -- kinds of work -----------------------------------------------------------------------------------------------

    def exit_code(self, api: RawApi, container: str, dice: random.Random) -> None:
        """A detached exec, and its exit code."""
        code = dice.randrange(1, 120)
        session = api.create(container, "sh", "-c", f"exit {code}")
        if api.start_detached(session).status == 200:
            found = self.end(session)
            assert found == code, f"{session[:12]} gave {found} and not {code}"

    def captured(self, api: RawApi, container: str, dice: random.Random) -> None:
        """Output that is captured while nobody looks: every byte once, whatever happens to workers."""
        session = api.create(container, "sh", "-c", SCRIPT, CaptureStdout=True)
        if api.start_detached(session).status != 200:
            return
        found = self.end(session)
        assert found == 7, f"{session[:12]} gave {found} and not 7"
        body = self.insist(lambda: RawApi(self.service.socket).call("GET", f"/exec/{session}/logs").body)
        output = b"".join(piece for _, piece in Demultiplexer().feed(body))
        assert output == EXPECTED, f"{session[:12]} captured {len(output)} bytes of {len(EXPECTED)}"

    def echo(self, api: RawApi, container: str, dice: random.Random) -> None:
        """A client with both directions busy, which may notice a crash, and nothing else."""
        with api.open(container, "cat", stdin=True) as control:
            for number in range(dice.randrange(5, 40)):
                line = b"%d %d\n" % (number, dice.randrange(10**9))
                assert control.echo(line) == line, WRONG
                time.sleep(0.02)
            control.half_close()
            assert control.finish() == (b"", b""), WRONG
            assert control.exit_code() == 0, "cat failed"

    def killed(self, api: RawApi, container: str, dice: random.Random) -> None:
        """A tree that is killed."""
        session = api.create(container, "sh", "-c", "sleep 999 & sleep 999")
        if api.start_detached(session).status == 200:
            status = self.insist(lambda: RawApi(self.service.socket).call("POST", f"/exec/{session}/kill").status)
            assert status in (204, 409), f"kill answered {status}"
            assert self.end(session) == 137, "a killed one did not end with 137"

    def timed_out(self, api: RawApi, container: str, dice: random.Random) -> None:
        """A time limit, which a crash must not make longer."""
        session = api.create(container, "sleep", "999", Timeout=1)
        if api.start_detached(session).status == 200:
            code = self.end(session)
            assert code in (143, 137), f"a time limit gave {code}"

    def lost_client(self, api: RawApi, container: str, dice: random.Random) -> None:
        """A client that goes in the midst, and takes its process with it, as was agreed."""
        with api.open(container, "sleep", "999", stdin=True, OnDisconnect="kill") as stream:
            session = stream.id
            time.sleep(dice.uniform(0, 0.2))
        with contextlib.suppress(*LOST):
            RawApi(self.service.socket).call("POST", f"/exec/{session}/kill")  # if a crash was faster than its client
        assert self.end(session) == 137, "its process did not go with the client"

    def no_conmon(self, api: RawApi, container: str, dice: random.Random) -> None:
        """A conmon that is killed: the process goes on, its code is known or said to be unknown."""
        session = api.create(container, "sh", "-c", "sleep 1; exit 8")
        if api.start_detached(session).status != 200:
            return
        for pid in monitors(self.service.state_dir):
            with contextlib.suppress(OSError):
                if session.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        code = self.end(session)
        assert code in (8, 255), f"without conmon it gave {code}"

    # -- across crashes ----------------------------------------------------------------------------------------------

    def end(self, session: str) -> int:
        """Return a session's exit code, whoever serves."""
        return int(self.insist(lambda: RawApi(self.service.socket).wait_stopped(session)["ExitCode"]))

    def insist(self, ask: Callable[[], T]) -> T:
        """Ask until somebody answers: a crash may cut one question, and then another one."""
        for _ in range(20):
            with contextlib.suppress(*LOST):
                return ask()
            time.sleep(0.1)
        return ask()


def kill_rest(service: Service) -> None:
    """Kill what runs on because a crash has cut off whoever would have ended it."""
    api = RawApi(service.socket)
    for session in api.call("GET", "/exec/json").json:
        if session["Running"]:
            assert api.call("POST", f"/exec/{session['ID']}/kill").status in (204, 409)


def left_behind(service: Service, kept: int) -> list[str]:
    """Say what a service still has when nothing runs any more; waits for it, not for ever."""
    deadline = time.monotonic() + 30
    while True:
        left = [f"session {path.name}" for path in (service.state_dir / "sessions").iterdir()]
        left += [f"conmon {pid}" for pid in monitors(service.state_dir)]
        if (now := len(descriptors(service.keeper))) > kept:
            left.append(f"{now - kept} descriptors in the keeper")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def main() -> int:
    """Run the soak; return 0 when every promise was kept."""
    parser = argparse.ArgumentParser(prog="soak", description="A random mix of everything, and what must hold.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None, help="default: one that is printed")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"soak: seed {seed}, {options.seconds:g} s", flush=True)
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
        containers = [host.run() for host in hosts]
        service = Service.start(directory / "service", hosts)
        try:
            RawApi(service.socket).pipe(containers[0].id, "true")
            kept, memory = len(descriptors(service.keeper)), resident_bytes(service)
            soak = Soak(service, containers, seed, options.seconds)
            soak.run()
            kill_rest(service)
            failures = soak.failures or [f"left behind: {one}" for one in left_behind(service, kept)]
            grown = resident_bytes(service) - memory
            print(f"soak: {dict(sorted(soak.done.items()))}; memory {grown / 2**20:+.1f} MiB")
            for failure in failures:
                print(f"soak: FAILED (seed {seed}): {failure}", file=sys.stderr)
            if failures:
                print(service.log()[-6000:], file=sys.stderr)
            service.assert_clean_log()
        finally:
            service.kill()
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
