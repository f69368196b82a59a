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
    (tmp_path / "bin").mkdir()
    pid_file = tmp_path / rootless.PAUSE_PID
    pid_file.parent.mkdir(parents=True)
    return {"XDG_RUNTIME_DIR": str(tmp_path), "PATH": str(tmp_path / "bin")}


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


@pytest.mark.parametrize("directory", [None, "", "run/user/1001"])
def test_without_a_runtime_directory(
    environ: dict[str, str], directory: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    give_podman(environ, "exit 9")
    del environ["XDG_RUNTIME_DIR"]
    given = environ if directory is None else environ | {"XDG_RUNTIME_DIR": directory}
    assert rootless.enter_podman(given) is False
    assert "XDG_RUNTIME_DIR" in caplog.text


def test_a_podman_that_says_no_is_quoted(environ: dict[str, str]) -> None:
    give_podman(environ, "[ \"$*\" = 'unshare true' ] && echo one >&2 && echo 'no newuidmap' >&2; exit 125")
    with pytest.raises(Unavailable) as caught:
        rootless.enter_podman(environ)
    assert caught.value.hint == "podman unshare true: no newuidmap"


@pytest.mark.parametrize("content", ["", "x", "999999999", str(os.getpid())])
def test_a_pid_file_that_names_no_pause_process(environ: dict[str, str], content: str) -> None:
    """Nobody is joined who only has the number of one: here this test itself."""
    namespaces = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("user", "mnt")}
    pid_file = Path(environ["XDG_RUNTIME_DIR"]) / rootless.PAUSE_PID
    pid_file.write_text(content)
    give_podman(environ, "exit 0")
    with pytest.raises(Unavailable) as caught:
        rootless.enter_podman(environ)
    assert str(pid_file) in caught.value.hint
    assert {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in namespaces} == namespaces


def test_a_podman_that_cannot_be_run(environ: dict[str, str]) -> None:
    give_podman(environ, "")
    (Path(environ["PATH"]) / "podman").write_text("#!/nonexistent/interpreter\n")
    with pytest.raises(Unavailable) as caught:
        rootless.enter_podman(environ)
    assert "podman unshare true" in caught.value.hint
