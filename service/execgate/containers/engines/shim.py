"""What containerd and its runc shim write into the bundle of a container; Docker's bundles are containerd's."""

from pathlib import Path

from execgate.containers.entry import table, text
from execgate.containers.files import read_json, read_regular
from execgate.containers.formats import MalformedError
from execgate.containers.states import MAX_STATE, Programs, StateFile
from execgate.model.container import OciRuntime
from execgate.model.errors import Internal, NotFound
from execgate.oci.text import shown

_RUNC_SHIM = "containerd-shim-runc-"


def read_options(bundle: str) -> dict[str, object]:
    """Return a bundle's options.json: `binary_name`, `root` and `systemd_cgroup`, each only when it was set."""
    try:
        return dict(table(read_json(Path(f"{bundle}/options.json"), limit=MAX_STATE)[0]))
    except (NotFound, Internal):
        return {}


def check_shim(bundle: str) -> None:
    """Raise MalformedError for a bundle of another shim than runc's: a sandbox has no state that runc could join."""
    try:
        data, _ = read_regular(Path(f"{bundle}/shim-binary-path"), limit=4096)
    except (NotFound, Internal):  # versions before 1.6 write none
        return
    shim = data.decode(errors="replace").strip()
    if shim and not shim.rpartition("/")[2].startswith(_RUNC_SHIM):
        raise MalformedError(f"{shown(shim)} runs it, which is not containerd's shim for runc")


def shim_runtime(state: StateFile, root: Path, programs: Programs) -> OciRuntime:
    """Return the runtime of a container of containerd: the program that its shim was told, else the default one."""
    options = read_options(str(state.state.bundle))
    found = programs.runtime(root, state, text(options.get("binary_name")) or None)
    told_systemd = options.get("systemd_cgroup") is True
    return OciRuntime(found.name, found.path, found.root, systemd_cgroup=found.systemd_cgroup or told_systemd)
