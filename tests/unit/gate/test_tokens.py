"""Bearer tokens: what is kept, who is let in, and which files are not believed."""

import errno
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from execgate.gate.tokens import MAX_TOKEN, PREFIX, Tokens, create_token, read_tokens, revoke_token
from execgate.model.errors import Conflict, InvalidArgument, NotFound, Unavailable
from execgate.model.principal import Method


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "etc/tokens"


def test_a_token_stands_for_its_name(path: Path) -> None:
    tokens = Tokens(path)
    secret = create_token(path, "ci")
    principal = tokens.principal(secret)
    assert principal is not None
    assert (principal.method, principal.name, principal.id) == (Method.TOKEN, "ci", "token:ci")
    assert principal.uid is None


def test_only_a_hash_is_kept_and_nobody_else_may_read_it(path: Path) -> None:
    secret = create_token(path, "ci")
    assert secret.startswith(PREFIX)
    assert len(secret) >= len(PREFIX) + 43  # 256 bits in base64
    assert secret.removeprefix(PREFIX) not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["tokens", "tokens.lock"]


@pytest.mark.parametrize("secret", ["", PREFIX, "execgate_x", "é", "\udcff", "x" * (MAX_TOKEN + 1)])
def test_nobody_is_let_in_by_anything_else(path: Path, secret: str) -> None:
    create_token(path, "ci")
    assert Tokens(path).principal(secret) is None


def test_a_hash_is_no_secret(path: Path) -> None:
    create_token(path, "ci")
    (token,) = read_tokens(path)
    assert Tokens(path).principal(token.sha256) is None


def test_without_a_file_there_is_no_token(path: Path) -> None:
    assert Tokens(path).principal("execgate_x") is None
    assert read_tokens(path) == []


def test_a_host_that_was_out_of_descriptors_does_not_cost_the_tokens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(path)
    secret = create_token(path, "ci")
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", _out_of_descriptors)
        assert tokens.principal(secret) is None
    assert tokens.principal(secret) is not None


def _out_of_descriptors(*_: object, **__: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_what_is_revoked_is_void_at_once(path: Path) -> None:
    tokens = Tokens(path)
    secret, other = create_token(path, "ci"), create_token(path, "cd")
    assert tokens.principal(secret) is not None
    revoke_token(path, "ci")
    assert tokens.principal(secret) is None
    assert tokens.principal(other) is not None
    with pytest.raises(NotFound):
        revoke_token(path, "ci")


def test_a_token_expires(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(path)
    secret = create_token(path, "ci", lifetime=60)
    assert tokens.principal(secret) is not None
    (token,) = read_tokens(path)
    monkeypatch.setattr("execgate.gate.tokens.time.time", lambda: token.expires)
    assert tokens.principal(secret) is None
    assert tokens.principal(create_token(path, "ci")) is not None, "the name of an expired one is not free"


def test_a_name_is_taken_once(path: Path) -> None:
    create_token(path, "ci")
    with pytest.raises(Conflict):
        create_token(path, "ci")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "*", "-x", "x" * 65, "ci\n", "é"])
def test_names(path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        create_token(path, name)
    assert not path.exists()


def test_two_administrators_at_once(path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda number: create_token(path, f"t{number}"), range(40)))
    tokens = Tokens(path)
    assert [tokens.principal(secret) is not None for secret in secrets] == [True] * 40


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_reach_is_not_believed(path: Path, mode: int) -> None:
    secret = create_token(path, "ci")
    tokens = Tokens(path)
    assert tokens.principal(secret) is not None
    path.chmod(mode)
    assert tokens.principal(secret) is None
    path.chmod(0o600)
    assert tokens.principal(secret) is not None


def test_a_file_of_somebody_else_is_not_believed(path: Path) -> None:
    secret = create_token(path, "ci")
    os.chown(path, 4321, -1)
    assert Tokens(path).principal(secret) is None


def test_only_a_file_is_read(path: Path) -> None:
    create_token(path, "ci")
    path.rename(path.with_name("real"))
    path.symlink_to(path.with_name("real"))
    with pytest.raises(Unavailable):
        read_tokens(path)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(InvalidArgument):  # and it does not wait for a writer
        read_tokens(path)


GOOD = {"name": "ci", "sha256": "0" * 64, "created": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "1",
        "{}",
        "\xff",
        "[" * 100_000,
        json.dumps(GOOD | {"name": "a b"}),
        json.dumps(GOOD | {"sha256": "0" * 63}),
        json.dumps(GOOD | {"sha256": "G" * 64}),
        json.dumps(GOOD | {"created": "then"}),
        json.dumps(GOOD | {"expires": None}),
        json.dumps(GOOD) + "\nx",
    ],
)
def test_a_file_with_a_broken_line_lets_nobody_in(path: Path, text: str) -> None:
    secret = create_token(path, "good")
    path.write_bytes(path.read_bytes() + text.encode("latin-1"))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_tokens(path)
    assert Tokens(path).principal(secret) is None


def test_a_file_without_an_end(path: Path) -> None:
    create_token(path, "ci")
    os.truncate(path, 64 << 20)
    with pytest.raises(InvalidArgument, match="too large"):
        read_tokens(path)
