"""What is told: who, what, where, by which rule, and how it ended; bounded, and without anybody's secrets."""

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from execgate import cli
from execgate.gate.access import Journal
from execgate.gate.audit import Audit, NoAudit, open_audit
from execgate.gate.audit_chain import MAX_LINE
from execgate.gate.audit_log import AuditSettings
from execgate.gate.rules import Refusal
from execgate.model.access import Asked, Grant, Target, Verb
from execgate.model.config import ExecConfig, ResolvedUser
from execgate.model.container import Container, ContainerStatus, EngineName, OciRuntime
from execgate.model.errors import StartFailed
from execgate.model.ids import ContainerId
from execgate.model.principal import Method, Principal
from execgate.model.process import ProcessIdentity
from execgate.model.session import ByteCounts, ExecSession, ExitSource, ExitStatus, SessionState
from execgate.sessions.events import EventBus
from execgate.sessions.ledger import Ledger
from execgate.sessions.store import SessionStore
from support.records import new_session

ALICE = Principal(
    method=Method.CERTIFICATE, name="alice@example.org", names=frozenset({"alice@example.org", "alice.example.org"})
)
USER = Principal(method=Method.UNIX, name="1000", names=frozenset({"1000"}), uid=1000, gids=frozenset({1000}), pid=77)
WEB = Container(
    id=ContainerId("c0ffee" * 10), name="web", runtime=OciRuntime("runc", Path("/bin/runc"), Path("/run/runc")),
    bundle=Path("/bundle"), status=ContainerStatus.RUNNING, created=0.0,
)  # fmt: skip
TARGET = Target(engine=EngineName.DOCKER, names=("web", "web-alias"), image="nginx")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


@pytest.fixture
def audit(path: Path) -> Iterator[Audit]:
    with open_audit(AuditSettings(anchor=path.with_name("anchor"), path=path), version="1.2.3") as audit:
        yield audit


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def last(path: Path) -> dict[str, Any]:
    """Return the last entry without what every entry has."""
    return {name: value for name, value in entries(path)[-1].items() if name not in ("seq", "time", "prev")}


def test_a_service_says_that_it_begins_and_ends(path: Path) -> None:
    settings = AuditSettings(anchor=path.with_name("anchor"), path=path, strict=True)
    with open_audit(settings, version="1.2.3"):
        pass
    opened, closed = entries(path)
    assert (opened["event"], opened["version"], opened["strict"], opened["sync"]) == ("opened", "1.2.3", True, False)
    assert opened["prev"] == "0" * 64
    assert closed["event"] == "closed"


def test_a_session_from_its_creation_to_its_end(path: Path, audit: Audit, tmp_path: Path) -> None:
    """Told by the ledger, each step before it is on record."""
    store = SessionStore(tmp_path / "sessions.db", boot_id="boot")
    ledger = Ledger(store, EventBus(), audit)
    created = replace(
        new_session(
            container="web", args=("sh", "-c", "true"), user="app", tty=True, env=("TOKEN=hunter2", "BARE"),
            timeout=9.5, working_dir="/srv",
        ),
        owner="unix:1000", rule="devs", image="nginx", engine=EngineName.DOCKER,
        user=ResolvedUser(uid=10, gid=20, additional_gids=(20, 30)),
    )  # fmt: skip
    ledger.created(created)
    of = {"session": created.id, "who": "unix:1000", "container_id": "web", "container_name": "web"}
    command = {"argv": ["sh", "-c", "true"], "uid": 10, "gid": 20, "tty": True}
    assert last(path) == {
        "event": "created", **of, "rule": "devs", "engine": "docker", "image": "nginx", **command, "user": "app",
        "gids": [20, 30], "cwd": "/srv", "env": ["TOKEN", "BARE"], "timeout": 9.5,
    }  # fmt: skip
    starting = ledger.starting(created)
    assert last(path) == {"event": "start", **of, **command}
    running = ledger.running(starting, ProcessIdentity(4_000_001, 5), None)
    assert last(path) == {"event": "running", **of, "pid": 4_000_001, "start_time": 5}
    ended = ledger.stopped(
        running, ExitStatus(7, ExitSource.SYNC_PIPE), timed_out=True, transferred=ByteCounts(1, 2, 3)
    )
    assert ended.started_at is not None
    assert ended.finished_at is not None
    assert last(path) == {
        "event": "exit", **of, "code": 7, "source": "sync-pipe", "timed_out": True,
        "seconds": round(ended.finished_at - ended.started_at, 6),
        "stdin_bytes": 1, "stdout_bytes": 2, "stderr_bytes": 3,
    }  # fmt: skip
    assert b"hunter2" not in path.read_bytes()
    store.close()


def test_a_start_that_failed(path: Path, audit: Audit) -> None:
    error = StartFailed("exec: no\x1b[31msuch: not found", 127)
    failed = replace(
        new_session(),
        state=SessionState.STOPPED,
        exit=ExitStatus(error.exit_code, ExitSource.START_FAILURE),
        error=error.message,
    )
    audit.step(failed)
    told = last(path)
    assert (told["code"], told["source"], told["error"]) == (127, "start-failure", error.message)
    assert b"\x1b" not in path.read_bytes()


def test_decisions(path: Path, audit: Audit) -> None:
    config = ExecConfig(args=("id",), env=("PASSWORD=hunter2",), privileged=True)
    asked = Asked(target=TARGET, config=config, user=ResolvedUser(uid=0, gid=0), host_equivalent=("privileged",))
    audit.decided(USER, WEB, asked, Refusal("you may not", "no rule allows uid 0 in web", visible=True))
    what = {
        "verb": "exec", "container_id": WEB.id, "container_name": "web", "engine": "docker", "image": "nginx",
    }  # fmt: skip
    request = {"argv": ["id"], "uid": 0, "gid": 0, "privileged": True, "user": "", "gids": [], "env": ["PASSWORD"]}
    who = {"who": "unix:1000", "peer_uid": 1000, "peer_pid": 77}
    host = {"host_equivalent": ["privileged"]}
    why = {"reason": "you may not", "hint": "no rule allows uid 0 in web"}
    assert last(path) == {"event": "denied", **who, **what, **why, **request, **host}
    grant = Grant(owner=ALICE.id, rule="ops", config=replace(config, timeout=60.0))
    audit.decided(ALICE, WEB, asked, grant)
    who = {"who": "cert:alice@example.org", "names": ["alice.example.org"]}
    assert last(path) == {"event": "allowed", **who, **what, "rule": "ops", **request, "timeout": 60.0, **host}
    assert b"hunter2" not in path.read_bytes()


def test_what_is_asked_of_a_session(path: Path, audit: Audit) -> None:
    journal: Journal = audit
    session = replace(new_session(container="web"), owner="unix:0")
    who = {"who": "unix:1000", "peer_uid": 1000, "peer_pid": 77}
    of = {"session": session.id, "container_id": "web", "container_name": "web"}
    journal.attached(USER, session, stdin=True)
    assert last(path) == {"event": "attach", **who, **of, "stdin": True}
    journal.used(USER, session, Verb.LOGS)
    assert last(path) == {"event": "use", **who, **of, "verb": "logs"}
    journal.signalled(USER, session, "9")
    assert last(path) == {"event": "signal", **who, **of, "signal": "SIGKILL"}
    journal.signalled(USER, session, "37")
    assert last(path)["signal"] == "37"
    journal.signalled(USER, session, "stop")
    assert last(path) == {"event": "stop", **who, **of}
    journal.removed(USER, session)
    assert last(path) == {"event": "remove", **who, **of}
    journal.removed(USER, replace(session, state=SessionState.RUNNING))
    assert last(path) == {"event": "remove", **who, **of, "running": True}
    journal.refused(USER, session, Verb.KILL)
    assert last(path) == {"event": "denied", **who, "verb": "kill", **of, "owner": "unix:0"}


def test_a_disabled_one_is_nobody(tmp_path: Path) -> None:
    """It takes everything, and leaves nothing."""
    with open_audit(AuditSettings(anchor=tmp_path / "anchor"), version="1") as audit:
        assert isinstance(audit, NoAudit)
        audit.step(new_session())
        asked = Asked(target=TARGET, config=ExecConfig(args=()), user=ResolvedUser(uid=0, gid=0))
        audit.decided(USER, WEB, asked, Refusal("", "", visible=True))
        audit.refused(USER, new_session(), Verb.KILL)
        audit.attached(USER, new_session(), stdin=False)
        audit.signalled(USER, new_session(), "9")
        audit.removed(USER, new_session())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [4093, 4094, 5000, 3_000_000])
def test_a_long_command_is_told_by_its_hash(path: Path, audit: Audit, size: int) -> None:
    """The hash of what /proc/PID/cmdline would hold: whoever has the command can compare."""
    audit.step(new_session(args=("x" * size,)))
    told = last(path)
    cmdline = b"x" * size + b"\0"
    if size <= 4093:
        assert told["argv"] == ["x" * size]
        assert "argv_bytes" not in told
    else:
        assert told["argv"] == ["x" * 4093]
        assert (told["argv_bytes"], told["argv_sha256"]) == (len(cmdline), hashlib.sha256(cmdline).hexdigest())


def test_many_arguments(path: Path, audit: Audit) -> None:
    audit.step(new_session(args=("\xe4\xf6\xfc",) * 100_000))
    told = last(path)
    assert 180 < len(told["argv"]) < 200, "each takes 21 bytes, 18 of them for its three letters"
    assert told["argv"][0] == "\xe4\xf6\xfc"
    assert told["argv_bytes"] == 700_000


@pytest.mark.parametrize("character", ["x", "\x01", "\x7f", "\xff", "\uffff", "\U0001f600", "\ud800"])
def test_an_entry_is_bounded(path: Path, audit: Audit, character: str) -> None:
    """Whatever is asked for by whomever, and however JSON has to spell it."""
    long = character * 10_000
    config = ExecConfig(
        args=(long,) * 100, env=tuple(f"{character}{number}=secret" for number in range(10_000)), user=long,
        working_dir=long,
    )  # fmt: skip
    session = new_session()
    session = replace(
        session, config=config, owner=long, rule=long, image=long, error=long,
        user=ResolvedUser(uid=2**31, gid=2**31, additional_gids=tuple(range(2**31, 2**31 + 10_000))),
        container=replace(session.container, container_id=ContainerId(long), name=long),
    )  # fmt: skip
    for state in SessionState:
        audit.step(replace(session, state=state))
    principal = Principal(method=Method.CERTIFICATE, name=long, names=frozenset(f"{n}{long}" for n in range(100)))
    target = Target(engine=EngineName.DOCKER, names=(long,), image=long)
    asked = Asked(target=target, config=config, user=session.user, host_equivalent=(long,) * 100)
    container = replace(WEB, id=ContainerId(long), name=long)
    audit.decided(principal, container, asked, Refusal(long, long, visible=False))
    audit.decided(principal, container, asked, Grant(owner=long, rule=long, config=config))
    audit.refused(principal, session, Verb.EXEC)
    audit.signalled(principal, session, long)
    lines = path.read_bytes().splitlines()
    assert len(lines) == 9
    assert max(map(len, lines)) < MAX_LINE - 1024
    assert min(len(line) for line in lines if b"argv" in line) > 4000
    assert b"secret" not in path.read_bytes()


# -- the command line


def told(audit: Audit) -> ExecSession:
    """Tell of three sessions."""
    sessions = [
        replace(new_session(container="web", args=("sh", "-c", "\x1b[31mred")), owner="unix:1000"),
        replace(new_session(container="web"), owner="unix:1001"),
        replace(new_session(container="db"), owner="unix:1000"),
    ]
    for session in sessions:
        audit.step(session)
        audit.step(replace(session, state=SessionState.STOPPED, exit=ExitStatus(0, ExitSource.SYNC_PIPE)))
    return sessions[0]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[str]:
    capsys.readouterr()
    assert cli.main(["audit", "show", *arguments]) == code
    return capsys.readouterr().out.splitlines()


def test_show(path: Path, audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    session = told(audit)
    file = str(path)
    lines = shown(capsys, file)
    assert [line.split()[1] for line in lines] == ["opened", *["created", "exit"] * 3]
    assert r"argv=[sh -c '\x1b[31mred']" in lines[1]
    assert "\x1b" not in "".join(lines)
    assert len(shown(capsys, file, "--who", "unix:1000")) == 4
    assert len(shown(capsys, file, "--container", "db")) == 2
    assert len(shown(capsys, file, "--session", session.id[:12])) == 2
    assert len(shown(capsys, file, "--event", "exit", "--event", "opened")) == 4
    assert shown(capsys, file, "--who", "nobody") == []
    found = [json.loads(line) for line in shown(capsys, file, "--json", "--session", session.id)]
    assert [one["event"] for one in found] == ["created", "exit"]


def test_show_obeys_no_byte_of_a_file(path: Path, audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever may write it may write what he wants."""
    told(audit)
    entry = b'{"seq":1,"event":"e\x7f","who":"\xc2\x9b31m\xe2\x80\xae","x\x7f":["\x7f"],"prev":"' + b"0" * 64 + b'"}\n'
    path.write_bytes(entry + b"\x1b[2J no entry\n")
    for form in ((), ("--json",)):
        (line,) = shown(capsys, str(path), *form, code=1)
        assert line.isprintable()
        assert line.isascii()


def test_the_configured_file(
    path: Path, audit: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXECGATE_AUDIT_FILE", raising=False)
    config = tmp_path / "execgate.toml"
    config.write_text(f'audit_file = "{path}"\n')
    told(audit)
    assert len(shown(capsys, "--config", str(config))) == 7
    assert cli.main(["audit", "verify", "--config", str(config)]) == 0
    config.write_text('audit_file = ""\n')
    assert cli.main(["audit", "verify", "--config", str(config)]) == cli.EXIT_USAGE


def test_verify_says_what_to_note(path: Path, audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    """And takes it again."""
    told(audit)
    assert cli.main(["audit", "verify", str(path)]) == 0
    (noted,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("last ")]
    assert noted.split()[1:] == [
        *("--expect-seq", "7", "--expect-hash"), hashlib.sha256(path.read_bytes().splitlines()[-1]).hexdigest()
    ]  # fmt: skip
    again = ["audit", "verify", *noted.split()[1:], str(path)]
    told(audit)
    assert cli.main(again) == 0
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:6]))
    assert cli.main(again) == cli.EXIT_FAILURE
    assert "MISSING" in capsys.readouterr().out
    assert cli.main(["audit", "verify", "--expect-hash", "abc", str(path)]) == cli.EXIT_USAGE


def test_verify_standard_input(
    path: Path, audit: Audit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told(audit)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert cli.main(["audit", "verify", "-"]) == 0
    assert "7 entries, seq 1 to 7" in capsys.readouterr().out


def test_what_cannot_be_read_is_a_usage_error(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (path, path.parent):
        assert cli.main(["audit", "verify", str(name)]) == cli.EXIT_USAGE
        assert str(name) in capsys.readouterr().err
    path.touch()
    assert cli.main(["audit", "verify", str(path)]) == 0
    assert "no entries" in capsys.readouterr().out
