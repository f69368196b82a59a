"""The kinds of work. Each knows what must come of it, also when a worker was killed or replaced meanwhile."""

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, pidfd_send_signal
from typing import Any

from execgate.wire.stdcopy import Demultiplexer
from soak.errand import LOST, Cut, Errand, reset
from support.api import Stream
from support.leaks import monitors
from support.raw import request_bytes
from support.runtimes import TestContainer

LINES = 3000
_NUMBERED = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); %sdone; exit 7"
QUICK, SLOW = _NUMBERED % "", _NUMBERED % "[ $((i % 150)) = 0 ] && sleep 0.05; "
NUMBERED = b"".join(b"line %d\n" % number for number in range(LINES))

COUNT = 40_000
COUNTED = b"".join(b"%d\n" % number for number in range(1, COUNT + 1))

POLITE = "trap 'exit 7' TERM; echo; while :; do sleep 0.05; done"
STUBBORN = "trap '' TERM; echo; while :; do sleep 0.05; done"


# -- detached ----------------------------------------------------------------------------------------------------------


def exit_code(errand: Errand) -> None:
    """An exit code."""
    code = errand.dice.randrange(256)
    errand.end(errand.begin("sh", "-c", f"exit {code}"), code)


def parallel(errand: Errand) -> None:
    """Many short ones at once."""
    codes = [errand.dice.randrange(256) for _ in range(12)]
    sessions = [errand.create("sh", "-c", f"exit {code}") for code in codes]

    def run(session: str, code: int) -> None:
        errand.start(session)
        errand.end(session, code)

    with ThreadPoolExecutor(len(codes)) as pool:
        for _ in pool.map(run, sessions, codes):
            pass


def failing(errand: Errand) -> None:
    """What cannot be started says so, in the answer or in the stream, and by its code."""
    command, code = errand.dice.choice([("/etc", 126), ("/etc/passwd", 126), ("nosuch", 127), ("/no/such", 127)])
    if errand.dice.random() < 0.5:
        session = errand.create(command)
        answer = errand.wire.start_detached(session)
        errand.check(answer.status, 400, "a detached start of what is not there")
        assert code == 126 or command in answer.message, answer
    else:
        with errand.open(command) as stream:
            session = stream.id
            output = errand.rest(stream)
        if not output and errand.crashed:
            raise Cut
        assert code == 126 or command.encode() in output, output
    errand.check(errand.stopped(session)["ExitCode"], code, "a failed start")


def killed(errand: Errand) -> None:
    """A tree that is killed."""
    session = errand.begin("sh", "-c", "setsid sleep 999 & sleep 999")
    errand.kill(session)
    errand.end(session, 137)


def stopped(errand: Errand) -> None:
    """A stop asks first, and then does not."""
    script, grace, code = errand.dice.choice([(POLITE, 20.0, 7), (STUBBORN, 0.2, 137)])
    session = errand.begin("sh", "-c", script, CaptureStdout=True)
    deadline = time.monotonic() + 30
    while not errand.logs(session):  # its trap is set once it has written
        if not errand.insist(lambda: errand.api.inspect(session))["Running"]:
            errand.end(session)
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.02)
    moment = errand.unrest.now()
    target = f"/exec/{session}/stop?t={grace}"
    status = errand.insist(lambda: errand.api.call("POST", target)).status
    # The next worker is asked once more, and may find that it has ended.
    assert status == 204 or (status == 409 and errand.unrest.replaced_since(moment)), f"a stop gave {status}"
    errand.end(session, code)


def timed_out(errand: Errand) -> None:
    """A time limit, which a crash must not make longer."""
    session = errand.begin("sleep", "999", Timeout=1)
    errand.end(session, 143, 137)
    assert errand.api.inspect(session)["TimedOut"], "its time was over"


def no_conmon(errand: Errand) -> None:
    """A conmon that is killed: the process goes on, its code is known or said to be unknown."""
    session = errand.begin("sh", "-c", "sleep 1; exit 8")
    for pid in monitors(errand.field.socket.parent / "state"):
        with suppress(OSError), os.fdopen(os.pidfd_open(pid)) as monitor:
            if session[:32].encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                pidfd_send_signal(monitor.fileno(), SIGKILL)
    errand.end(session, 8, unknown=True)


def removed(errand: Errand) -> None:
    """What runs is removed by force only, and then nothing is known of it."""
    session = errand.begin("sh", "-c", "echo; sleep 999", CaptureStdout=True)
    if errand.insist(lambda: errand.api.inspect(session))["Running"]:
        status = errand.insist(lambda: errand.api.call("DELETE", f"/exec/{session}")).status
        errand.check(status, 409, "a removal of what runs")
    errand.remove(session)
    status = errand.insist(lambda: errand.wire.call("GET", f"/exec/{session}/logs")).status
    errand.check(status, 404, "logs after a removal")


def never_started(errand: Errand) -> None:
    """Sessions that nobody starts, and nobody removes."""
    for _ in range(errand.dice.randrange(1, 5)):
        errand.create("true")


# -- captured ----------------------------------------------------------------------------------------------------------


def captured(errand: Errand) -> None:
    """Output that is captured while nobody looks: every byte once, whatever happens to workers."""
    session = errand.begin("sh", "-c", QUICK, CaptureStdout=True)
    errand.end(session, 7)
    errand.check(errand.logs(session), NUMBERED, "captured output")


def captured_terminal(errand: Errand) -> None:
    """The same of a terminal."""
    session = errand.begin("sh", "-c", QUICK, Tty=True, CaptureStdout=True)
    errand.end(session, 7)
    body = errand.insist(lambda: errand.wire.call("GET", f"/exec/{session}/logs")).body
    errand.check(body, NUMBERED.replace(b"\n", b"\r\n"), "captured output of a terminal")


def followed(errand: Errand) -> None:
    """A reader of logs that follows; who is cut off asks again from where it was."""
    session = errand.begin("sh", "-c", SLOW, CaptureStdout=True)
    seen = bytearray()
    while True:
        moment = errand.unrest.now()
        with suppress(*LOST):
            for piece in _follow(errand, session, len(seen)):
                seen += piece
            if seen == NUMBERED:
                break
        errand.check(NUMBERED.startswith(seen), True, f"a followed log, after {len(seen)} bytes")
        if not errand.unrest.crashed_since(moment):
            errand.end(session, 7)  # or it never ran
            raise AssertionError(f"the log ended after {len(seen)} of {len(NUMBERED)} bytes")
    errand.end(session, 7)


def _follow(errand: Errand, session: str, after: int) -> Iterator[bytes]:
    demultiplexer = Demultiplexer()
    with errand.wire.connect() as connection:
        target = f"/exec/{session}/logs?follow=1&after={after}"
        connection.send(request_bytes("GET", target, None, errand.wire.headers))
        head = connection.read_head()
        assert (head.status, head.headers["execgate-offset"]) == (200, str(after)), head
        for chunk in connection.read_chunks():
            for _, piece in demultiplexer.feed(chunk):
                yield piece


def attached_again(errand: Errand) -> None:
    """A client that is cut anywhere, and those that follow it: what they saw together is the output, once."""
    session = errand.create("seq", "1", str(COUNT), AttachStdout=True, CaptureStdout=True, OnDisconnect="keep")
    seen = bytearray()
    stream = errand.wire.attach(session, Detach=False, Tty=False)
    while True:
        moment = errand.unrest.now()
        enough = len(seen) + errand.dice.randrange(1, len(COUNTED))
        with stream, suppress(*LOST):
            _read(stream, seen, enough)
        errand.check(COUNTED.startswith(seen), True, f"a stream with cuts, after {len(seen)} bytes")
        if len(seen) == len(COUNTED):
            break
        if len(seen) < enough and not errand.unrest.crashed_since(moment):
            errand.end(session, 0)
            raise AssertionError(f"the stream ended after {len(seen)} of {len(COUNTED)} bytes")
        stream = errand.insist(lambda: errand.attach(session, f"?after={len(seen)}"))
    errand.end(session, 0)
    errand.check(errand.logs(session), COUNTED, "its captured output")


def _read(stream: Stream, seen: bytearray, enough: int) -> None:
    demultiplexer = Demultiplexer()
    while len(seen) < enough and (data := stream.connection.read()):
        for _, piece in demultiplexer.feed(data):
            seen += piece


def fed(errand: Errand) -> None:
    """Input in requests of its own. One whose answer a crash has taken is made again, and may count twice."""
    script = "while read line; do echo $line; done; exit 9"
    session = errand.begin("sh", "-c", script, AttachStdin=True, CaptureStdout=True, OnDisconnect="keep")
    expected, twice = [], set()
    for number in range(errand.dice.randrange(5, 30)):
        line = b"%d %d" % (number, errand.dice.randrange(10**9))
        expected.append(line)
        if _feed(errand, session, "", line + b"\n"):
            twice.add(line)
        time.sleep(0.02)
    _feed(errand, session, "?eof=1", b"")
    errand.end(session, 9)
    found = errand.logs(session).splitlines()
    once = [line for i, line in enumerate(found) if line not in twice or i == 0 or found[i - 1] != line]
    errand.check(once, expected, "lines of input")


def _feed(errand: Errand, session: str, query: str, data: bytes) -> bool:
    """Send input; return whether that had to be done more than once."""
    tries = 0

    def post() -> int:
        nonlocal tries
        tries += 1
        return errand.api.call("POST", f"/exec/{session}/stdin{query}", data).status

    status = errand.insist(post)
    if (
        status == 409
        and errand.crashed
        and (tries > 1 or not errand.insist(lambda: errand.api.inspect(session))["Pid"])
    ):
        return True
    errand.check(status, 204, "input")
    return tries > 1


# -- attached ----------------------------------------------------------------------------------------------------------


def echo(errand: Errand) -> None:
    """A client with both directions busy, which may notice a crash, and nothing else."""
    with errand.open("cat", stdin=True) as control:
        for number in range(errand.dice.randrange(5, 40)):
            line = b"%d %d\n" % (number, errand.dice.randrange(10**9))
            errand.check(control.echo(line), line, "an echo")
            time.sleep(0.02)
        control.half_close()
        errand.check(errand.rest(control), b"", "what comes behind the end of input")
        errand.end_of_input(control.id, 0)


def streamed(errand: Errand) -> None:
    """Megabytes in both directions."""
    data = errand.dice.randbytes(errand.dice.randrange(1, 6_000_000))
    session = errand.create("cat", AttachStdin=True, AttachStdout=True)
    with errand.wire.attach(session, Detach=False, Tty=False) as stream:
        errand.check(stream.status, 101, "an attached start")

        def send() -> None:
            with suppress(*LOST, OSError):  # the reader has the say: it sees what did not arrive
                stream.send(data)
                stream.half_close()

        sender = threading.Thread(target=send)
        sender.start()
        try:
            errand.check_stream(errand.rest(stream), data, "a stream")
        finally:
            with suppress(OSError):
                stream.connection.socket.shutdown(2)
            sender.join()
    errand.end_of_input(session, 0)


def poured(errand: Errand) -> None:
    """Output to a client that takes its time."""
    with errand.open("sh", "-c", QUICK) as stream:
        time.sleep(errand.dice.uniform(0, 0.3))
        errand.check_stream(errand.rest(stream), NUMBERED, "output")
        errand.end(stream.id, 7)


def said_once(errand: Errand) -> None:
    """A process that says one thing and then nothing: its client hears it."""
    with errand.open("sh", "-c", "echo here; sleep 999", tty=errand.dice.random() < 0.5) as stream:
        errand.shown(stream, b"here")
        errand.kill(stream.id)
        errand.rest(stream)
        errand.end(stream.id, 137)


def terminal(errand: Errand) -> None:
    """A shell in a terminal: what is typed is run, and it has the size that it was given."""
    with errand.open("sh", stdin=True, tty=True) as stream:
        for _ in range(errand.dice.randrange(1, 6)):
            a, b = errand.dice.randrange(10**6), errand.dice.randrange(10**6)
            height, width = errand.dice.randrange(10, 200), errand.dice.randrange(40, 400)
            errand.resize(stream.id, height, width)
            # conmon is told; when it does so has no event
            sized = f'until [ "$(stty size)" = "{height} {width}" ]; do sleep 0.02; done'
            stream.send(f"{sized}; echo $(({a}+{b}))\n".encode())
            errand.shown(stream, b"\n%d\r\n" % (a + b))
        code = errand.dice.randrange(256)
        stream.send(b"exit %d\n" % code)
        errand.rest(stream)
        errand.end_of_input(stream.id, code)


def vanished(errand: Errand) -> None:
    """A client that goes, in one way or another, and what its creator wanted to become of the process then."""
    policy = errand.dice.choice(["kill", "hup", "keep", ""])
    way = errand.dice.choice(["close", "unread", "half-close", "reset"])
    script = "trap 'exit 9' HUP; echo; cat >/dev/null; [ $0 = none ] && exit 5; while :; do sleep 0.05; done"
    wire = errand.wire if way == "reset" else errand.api  # over TCP only a reset tells at once
    session = errand.create("sh", "-c", script, policy or "none", AttachStdin=True, AttachStdout=True,
                            OnDisconnect=policy)  # fmt: skip
    with wire.attach(session, Detach=False, Tty=False) as stream:
        errand.check(stream.status, 101, "an attached start")
        if way != "unread":
            stream.connection.read_exactly(9)  # its trap is set
        if way == "half-close":
            stream.half_close()
        time.sleep(errand.dice.uniform(0.05, 0.2))
        if way == "reset":
            reset(stream)
    if policy == "keep":
        time.sleep(0.2)
        if not errand.insist(lambda: errand.api.inspect(session))["Running"]:
            errand.end(session, -1)
        errand.kill(session)
    elif errand.crashed:
        raise Cut  # it is the next worker that waits for somebody to attach again, for a minute
    # A hang-up before the trap was set ends the shell: 129.
    codes = {"kill": (137,), "hup": (9, 129) if way == "unread" else (9,), "keep": (137,), "": (5,)}
    try:
        errand.end(session, *codes[policy])
    except (AssertionError, TimeoutError) as error:
        if errand.crashed:
            raise Cut from error
        raise AssertionError(f"OnDisconnect {policy!r}, {way}: {error}") from error


# -- others' programs, other routes ------------------------------------------------------------------------------------


def docker_codes(errand: Errand) -> None:
    """The docker CLI's exit codes."""
    code = errand.dice.randrange(256)
    cases: list[tuple[Sequence[str], int]] = [(["sh", "-c", f"exit {code}"], code), (["/etc"], 126), (["nosuch"], 127)]
    argv, expected = errand.dice.choice(cases)
    done = errand.field.docker("exec", errand.container.id, *argv)
    if done.returncode != expected and errand.crashed:
        raise Cut
    errand.check(done.returncode, expected, f"docker exec {argv}: {done.stdout!r} {done.stderr!r}")


def docker_pipe(errand: Errand) -> None:
    """The docker CLI in a pipe, with and without -i."""
    data = errand.dice.randbytes(errand.dice.randrange(1, 1_000_000))
    interactive = errand.dice.random() < 0.7
    done = errand.field.docker("exec", *["-i"] * interactive, errand.container.id, "cat", input=data)
    errand.check_stream(done.stdout, data if interactive else b"", "docker exec cat")
    if done.returncode and errand.crashed:
        raise Cut
    errand.check((done.returncode, done.stderr), (0, b""), "docker exec cat")


def run(errand: Errand) -> None:
    """One request. Who loses its answer to a crash finds the session by its label."""
    code, text = errand.dice.randrange(256), secrets.token_hex(errand.dice.randrange(1, 5000))
    body = {
        "Cmd": ["sh", "-c", f"cat; echo error >&2; exit {code}"],
        "Stdin": text,
        "Labels": {"errand": errand.name},
    }
    try:
        answer = errand.api.call("POST", f"/containers/{errand.container.id}/exec/run", body)
    except LOST as error:
        errand.sessions += errand.labelled()
        if not errand.crashed:
            raise
        raise Cut from error
    errand.sessions += errand.labelled()
    errand.check(answer.status, 200, "a run")
    found = answer.json
    shown = {key: found[key] for key in ("ExitCode", "Stdout", "Stderr", "TimedOut", "Truncated", "Error")}
    errand.check(
        shown,
        {"ExitCode": code, "Stdout": text, "Stderr": "error\n", "TimedOut": False, "Truncated": False, "Error": ""},
        "a run",
    )


def watched(errand: Errand) -> None:
    """A listener of events hears all of a session, in order, once."""
    code, told = errand.dice.randrange(256), list[Any]()
    try:
        with errand.api.events(filters={"container": [errand.container.id]}) as events:
            session = errand.begin("sh", "-c", f"exit {code}")
            for event in events:
                if event["Actor"]["Attributes"]["execID"] == session:
                    told.append((event["Action"].partition(":")[0], event["Actor"]["Attributes"].get("exitCode")))
                    if told[-1][0] == "exec_die":
                        break
    except LOST as error:
        if not errand.crashed:
            raise
        raise Cut from error
    if errand.crashed:
        raise Cut
    errand.check(told, [("exec_create", None), ("exec_start", None), ("exec_die", str(code))], "events")


def recreated(errand: Errand) -> None:
    """A container of its own, killed under its sessions and made anew: 137, and a session is of one incarnation."""
    host = errand.dice.choice(errand.field.hosts)
    victim = host.run()
    try:
        running = errand.create("sh", "-c", "echo here; sleep 999", container=victim.id, CaptureStdout=True)
        errand.start(running)
        waiting = errand.create("true", container=victim.id)
        with errand.open("sh", "-c", "echo here; sleep 999", container=victim.id, tty=True) as stream:
            errand.shown(stream, b"here\r\n")
            victim.kill()
            errand.rest(stream)
            errand.end(stream.id, 137)
        errand.end(running, 137)
        victim.delete()
        _bury(victim)
        victim = host.run(victim.id)
        status = errand.insist(lambda: errand.wire.start_detached(waiting)).status
        errand.check(status, 409, "a start in the next incarnation")
        errand.end(errand.begin("sh", "-c", "exit 3", container=victim.id), 3)
    finally:
        victim.delete()
        _bury(victim)


def _bury(container: TestContainer) -> None:
    shutil.rmtree(container.bundle)


Kind = Callable[[Errand], None]

KINDS: Sequence[Kind] = (
    exit_code, parallel, failing, killed, stopped, timed_out, no_conmon, removed, never_started,
    captured, captured_terminal, followed, attached_again, fed,
    echo, streamed, poured, said_once, terminal, vanished,
    docker_codes, docker_pipe, run, watched,
)  # fmt: skip
"""What every hand does; `recreated` is the work of a hand of its own."""
