"""The catalog of a host: the engines that are looked at, in the order in which they win an id."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from execgate.containers.catalog import Catalog, LabelFilter
from execgate.containers.engines.containerd import ContainerdSource
from execgate.containers.engines.docker import DockerSource
from execgate.containers.engines.oci import OciSource, SharedRoots
from execgate.containers.engines.places import Places
from execgate.containers.engines.podman_db import PodmanDatabase
from execgate.containers.engines.storage import Storage, StorageSource
from execgate.containers.entry import EngineSource
from execgate.containers.states import Programs, RuntimeRoot, Specs
from execgate.model.container import EngineName


def host_catalog(
    places: Places,
    roots: Sequence[RuntimeRoot],
    runtimes: Mapping[str, Path],
    *,
    engines: Collection[EngineName] = tuple(EngineName),
    labels: Sequence[LabelFilter] = (),
) -> Catalog:
    """Return the containers of `engines`; `roots` are the state roots that bare runtimes, Podman and CRI-O share."""
    specs, programs = Specs(), Programs(runtimes)
    shared = SharedRoots(roots, programs)
    storage = Storage(places.storage_graph_root, places.storage_run_root)
    all_sources: list[EngineSource] = [
        DockerSource(places.docker_data_root, places.docker_exec_root, specs, programs),
        StorageSource(EngineName.PODMAN, storage, shared, specs, PodmanDatabase(places.storage_graph_root)),
        ContainerdSource(places, specs, programs),
        StorageSource(EngineName.CRIO, storage, shared, specs),
    ]
    sources = [source for source in all_sources if source.engine in engines]
    if EngineName.OCI in engines:
        sources.append(OciSource(shared, specs, {source.engine: source for source in sources}))
    return Catalog(sources, specs, labels=labels)
