"""Reading inside the root of a real process that a hostile image could be."""

import ctypes
import errno
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from execgate.model.errors import Internal, NotFound, Unavailable
from execgate.runtime import rootfs
from execgate.runtime.rootfs import DEFAULT_LIMIT, read_in_container

_CHROOTED = """
import os, sys
os.chroot(sys.argv[1])
os.chdir("/")
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The container's root; `outside` beside it is the host's."""
    (tmp_path / "outside").write_bytes(b"the host's own\n")
    (tmp_path / "root" / "etc").mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def pid(root: Path) -> Iterator[int]:
    """A process whose root is `root`."""
    command = [sys.executable, "-c", _CHROOTED, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


def test_reads_a_file(root: Path, pid: int) -> None:
    (root / "etc/passwd").write_bytes(b"root:x:0:0\n")
    assert read_in_container(pid, "/etc/passwd") == b"root:x:0:0\n"
    assert read_in_container(pid, "etc/passwd") == b"root:x:0:0\n"


@pytest.mark.parametrize("path", ["/etc/passwd", "/nowhere/passwd", "", "/", "/etc"])
def test_what_is_missing_or_a_directory_is_empty(pid: int, path: str) -> None:
    assert read_in_container(pid, path) == b""


@pytest.mark.parametrize("depth", [0, 1, 30])
def test_a_symlink_cannot_leave_the_root(root: Path, pid: int, depth: int) -> None:
    outside = root.parent / "outside"
    target = "../" * depth + str(outside).lstrip("/") if depth else str(outside)
    (root / "etc/passwd").symlink_to(target)
    assert read_in_container(pid, "/etc/passwd") == b""
    assert read_in_container(pid, "/../outside") == b""


def test_a_symlink_within_the_root_is_followed(root: Path, pid: int) -> None:
    """Absolute, and so resolved against the container's root: NixOS and others have such a passwd."""
    (root / "store").mkdir()
    (root / "store/passwd").write_bytes(b"inside\n")
    (root / "etc/passwd").symlink_to("/../../store/passwd")
    assert read_in_container(pid, "/etc/passwd") == b"inside\n"


def test_a_symlinked_directory_cannot_leave_the_root(root: Path, pid: int) -> None:
    (root / "away").symlink_to(root.parent)
    assert read_in_container(pid, "/away/outside") == b""


def test_loops_of_symlinks_are_empty(root: Path, pid: int) -> None:
    (root / "etc/passwd").symlink_to("group")
    (root / "etc/group").symlink_to("passwd")
    assert read_in_container(pid, "/etc/passwd") == b""


def test_a_fifo_is_neither_opened_nor_waited_for(root: Path, pid: int) -> None:
    os.mkfifo(root / "etc/passwd")
    assert read_in_container(pid, "/etc/passwd") == b""
    with pytest.raises(OSError) as caught:  # a writer finds no reader: nobody had it open
        os.open(root / "etc/passwd", os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO


def test_devices_and_sockets_are_empty(root: Path, pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mknod(root / "etc/zero", 0o666 | 0o020000, os.makedev(1, 5))
    assert read_in_container(pid, "/etc/zero") == b""
    monkeypatch.chdir(root)  # a socket's path is short or relative
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("etc/socket")
        assert read_in_container(pid, "/etc/socket") == b""


def test_the_limit(root: Path, pid: int) -> None:
    passwd = root / "etc/passwd"
    passwd.write_bytes(b"x" * DEFAULT_LIMIT)
    assert len(read_in_container(pid, "/etc/passwd")) == DEFAULT_LIMIT
    passwd.write_bytes(b"x" * (DEFAULT_LIMIT + 1))
    assert read_in_container(pid, "/etc/passwd") == b""
    os.truncate(passwd, 1 << 30)
    assert read_in_container(pid, "/etc/passwd") == b""
    assert read_in_container(pid, "/etc/passwd", limit=3) == b""


def test_a_file_whose_size_says_nothing_is_bounded_too() -> None:
    """Files of /proc have size 0, and what a FUSE file says may be a lie."""
    assert read_in_container(os.getpid(), "/proc/self/maps", limit=100) == b""
    assert len(read_in_container(os.getpid(), "/proc/self/maps")) > 100


def test_magic_links_are_not_followed(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        file.write(b"open")
        file.flush()
        me = os.getpid()
        assert read_in_container(me, f"/proc/self/fd/{file.fileno()}") == b""
        assert read_in_container(me, f"/proc/{me}/root{tmp_path}/file") == b""
        assert read_in_container(me, f"/proc/{me}/cwd/pyproject.toml") == b""
        assert read_in_container(me, f"{tmp_path}/file") == b"open"


def test_a_path_with_nul_or_far_too_long_is_empty(pid: int) -> None:
    assert read_in_container(pid, "/" + "x" * 300) == b""
    assert read_in_container(pid, "/x" * 5000) == b""
    assert read_in_container(pid, "/etc/\0passwd") == b""


def test_a_process_that_is_gone(pid: int) -> None:
    with subprocess.Popen(["true"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NotFound):
            read_in_container(zombie.pid, "/etc/passwd")
    with pytest.raises(NotFound):
        read_in_container(2**31 - 1, "/etc/passwd")


def test_a_swap_between_the_look_and_the_read_changes_nothing(
    root: Path, pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwd = root / "etc/passwd"
    passwd.write_bytes(b"looked at\n")
    opened = rootfs._open_below

    def open_and_swap(directory: int, path: str) -> int:
        fd = opened(directory, path)
        passwd.unlink()
        passwd.symlink_to(root.parent / "outside")
        return fd

    monkeypatch.setattr(rootfs, "_open_below", open_and_swap)
    assert read_in_container(pid, "/etc/passwd") == b"looked at\n"


def test_renames_meanwhile_never_show_the_host(root: Path, pid: int) -> None:
    """RESOLVE_IN_ROOT against a directory that moves about: it may miss, and it never escapes."""
    (root / "a/b/c").mkdir(parents=True)
    (root / "outside").write_bytes(b"inside\n")
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            (root / "a/b").rename(root / "b")
            (root / "b").rename(root / "a/b")

    mover = threading.Thread(target=move)
    mover.start()
    try:
        seen = {read_in_container(pid, "/a/b/c/../../../../../outside") for _ in range(2000)}
    finally:
        stop.set()
        mover.join()
    assert seen <= {b"", b"inside\n"}
    assert b"inside\n" in seen


def _fail_with(code: int) -> Callable[..., int]:
    def syscall(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    return syscall


@pytest.mark.parametrize(
    ("code", "category", "hint"),
    [(errno.ENOSYS, Unavailable, "openat2"), (errno.EMFILE, Unavailable, "Too many"), (errno.EIO, None, "")],
)
def test_what_the_kernel_cannot_do(
    monkeypatch: pytest.MonkeyPatch, code: int, category: type[Unavailable] | None, hint: str
) -> None:
    monkeypatch.setattr(rootfs._libc, "syscall", _fail_with(code))
    if category is None:
        assert read_in_container(os.getpid(), "/etc/passwd") == b""
        return
    with pytest.raises(category) as caught:
        read_in_container(os.getpid(), "/etc/passwd")
    assert hint in caught.value.hint


def test_endless_renames_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootfs._libc, "syscall", _fail_with(errno.EAGAIN))
    assert read_in_container(os.getpid(), "/etc/passwd") == b""


def test_without_descriptors_nothing_is_called_empty(root: Path, pid: int) -> None:
    (root / "etc/passwd").write_bytes(b"root\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/", os.O_PATH)
    os.close(free)
    try:
        # One descriptor: the root opens, the file does not. None: not even the root.
        for limit in (free + 1, free):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            with pytest.raises(Unavailable):
                read_in_container(pid, "/etc/passwd")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read_in_container(pid, "/etc/passwd") == b"root\n"


def test_a_root_that_is_not_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(Internal):
        read_in_container(1, "/etc/passwd")


def test_no_descriptor_is_left(root: Path, pid: int) -> None:
    os.mkfifo(root / "etc/fifo")
    (root / "etc/passwd").write_bytes(b"root\n")
    before = len(os.listdir("/proc/self/fd"))
    for path in ("/etc/passwd", "/etc/fifo", "/etc", "/none"):
        read_in_container(pid, path)
    assert len(os.listdir("/proc/self/fd")) == before
