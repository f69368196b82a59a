"""Answers without a length, which a reload does not end: the next service writes the rest of them.

Such an answer is a sequence of pieces, each one a chunk (RFC 9112, 7.1), and knows where in what it tells the next
piece begins. What asyncio's transport has taken for writing nobody can take out again; so once the head is on the wire
the pieces are written to a duplicate of the socket, and at every moment it is known what of them is on the wire. A
connection that is handed over gets nothing more from here: the rest of the piece and the position are all that the
next service needs, however slow the client is.

The end of an answer is never made up: where it cannot be gone on with, the connection is cut without the last chunk.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from aiohttp import HttpVersion11, web

from execgate.http.front import FrontProtocol
from execgate.http.parking import duplicate
from execgate.http.progress import Progress
from execgate.model.errors import Unavailable
from execgate.runtime.readiness import WriteWaiter


class Streamed(web.StreamResponse):
    """An answer in pieces, the first of which begins at `position`; `front` is that of its connection.

    If it goes on with one that an earlier service has begun, that says where: its head is not written again.
    """

    def __init__(self, front: FrontProtocol, headers: Mapping[str, str], position: int) -> None:
        super().__init__(headers=headers)
        before = front.resumed
        self._resumed = before is not None and before.position is not None
        self._unsent = memoryview(before.unsent if before is not None else b"")
        self.position = before.position if before is not None and before.position is not None else position
        self._front = front

    @asynccontextmanager
    async def begun(self, request: web.Request) -> AsyncIterator[None]:
        """Write the head, if it is not written; within the `with` pieces can be. Unavailable; ConnectionError."""
        await self._front.proceed()
        try:
            self._socket = duplicate(self._front.transport)
        except OSError as error:
            raise Unavailable("the host is out of resources", hint=f"a client's connection: {error}") from error
        with self._socket:
            self._writable = WriteWaiter(self._socket.fileno())
            self._front.patient = True
            self._front.progress = lambda: Progress(position=self.position, unsent=bytes(self._unsent))
            if request.version >= HttpVersion11:
                self.enable_chunked_encoding()
            await self.prepare(request)
            await self._front.written()
            await self._send()
            yield

    async def piece(self, data: bytes, position: int) -> None:
        """Write what leads up to `position`; nothing, if that is not told to this client. ConnectionError."""
        await self._front.proceed()
        self.position = position
        if data:
            self._unsent = memoryview(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)
            await self._send()

    async def _send(self) -> None:
        while self._unsent:
            await self._front.proceed()
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                await self._writable.wait()
            else:
                self._unsent = self._unsent[sent:]

    async def _write_headers(self) -> None:
        """See aiohttp's StreamResponse. All that it has decided is decided anew: only the bytes are not written."""
        if not self._resumed:
            await super()._write_headers()
