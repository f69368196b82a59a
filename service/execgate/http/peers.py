"""Who is at the other end of a unix socket: the kernel knows, as of its connect(2) (unix(7), SO_PEERCRED)."""

import errno
import socket
import struct

from execgate.model.principal import Method, Principal

_SO_PEERGROUPS = 59  # asm-generic/socket.h, Linux 4.13
_UCRED = struct.Struct("=iII")
_GID = 4
_FEW_GROUPS = 64
_MOST_GROUPS = 65536  # NGROUPS_MAX


def unix_peer(connection: socket.socket) -> Principal:
    """Return who connected. OSError."""
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    name = str(uid)
    gids = frozenset({gid, *_groups(connection)})
    return Principal(method=Method.UNIX, name=name, names=frozenset({name}), uid=uid, gids=gids, pid=pid)


def _groups(connection: socket.socket) -> tuple[int, ...]:
    for most in (_FEW_GROUPS, _MOST_GROUPS):
        try:
            found = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, most * _GID)
        except OSError as error:
            if error.errno != errno.ERANGE:
                raise
        else:
            return struct.unpack(f"={len(found) // _GID}I", found)
    raise OSError(errno.ERANGE, "more groups than the kernel allows")
