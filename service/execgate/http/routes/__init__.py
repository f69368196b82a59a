"""The HTTP routes, by subject, and the trees that they are mounted in."""

from collections.abc import Callable

from execgate.containers.catalog import Catalog
from execgate.containers.top import Top
from execgate.http.dialects import DOCKER, LIBPOD
from execgate.http.routes.containers import ContainerRoutes, TopRoutes
from execgate.http.routes.events import EventRoutes
from execgate.http.routes.execs import ExecRoutes
from execgate.http.routes.libpod import LibpodRoutes
from execgate.http.routes.system import SystemRoutes
from execgate.http.tree import Tree
from execgate.model.container import Container
from execgate.sessions.events import EventBus
from execgate.sessions.manager import SessionManager


def all_trees(
    *, catalog: Catalog, manager: SessionManager, events: EventBus, top: Callable[[Container, str], Top]
) -> list[Tree]:
    """Return everything that is served. A new group of routes is mounted here, in either tree or in both."""
    return [
        Tree(
            DOCKER,
            [
                SystemRoutes(catalog, DOCKER),
                EventRoutes(events),
                ContainerRoutes(catalog, manager, DOCKER),
                TopRoutes(catalog, top),
                ExecRoutes(manager, DOCKER),
            ],
        ),
        Tree(
            LIBPOD,
            [
                SystemRoutes(catalog, LIBPOD),
                ContainerRoutes(catalog, manager, LIBPOD),
                ExecRoutes(manager, LIBPOD),
                LibpodRoutes(catalog, manager),
            ],
        ),
    ]
