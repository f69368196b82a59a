"""Whether root in a container is root on the host: `oci.equivalence`, with what only the running host can tell."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from execgate.model.container import Container
from execgate.model.process import ProcessIdentity
from execgate.oci.equivalence import ENGINE_DIRECTORIES, ENGINE_SOCKETS, host_equivalent

_KNOWN = 4096
_OWN = "/proc/self/ns"


class HostEquivalence:
    """Tells it of running containers, and remembers it: mounts and namespaces last as long as their init."""

    def __init__(self, *, sockets: Collection[str] = (), directories: Collection[str] = ()) -> None:
        """`sockets` and `directories` are further ones that lead to root on the host: those of this service."""
        self._sockets = (*ENGINE_SOCKETS, *sockets)
        self._directories = (*ENGINE_DIRECTORIES, *directories)
        self._known: OrderedDict[tuple[str, ProcessIdentity | None], tuple[str, ...]] = OrderedDict()
        self._host = {_namespace(f"{_OWN}/{kind}") for kind in ("pid", "mnt")}

    def __call__(self, container: Container, spec: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the reasons, none for a container that is as ordinary as engines make them."""
        key = (container.id, container.init)
        if key not in self._known:
            self._known[key] = self._reasons(container, spec)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return self._known[key]

    def _reasons(self, container: Container, spec: Mapping[str, Any]) -> tuple[str, ...]:
        reasons = host_equivalent(
            spec,
            sockets=self._sockets,
            directories=self._directories,
            runtime=container.runtime.name,
            same_as_host=self._is_host,
        )
        if container.init is not None and self._is_host(f"/proc/{container.init.pid}/ns/pid"):
            # Whatever the configuration says: a path in it may lead elsewhere by now.
            reasons = tuple(dict.fromkeys((*reasons, "it shares the host's pid namespace")))
        return reasons

    def _is_host(self, path: str) -> bool:
        """Return whether a path leads to a namespace of the host; one that cannot be looked at may."""
        return (found := _namespace(path)) is None or found in self._host


def _namespace(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
