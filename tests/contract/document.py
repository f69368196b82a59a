"""The API document as a judge: which operation a request belongs to, and whether an answer keeps its promise."""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from support.raw import Answer

PATH = Path(__file__).parents[2] / "api_spec" / "openapi.yaml"

METHODS = ("get", "head", "post", "put", "delete", "patch", "options", "trace")

ROUTE_HEADERS = ("api-version", "ostype", "server")
"""What every answer of a route has, and no refusal of the connection's front."""

_URI = "urn:openapi"
_VERSION_PREFIX = re.compile(r"/v[0-9.]+(?=/)")


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path, with the path's own parameters put beside the operation's."""

    path: str
    method: str
    definition: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method.upper()} {self.path}"

    @property
    def statuses(self) -> frozenset[int]:
        """Every status that is documented."""
        return frozenset(map(int, self.definition["responses"]))


class Document:
    """The OpenAPI document.

    Objects in answers are judged *closed*: a field that is not described fails, although the document lets
    clients expect new ones.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        resource = Resource.from_contents(_closed(raw), default_specification=DRAFT202012)
        self._registry: Registry[Any] = Registry().with_resource(_URI, resource)

    @classmethod
    def load(cls) -> "Document":
        """Read it from its place."""
        return cls(yaml.safe_load(PATH.read_text(encoding="utf-8")))

    @cached_property
    def operations(self) -> list[Operation]:
        """All operations, in the document's order."""
        return [
            Operation(path, method, {**item[method], "parameters": self._parameters(item, method)})
            for path, item in self.raw["paths"].items()
            for method in METHODS
            if method in item
        ]

    def operation(self, method: str, target: str) -> Operation:
        """Return the operation that serves a request; AssertionError when the document knows none."""
        path = _VERSION_PREFIX.sub("", urlsplit(target).path, count=1)
        for operation in self.operations:
            pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(operation.path))
            if operation.method == method.lower() and re.fullmatch(pattern, path):
                return operation
        raise AssertionError(f"the document has no operation for {method} {target}")

    def check(self, operation: Operation, response: Answer) -> None:
        """Fail when `response` is not what the document says an answer of its status is."""
        where = f"{operation}: {response}"
        answers = operation.definition["responses"]
        assert str(response.status) in answers, f"this status is not documented: {where}"
        definition = self.resolve(answers[str(response.status)])
        for name, header in definition.get("headers", {}).items():
            self._check_header(name, self.resolve(header), response, where)
        self._check_body(definition.get("content", {}), response, where)

    def errors(self, schema: Mapping[str, Any], value: object) -> list[str]:
        """Say what of `value` a schema of this document does not allow."""
        validator = Draft202012Validator(
            _absolute(schema), registry=self._registry, format_checker=Draft202012Validator.FORMAT_CHECKER
        )
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]

    def resolve(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """Follow a reference, if it is one."""
        while "$ref" in node:
            found: Any = self.raw
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            node = found
        return node

    def examples(self) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
        """Yield (place, schema, value) of every example: of media types, parameters, headers and schemas."""
        yield from self._examples_in(self.raw, "#")

    def _examples_in(self, node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
        if isinstance(node, list):
            for index, item in enumerate(node):
                yield from self._examples_in(item, f"{place}/{index}")
        if not isinstance(node, Mapping):
            return
        schema = node.get("schema")
        if isinstance(schema, Mapping):
            if "example" in node:
                yield f"{place}/example", schema, node["example"]
            for name, example in node.get("examples", {}).items():
                yield f"{place}/examples/{name}", schema, self.resolve(example)["value"]
        if isinstance(node.get("examples"), list):
            for index, value in enumerate(node["examples"]):
                yield f"{place}/examples/{index}", node, value
        for key, item in node.items():
            if key not in ("example", "examples", "const", "enum", "default"):
                yield from self._examples_in(item, f"{place}/{key}")

    def _parameters(self, item: Mapping[str, Any], method: str) -> list[Mapping[str, Any]]:
        return [self.resolve(one) for one in [*item.get("parameters", ()), *item[method].get("parameters", ())]]

    def _check_header(self, name: str, header: Mapping[str, Any], response: Answer, where: str) -> None:
        value = response.headers.get(name.lower())
        if value is None:
            assert not header.get("required"), f"no header {name}: {where}"
            return
        assert not (problems := self.errors(header["schema"], value)), f"header {name}: {problems}: {where}"

    def _check_body(self, content: Mapping[str, Any], response: Answer, where: str) -> None:
        is_stream = response.status == 101 or "content-length" not in response.headers
        if not is_stream and not response.body:
            return
        if not content:
            assert not response.body, f"a body, where none is documented: {where}"
            return
        assert response.content_type in content, f"content type {response.content_type!r}: {where}"
        schema = content[response.content_type].get("schema")
        if schema is None:
            return
        for value in _values(response):
            assert not (problems := self.errors(schema, value)), f"{problems}: {where}"


def _values(response: Answer) -> list[Any]:
    """The values of a body: one, or one a line where there is no length."""
    if response.content_type != "application/json":
        return [response.body.decode()]
    if "content-length" in response.headers:
        return [response.json]
    return [Answer(0, "", {}, line).json for line in response.body.splitlines()]


def _closed(node: Any) -> Any:
    """Return a copy in which objects with described fields allow no others, unless they say so."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, Mapping):
        return deepcopy(node)
    copy = {key: _closed(item) for key, item in node.items()}
    # Request bodies ignore what they do not know: that is their contract, not a loophole.
    if (
        node.get("type") == "object"
        and "properties" in node
        and "unknown keys are ignored" not in str(node.get("description"))
    ):
        copy.setdefault("additionalProperties", False)
    return copy


def _absolute(node: Any) -> Any:
    """Return a copy whose references name the document, so that a part of it can be judged by itself."""
    if isinstance(node, list):
        return [_absolute(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    return {
        key: _URI + item if key == "$ref" and isinstance(item, str) else _absolute(item) for key, item in node.items()
    }
