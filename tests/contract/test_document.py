"""The document by itself: it is valid, it names exactly the routes that exist, and its examples keep its own rules."""

import re
from typing import Any, cast

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from contract.document import Document
from execgate import __version__
from execgate.http.dialects import DOCKER, LIBPOD, dotted
from execgate.http.hijack import OpenStreams
from execgate.http.routes import all_trees
from execgate.http.server import MAX_BODY, build_application
from execgate.wire.request_head import MAX_FIELDS, MAX_HEAD, MAX_REQUEST_LINE

DOCUMENT = Document.load()
EXAMPLES = {place: (schema, value) for place, schema, value in DOCUMENT.examples()}
NOTHING = cast("Any", None)  # the routes' collaborators: no handler is called here


def test_it_is_valid_openapi_3_1() -> None:
    problems = [str(error) for error in OpenAPIV31SpecValidator(dict(DOCUMENT.raw)).iter_errors()]
    assert not problems
    assert DOCUMENT.raw["openapi"].startswith("3.1.")


def test_it_has_the_version_and_the_licence_of_the_package() -> None:
    assert DOCUMENT.raw["info"]["version"] == __version__
    assert DOCUMENT.raw["info"]["license"]["identifier"] == "Apache-2.0"


def _routes() -> list[tuple[str, str]]:
    app = build_application(all_trees(top=NOTHING), OpenStreams())
    return [
        (route.method, route.resource.get_info().get("formatter") or route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
    ]


def test_it_has_exactly_the_routes_of_the_service() -> None:
    documented = {(operation.method.upper(), operation.path) for operation in DOCUMENT.operations}
    assert set(map(_unversioned, _routes())) == documented


def test_every_route_exists_with_a_version_and_docker_s_without_one_too() -> None:
    servers = [server["url"] for server in DOCUMENT.raw["servers"]]
    assert servers == ["http://localhost/v{version}", "http://localhost"]
    prefixes: dict[tuple[str, str], set[str]] = {}
    for method, path in _routes():
        route = _unversioned((method, path))
        prefixes.setdefault(route, set()).add(path.removesuffix(route[1]))
    for (_, path), found in prefixes.items():
        assert found == ({"/v{version}"} if path.startswith("/libpod/") else {"/v{version}", ""}), path
    assert len(set(_routes())) == len(_routes())


def test_the_libpod_tree_is_served_with_a_version_only() -> None:
    for path, item in DOCUMENT.raw["paths"].items():
        servers = [server["url"] for server in item.get("servers", ())]
        assert servers == (["http://localhost/v{version}"] if path.startswith("/libpod/") else []), path
        if servers:
            assert item["servers"][0]["variables"]["version"]["default"] == dotted(LIBPOD.maximum)


def _unversioned(route: tuple[str, str]) -> tuple[str, str]:
    return route[0], route[1].removeprefix("/v{version}")


def test_it_names_the_range_of_versions_that_the_service_has() -> None:
    version = DOCUMENT.raw["servers"][0]["variables"]["version"]
    assert version["default"] == dotted(DOCKER.maximum)
    assert version["description"] == f"`major.minor`, from {dotted(DOCKER.minimum)} to {dotted(DOCKER.maximum)}."


def test_it_names_the_bounds_that_the_service_has() -> None:
    responses = DOCUMENT.raw["components"]["responses"]
    for name, bound in [
        ("BodyTooLarge", MAX_BODY),
        ("TargetTooLong", MAX_REQUEST_LINE),
        ("HeadTooLarge", MAX_HEAD),
        ("HeadTooLarge", MAX_FIELDS),
    ]:
        assert re.search(rf"\b{bound}\b", responses[name]["description"]), (name, bound)


@pytest.mark.parametrize("place", EXAMPLES)
def test_an_example_is_valid(place: str) -> None:
    schema, value = EXAMPLES[place]
    assert DOCUMENT.errors(schema, value) == []


def test_there_are_examples_where_people_look_for_them() -> None:
    for operation in DOCUMENT.operations:
        parts = [DOCUMENT.resolve(answer) for answer in operation.definition["responses"].values()]
        if "requestBody" in operation.definition:
            parts.append(operation.definition["requestBody"])
        for part in parts:
            for media in part.get("content", {}).values():
                schema = media.get("schema", {})
                target = DOCUMENT.resolve(schema.get("items", schema))
                assert not media or {"example", "examples"} & (media.keys() | target.keys()), (str(operation), media)


def test_everything_has_a_description() -> None:
    for operation in DOCUMENT.operations:
        assert operation.definition["summary"], operation
        assert operation.definition["operationId"], operation
        assert all(parameter["description"] for parameter in operation.definition["parameters"]), operation
        answers = operation.definition["responses"].values()
        assert all(DOCUMENT.resolve(answer)["description"] for answer in answers), operation
    assert all(schema["description"] for schema in DOCUMENT.raw["components"]["schemas"].values())


def test_every_component_is_used() -> None:
    text = str(DOCUMENT.raw)
    for kind, components in DOCUMENT.raw["components"].items():
        for name in components:
            assert f"'#/components/{kind}/{name}'" in text or kind == "securitySchemes", f"{kind}/{name}"
    demanded = {name for one in DOCUMENT.raw["security"] for name in one}
    assert demanded == DOCUMENT.raw["components"]["securitySchemes"].keys()
