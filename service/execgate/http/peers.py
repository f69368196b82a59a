"""Who is at the other end of a connection: by the kernel's word for unix sockets, by a certificate for TLS.

The names of a certificate's owner are its subject alternative names, each with its type
(`model.principal.certificate_name`); its common name is a label, and says nothing here. What does not fit the grammar
of its type is passed over, and so are the types that no rule can speak of. Wildcards are in no name.
"""

import asyncio
import contextlib
import ctypes
import errno
import ipaddress
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from execgate.model.principal import Method, Principal, certificate_name
from execgate.oci.text import shown

log = logging.getLogger(__name__)

SO_PEERGROUPS = 59
"""unix(7), Linux 4.13; Python has no name for it."""

MAX_NAMES = 64
"""How many names of a certificate are looked at."""

_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_GROUP = struct.Struct("=I")
_PYTHONS_MOST = 1024
"""Bytes: `socket.getsockopt` refuses more."""
_NGROUPS_MAX = 65536
_libc = ctypes.CDLL(None, use_errno=True)

_HOST = r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*"
_DNS = re.compile(_HOST)
_EMAIL = re.compile(rf"[A-Za-z0-9.!#$%&'+/=^_`{{|}}~-]{{1,64}}@{_HOST}")  # RFC 5322, dot-atom, without * and ?
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?:(?![\x22*<>?\\^`{|}])[\x21-\x7e])+")  # RFC 3986, without a query
_MAX_NAME = 253
_MAX_URI = 2048


class Unnamed(Exception):
    """A certificate names nobody that a rule could speak of."""


def unix_peer(connection: socket.socket) -> Principal:
    """Return who has connected a unix socket, as it was then (SO_PEERCRED). OSError.

    Ids are those of the user namespace that this service is in: a user who is none there shows as the kernel's
    overflow id, 65534.
    """
    pid, uid, gid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    name = str(uid)
    gids = frozenset({gid, *_groups(connection)})
    return Principal(method=Method.UNIX, name=name, names=frozenset({name}), uid=uid, gids=gids, pid=max(0, pid))


def kernels_word(transport: asyncio.BaseTransport) -> Principal | None:
    """Return who is at the other end of a transport; None where the kernel does not know: TCP."""
    found = transport.get_extra_info("socket")
    if found.family != socket.AF_UNIX:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=found.fileno())
    try:
        return unix_peer(connection)
    except OSError as error:
        log.warning("a client's identity is not known: %s", error)
        return None
    finally:
        connection.detach()  # it is the transport's


def certificate_peer(certificate: Mapping[str, Any]) -> Principal:
    """Return who a verified certificate says its owner is; it is what `SSLSocket.getpeercert` returns. Unnamed."""
    names = list(dict.fromkeys(_names(certificate)))
    if not names:
        subject = ", ".join(f"{key}={value}" for part in certificate.get("subject", ()) for key, value in part)
        raise Unnamed(f"it has no usable subject alternative name (its subject is {subject or 'empty'})")
    return Principal(method=Method.CERTIFICATE, name=names[0], names=frozenset(names))


def _groups(connection: socket.socket) -> list[int]:
    """Return the supplementary groups; none on a kernel that does not tell. OSError."""
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _PYTHONS_MOST)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return []
        if error.errno != errno.ERANGE:
            raise
        found = _many_groups(connection)
    return [group for (group,) in _GROUP.iter_unpack(found)]


def _many_groups(connection: socket.socket) -> bytes:
    """Return what `_groups` looks at, of somebody in more groups than Python has room for. OSError."""
    room = ctypes.create_string_buffer(_NGROUPS_MAX * _GROUP.size)
    size = ctypes.c_uint32(len(room))
    level, name = socket.SOL_SOCKET, SO_PEERGROUPS
    if _libc.getsockopt(connection.fileno(), level, name, room, ctypes.byref(size)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return room.raw[: size.value]


def _names(certificate: Mapping[str, Any]) -> Iterator[str]:
    alternatives = cast("tuple[tuple[str, Any], ...]", certificate.get("subjectAltName", ()))
    for kind, text in alternatives[:MAX_NAMES]:
        word, read = _READERS.get(kind, ("", lambda _: None))
        name = read(text) if isinstance(text, str) else None
        if name is None:
            log.debug("a name in a certificate is passed over: %s %s", shown(kind), shown(str(text)))
        else:
            yield certificate_name(f"{word}:{name}")


def _matching(pattern: re.Pattern[str], longest: int) -> Callable[[str], str | None]:
    return lambda text: text if len(text) <= longest and pattern.fullmatch(text) else None


def _address(text: str) -> str | None:
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text.strip()))  # OpenSSL's text of one may end in a line feed
    return None


_READERS: Mapping[str, tuple[str, Callable[[str], str | None]]] = {
    "DNS": ("dns", _matching(_DNS, _MAX_NAME)),
    "email": ("email", _matching(_EMAIL, _MAX_NAME)),
    "URI": ("uri", _matching(_URI, _MAX_URI)),
    "IP Address": ("ip", _address),
}
"""By the types that Python's `ssl` tells, which has no text for the others: our word, and the name as it is usable."""
