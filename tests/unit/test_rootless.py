"""Whose process this is, and the way to the user's Podman where that is not on this machine, or says no."""

import os
import subprocess
from pathlib import Path

import pytest

from execgate import rootless
from execgate.model.errors import Unavailable

INITIAL = "         0          0 4294967295\n"
PODMAN = "         0       1001          1\n         1     100000      65536\n"


@pytest.mark.parametrize(
    ("uid", "uid_map", "outside"),
    [
        (0, INITIAL, 0),
        (1001, INITIAL, 1001),
        (0, PODMAN, 1001),
        (1, PODMAN, 100000),
        (65536, PODMAN, 165535),
        (65537, PODMAN, 65537),
        (65534, "", 65534),
    ],
)
def test_outside(uid: int, uid_map: str, outside: int) -> None:
    assert rootless.outside(uid, uid_map) == outside


def test_user_id_is_the_same_in_a_user_namespace() -> None:
    code = "from execgate.rootless import user_id; import os; print(os.getuid(), user_id())"
    environment = os.environ | {"PYTHONPATH": str(Path(rootless.__file__).parents[1])}
    for argv, inside in (([], os.getuid()), (["unshare", "--user", "--map-user=7"], 7)):
        done = subprocess.run([*argv, "python3", "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [str(inside), str(os.getuid())], done.stderr


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has no Podman."""
    monkeypatch.setattr(os, "getuid", lambda: 1001)
    return {"PATH": str(tmp_path)}


def give_podman(environ: dict[str, str], script: str) -> None:
    podman = Path(environ["PATH"]) / "podman"
    podman.write_text(f"#!/bin/sh\n{script}\n")
    podman.chmod(0o755)


def test_root_stays_where_it_is(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    give_podman(environ, "exit 9")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert rootless.enter_podman(environ) is False


def test_without_podman_there_is_nowhere_to_go(environ: dict[str, str]) -> None:
    assert rootless.enter_podman(environ) is False


@pytest.mark.parametrize(
    ("script", "hint"),
    [
        ("[ $1 = unshare ] && echo one >&2 && echo 'no newuidmap' >&2; exit 125", "podman unshare: no newuidmap"),
        ("printf '\\033[2J' >&2", "podman unshare: \\x1b[2J"),
        ("echo no number; read -r _", "podman unshare: "),
        ("echo 999999999; read -r _", "the namespaces of process 999999999: No such file or directory"),
        # A user namespace cannot be entered twice: here it is our own.
        ("echo $$; read -r _", "the namespaces of process "),
    ],
)
def test_a_podman_that_leads_nowhere(environ: dict[str, str], script: str, hint: str) -> None:
    namespaces = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("user", "mnt")}
    give_podman(environ, script)
    with pytest.raises(Unavailable) as caught:
        rootless.enter_podman(environ)
    assert caught.value.hint.startswith(hint)
    assert {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in namespaces} == namespaces


def test_a_podman_that_does_not_answer(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootless, "_GUIDE_TIMEOUT", 0.1)
    give_podman(environ, "read -r _")
    with pytest.raises(Unavailable, match="cannot enter") as caught:
        rootless.enter_podman(environ)
    assert caught.value.hint == "podman unshare does not answer"


def test_a_podman_that_cannot_be_run(environ: dict[str, str]) -> None:
    give_podman(environ, "")
    (Path(environ["PATH"]) / "podman").write_text("#!/nonexistent/interpreter\n")
    with pytest.raises(Unavailable, match="podman cannot be run"):
        rootless.enter_podman(environ)
