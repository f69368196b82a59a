"""What container engines leave on disk, written without the engines.

The theory. An engine's state is many small files in places that differ by version and configuration, and most of
the cases that matter (a thousand containers, an engine that this machine does not have, a crash in the middle of
a write) are dear to make with a real one. So these write the files themselves, each in a root directory that
stands for `/`, with all the fields that anybody might read and the sizes that real ones have. A `Plan` says what
a container is, the same for every engine; a tree says where its files are (`Placed`), and what its users call it.

What always holds:

- Paths within the files lead to the files of the tree. The exception is rootless containerd, which sees other
  paths than the host does.
- A container counts as running when a process was given to it; the tree invents none.
- `breakers` damage one container at a time.

These files say what an engine was seen or read to write, with the versions in each module. Where discovery and a
tree agree, that is no proof: the side-by-side tests with the real engines are. CRI-O's has no such test.
"""

from support.trees.breakers import CONTAINER_BREAKERS, FILE_BREAKERS
from support.trees.containerd import ContainerdTree, containerd_tree, kubernetes_tree, nerdctl_tree
from support.trees.crio import CrioTree, crio_tree
from support.trees.docker import DockerTree, docker_tree
from support.trees.plan import NOBODY, Life, Placed, Plan, Pod, User, hex_id, plans
from support.trees.podman import PodmanTree, podman_tree
from support.trees.runtimes import OciTree, oci_tree

__all__ = [
    "CONTAINER_BREAKERS",
    "FILE_BREAKERS",
    "NOBODY",
    "ContainerdTree",
    "CrioTree",
    "DockerTree",
    "Life",
    "OciTree",
    "Placed",
    "Plan",
    "Pod",
    "PodmanTree",
    "User",
    "containerd_tree",
    "crio_tree",
    "docker_tree",
    "hex_id",
    "kubernetes_tree",
    "nerdctl_tree",
    "oci_tree",
    "plans",
    "podman_tree",
]
