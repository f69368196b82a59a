"""A client that holds the service to the document: no answer passes it unjudged."""

import contextlib
from collections.abc import Iterator
from typing import Any

from contract.document import ROUTE_HEADERS, Document
from support.api import RawApi
from support.raw import Answer, Target

Json = dict[str, Any]

NO_SUCH_ID = "0" * 64


class Api(RawApi):
    """One service. Every answer, heads of streams and events included, is checked against the document."""

    def __init__(self, target: Target, document: Document) -> None:
        super().__init__(target)
        self.document = document

    def checked(self, method: str, target: str, answer: Answer) -> Answer:
        """Return `answer` if it is what the document says."""
        if answer.status != 404 or answer.body not in ((b"",) if method == "HEAD" else _PAGE_NOT_FOUND):
            self.document.check(self.document.operation(method, target), answer)
        missing = [name for name in ROUTE_HEADERS if name not in answer.headers]
        assert not missing, f"no {missing} in {answer}"
        if answer.status >= 400:
            # aiodocker compares the whole header, parameters included.
            assert answer.headers["content-type"] == "application/json", answer
        return answer

    def run(self, container_id: str, *args: str, **fields: Any) -> Json:
        """Run a command to its end, and return what inspect says of its session."""
        session_id = self.create(container_id, *args, **{"AttachStdout": True, **fields})
        with self.attach(session_id) as stream:
            stream.read_raw()
        return self.inspect(session_id)

    @contextlib.contextmanager
    def events(self, **parameters: Any) -> Iterator[Iterator[Json]]:
        """Yield the event stream, as `RawApi.events` does."""
        with super().events(**parameters) as events:
            yield self._judged(events)

    def _judged(self, events: Iterator[Json]) -> Iterator[Json]:
        schema = {"$ref": "#/components/schemas/Event"}
        for event in events:
            assert self.document.errors(schema, event) == [], event
            yield event


_PAGE_NOT_FOUND = (
    b'{"message": "page not found"}',
    b'{"cause": "page not found", "message": "page not found", "response": 404}',
)
