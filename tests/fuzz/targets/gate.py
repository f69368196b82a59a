"""What administrators write for the gate, and what the gate has written for those who look later."""

import contextlib
import dataclasses
import io
import math
import zlib

from execgate.gate.audit_chain import Verifier, escape, parse
from execgate.gate.cast import Played, Torn, read_about
from execgate.gate.policy import parse_policy
from execgate.gate.rules import Policy, Refusal
from execgate.gate.tokens import Tokens, read_tokens
from execgate.model.access import Asked, Grant, Verb
from execgate.model.access import Target as Container
from execgate.model.config import ExecConfig, OnDisconnect, ResolvedUser
from execgate.model.container import EngineName
from execgate.model.errors import InvalidArgument
from execgate.model.principal import Method, Principal
from fuzz.target import Target, scratch

_MOST_INFLATED = 64 * 1024 * 1024
"""Bytes of a recording that are looked at: a file of gzip can be a thousand times as large inside."""


# -- policies


_WHO = (
    Principal(method=Method.UNIX, name="0", names=frozenset({"0"}), uid=0, gids=frozenset({0, 27})),
    Principal(method=Method.UNIX, name="1000", names=frozenset({"1000"}), uid=1000, gids=frozenset({1000})),
    Principal(method=Method.CERTIFICATE, name="email:a@b.c", names=frozenset({"email:a@b.c", "dns:b.c"})),
    Principal(method=Method.TOKEN, name="ci", names=frozenset({"ci"})),
)
_WEB = Container(engine=EngineName.DOCKER, names=("web", "pod/web"), image="acme/web:1", labels={"team": "a"})
_ROOT = ResolvedUser(uid=0, gid=0, additional_gids=(0,))
_APP = ResolvedUser(uid=1000, gid=1000, additional_gids=(27, 1000))
_ASKED = (
    Asked(target=_WEB, config=ExecConfig(args=("sh",)), user=_ROOT),
    Asked(target=_WEB, config=ExecConfig(args=("ls", "-l", "/a/b"), env=("PATH=/", "X")), user=_APP),
    Asked(target=_WEB, config=ExecConfig(args=("a",), privileged=True, timeout=90.0), user=_ROOT),
    Asked(target=_WEB, config=ExecConfig(args=("a",), working_dir="/srv/../x"), user=_APP, host_equivalent=("it is",)),
)
_IDS = {("user", "alice"): 1000, ("group", "dev"): 27}


def policies(data: bytes) -> None:
    """A policy: it has mistakes, or every decision by it is one, is explained, and is the same the next time."""
    try:
        policy = parse_policy(data, "policy.toml", lambda kind, name: _IDS.get((kind, name)))
    except InvalidArgument as error:
        assert error.message
        assert all(line.isprintable() for line in error.message.splitlines())
        return
    for who in _WHO:
        for asked in _ASKED:
            _decide(policy, who, asked)


def _decide(policy: Policy, who: Principal, asked: Asked) -> None:
    decision = policy.decide(who, asked)
    allowing = [one.rule for one in policy.explain(who, asked) if not one.failures]
    if isinstance(decision, Refusal):
        assert not allowing
        assert decision.message.isprintable()
        assert decision.visible is policy.shows(who, asked.target)
        return
    assert decision.rule == allowing[0]
    assert policy.shows(who, asked.target)
    assert _unbounded(decision.config) == _unbounded(asked.config)
    again = policy.decide(who, dataclasses.replace(asked, config=decision.config))  # as a start does
    assert isinstance(again, Grant)
    assert again.config == decision.config
    assert policy.permits(who, asked.target, Verb.EXEC, own=True) is not None


def _unbounded(config: ExecConfig) -> ExecConfig:
    """Return an exec without what a rule may set."""
    return dataclasses.replace(config, timeout=None, idle_timeout=None, on_disconnect=OnDisconnect.DOCKER)


# -- tokens


def tokens(data: bytes) -> None:
    """The file of tokens: it is believed or not, and nobody is let in by what is in it."""
    path = scratch() / "tokens"
    path.write_bytes(data)
    path.chmod(0o600)
    kept = Tokens(path)
    for guess in (data[:200].decode(errors="surrogateescape"), "", "0" * 64):
        assert kept.principal(guess) is None
    with contextlib.suppress(InvalidArgument):
        for token in read_tokens(path):
            assert token.name.isascii()
            assert token.name.isprintable()
            assert len(token.sha256) == 64


# -- the audit log


def audit_lines(data: bytes) -> None:
    """An audit log: it is whole or not, its findings can be shown, and a whole one is so in one way only."""
    lines = data.split(b"\n")
    verifier = Verifier(expected_seq=None, expected_hash=None)
    for number, line in enumerate(lines):
        verifier.feed(line, f"audit.log:{number}", whole=number < len(lines) - 1)
        entry = parse(line)
        if entry is not None:
            assert escape(entry.fields).isascii()
    verifier.finish()
    assert len(verifier.breaks) + len(verifier.notes) <= verifier.findings
    assert verifier.whole is not bool(verifier.breaks) or verifier.last is None


# -- recordings


class _Bounded(io.BytesIO):
    """A file that is read in pieces of a bounded size."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 < size <= 1 << 20
        return super().read(size)


def recordings(data: bytes) -> None:
    """A recording, gzip or not: it is none, or its events come in order until it is torn; its head is known, or not."""
    for content in (data, _gzip(data)):
        with contextlib.suppress(InvalidArgument, Torn):
            _play(content)
        about = read_about(_Bounded(content))
        assert about is None or (math.isfinite(about.begun_at) and math.isfinite(about.since))


def _play(content: bytes) -> None:
    size = 0
    for event in Played(_Bounded(content)):
        size += len(event.data)
        assert math.isfinite(event.time)
        if size > _MOST_INFLATED:
            return


def _gzip(data: bytes) -> bytes:
    """Return it as two members."""
    middle = len(data) // 2
    return b"".join(_member(piece) for piece in (data[:middle], data[middle:]))


def _member(data: bytes) -> bytes:
    deflate = zlib.compressobj(1, wbits=zlib.MAX_WBITS | 16)
    return deflate.compress(data) + deflate.flush()


TARGETS = (
    Target(
        check=policies,
        tokens=(
            *(b"[[rule]]\n", b'id = "r"\n', b'who = ["uid:0"]\n', b'"user:alice"', b'"group:dev"', b'"gid:27"'),
            *(b'"cert:*@b.c"', b'"token:c*"', b"containers = ", b"engines = ", b"labels = ", b"images = ", b"users = "),
            *(b"gids = ", b'"0-1000"', b"privileged = true\n", b"host_equivalent = true\n", b'tty = "any"\n'),
            *(b"argv = ", b'[["ls", "**"]]', b"env = ", b"workdirs = ", b"max_time = ", b'"1h"', b"idle_time = "),
            *(b"max_sessions = 1\n", b"on_disconnect = ", b'["kill", "docker"]', b"verbs = ", b"others = "),
            *(b'["exec", "kill"]', b'record = "all"\n', b'record_failure = "closed"\n', b'"*"', b'"**"', b'"[a-z]?"'),
            *(b'"/srv/**"', b'"team=a"', b'"acme/**"', b'["web", "pod/*"]', b'"docker"', b"\n", b"=", b"'", b"\\u0000"),
        ),
    ),
    Target(
        check=tokens,
        is_json=True,
        tokens=(b'"name"', b'"sha256"', b'"created"', b'"expires"', b'"ci"', b"0" * 64, b"1e999", b"\n", b"NaN"),
    ),
    Target(
        check=audit_lines,
        is_json=True,
        tokens=(
            *(b'{"seq":1,', b'"seq"', b'"time"', b'"event"', b'"prev"', b'"lost"', b'"lines"', b'"recovered"', b"\n"),
            *(b'"torn_bytes"', b'"torn_sha256"', b"0" * 64, b"2026-01-01T00:00:00.000000Z", b'"opened"', b"1e999"),
        ),
    ),
    Target(
        check=recordings,
        is_json=True,
        has_first_line=True,
        tokens=(
            *(
                b'{"version":2,"width":80,"height":24}\n',
                b'{"execgate":{}}\n',
                b'[0.5,"o","x"]\n',
                b'"r"',
                b'"m"',
                b'"i"',
            ),
            *(b'"time"', b'"stream"', b'"stdout"', b'"stderr"', b'"stdin"', b'"data"', b'"base64"', b'"note"'),
            *(b'"session"', b'"container"', b'"name"', b'"owner"', b'"rule"', b'"args"', b'"begun"', b'"since"'),
            *(b"\x1f\x8b\x08", b"1e999", b"1" * 400, b"\xff"),
        ),
    ),
)
