"""A root file system from one static busybox: small enough to build each time, enough for a shell."""

import shutil
import subprocess
from pathlib import Path

from support.errors import HostError

APP_UID = 1000
EXTRA_GID = 2000

_PASSWD = f"""\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
app:x:{APP_UID}:{APP_UID}:an unprivileged user:/home/app:/bin/sh
"""

_GROUP = f"""\
root:x:0:
daemon:x:1:
tty:x:5:
app:x:{APP_UID}:
extra:x:{EXTRA_GID}:app
"""

_DIRECTORIES = ("bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "usr/bin", "usr/sbin", "var/tmp")


def build_rootfs(path: Path) -> Path:
    """Make a root file system at `path`, which must not exist, and return it.

    It holds every applet of the host's static busybox; the users root, daemon and `app` (uid and gid 1000,
    also in the group `extra`, 2000); and the usual directories with their usual modes.

    Raises HostError when the host has no busybox, or one that is not static.
    """
    busybox = _static_busybox()
    for directory in _DIRECTORIES:
        (path / directory).mkdir(parents=True)
    shutil.copy2(busybox, path / "bin/busybox")
    for applet in _applets(busybox):
        if applet != "busybox":
            (path / "bin" / applet).symlink_to("busybox")
    (path / "etc/passwd").write_text(_PASSWD)
    (path / "etc/group").write_text(_GROUP)
    (path / "etc/hostname").write_text("execgate\n")
    (path / "root").chmod(0o700)
    for shared in ("tmp", "var/tmp"):
        (path / shared).chmod(0o1777)
    home = path / "home/app"
    home.mkdir(mode=0o755)
    shutil.chown(home, APP_UID, APP_UID)
    return path


def _static_busybox() -> Path:
    found = shutil.which("busybox")
    if found is None:
        raise HostError("no busybox on this host: apt-get install busybox-static")
    # An interpreter in the ELF file means shared libraries, which the container does not have.
    if b"ld-linux" in Path(found).read_bytes()[:4096]:
        raise HostError(f"{found} is not static: apt-get install busybox-static")
    return Path(found)


def _applets(busybox: Path) -> list[str]:
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    return listed.stdout.split()
