"""posix_spawn(3) that lets other threads run while it waits for the child's execve.

`os.posix_spawn` keeps Python's lock until the child has called execve. On a busy machine that is a matter of
milliseconds, in which a service with a hundred sessions would do nothing for any of them. ctypes lets go of the lock.
"""

import ctypes
import functools
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)

# More than any libc's: glibc has 80, 336 and 128 bytes on 64 bits, musl no more.
_Actions = ctypes.c_byte * 512
_Attributes = ctypes.c_byte * 1024
_SignalSet = ctypes.c_byte * 128

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_SETSIGDEF, _SETSIGMASK = 0x04, 0x08  # spawn.h, glibc and musl


@dataclass(frozen=True, slots=True)
class Child:
    """What was spawned. `start_time` is field 22 of its /proc/PID/stat, where it can be told without a look there.

    Such a look waits as long as the child is in execve; on a busy machine that is a matter of milliseconds, too.
    """

    pid: int
    start_time: int | None


class PosixSpawn:
    """One call, prepared: `given` are the child's descriptors from 0 on, each a number of ours or None (/dev/null).

    No number of `given` may be below its length. The child ignores no signal, and blocks none.
    """

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], given: Sequence[int | None]) -> None:
        self._actions = _Actions()
        self._argv = _strings(argv)
        self._environment = _strings([f"{name}={value}" for name, value in environment.items()])
        _check(_libc.posix_spawn_file_actions_init(self._actions))
        for number, fd in enumerate(given):
            if fd is None:
                _check(_libc.posix_spawn_file_actions_addopen(self._actions, number, b"/dev/null", os.O_RDWR, 0))
            else:
                _check(_libc.posix_spawn_file_actions_adddup2(self._actions, fd, number))

    def run(self) -> Child:
        """Spawn, once. OSError. Blocks until the child has called execve."""
        pid = ctypes.c_int()
        before = _ticks()
        try:
            _check(
                _libc.posix_spawn(
                    ctypes.byref(pid), self._argv[0], self._actions, _clean(), self._argv, self._environment
                )
            )
        finally:
            _libc.posix_spawn_file_actions_destroy(self._actions)
        return Child(pid.value, before if before == _ticks() else None)


@functools.cache
def _clean() -> ctypes.Array[ctypes.c_byte]:
    """Return the attributes of a child that ignores no signal and blocks none.

    What is ignored is inherited, by way of conmon and the runtime. Python ignores SIGPIPE, and a process that did so
    would outlive `yes | head`; a service that was started in the background of a shell ignores SIGINT.
    """
    attributes, every, none = _Attributes(), _SignalSet(), _SignalSet()
    _libc.sigfillset(every)
    _libc.sigdelset(every, signal.SIGKILL)
    _libc.sigdelset(every, signal.SIGSTOP)
    _libc.sigemptyset(none)
    _check(_libc.posix_spawnattr_init(attributes))
    _check(_libc.posix_spawnattr_setsigdefault(attributes, every))
    _check(_libc.posix_spawnattr_setsigmask(attributes, none))
    _check(_libc.posix_spawnattr_setflags(attributes, ctypes.c_short(_SETSIGDEF | _SETSIGMASK)))
    return attributes


def _ticks() -> int:
    """Return the time as the kernel notes it for a process that it makes now (fs/proc/array.c: start_boottime)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // _TICK_NS


def _strings(strings: Sequence[str]) -> "ctypes.Array[ctypes.c_char_p]":
    encoded = os.fsencode("\0".join(strings)).split(b"\0") if strings else []  # one call for all of them
    if len(encoded) != len(strings):  # one holds a NUL itself, which would be its end
        raise ValueError("embedded null byte")
    return (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)


def _check(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
