"""The catalog of a state tree: what discovery finds below a root that stands for `/`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from execgate.containers import proc
from execgate.containers.catalog import Catalog
from execgate.containers.engines.places import Places
from execgate.containers.host import host_catalog
from execgate.containers.states import RuntimeRoot
from execgate.model.process import ProcessIdentity

PROGRAMS = {"runc": Path("/usr/sbin/runc"), "crun": Path("/usr/bin/crun")}
"""Programs by name; nothing runs them, so they need not be there."""


def this_process() -> ProcessIdentity:
    """Return this process, which the trees take as an init process that lives."""
    return ProcessIdentity(os.getpid(), proc.start_time(os.getpid()) or 0)


def places_below(root: Path) -> Places:
    """Return the default places of every engine, below `root`."""
    return Places(
        docker_data_root=root / "var/lib/docker",
        docker_exec_root=root / "run/docker",
        containerd_root=root / "var/lib/containerd",
        containerd_state=root / "run/containerd",
        containerd_runc_root=root / "run/containerd/runc",
        nerdctl_root=root / "var/lib/nerdctl",
        storage_graph_root=root / "var/lib/containers/storage",
        storage_run_root=root / "run/containers/storage",
        runtimes={},
    )


def catalog_below(
    root: Path, *, programs: Mapping[str, Path] = PROGRAMS, places: Places | None = None, **options: Any
) -> Catalog:
    """Return the catalog of all engines below `root`; `options` are those of `host_catalog`."""
    roots = [RuntimeRoot(root / "run/runc"), RuntimeRoot(root / "run/crun")]
    return host_catalog(places or places_below(root), roots, programs, **options)
