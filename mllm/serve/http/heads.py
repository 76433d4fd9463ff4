"""How long may a request's head be, and how long may it take? The web server below the admission limits neither."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES = 64 * 2**10
"""Of the request line and the headers together."""
SECONDS = 30.0
"""From the connection, or the first byte of a later request, to the end of its headers."""


class LimitedHeads(HttpToolsProtocol):
    """uvicorn's reader of requests with two limits, which hold for clients without a key too: else one connection could fill the
    memory with headers, and connections that send nothing would stay for ever."""

    _head = 0
    _in_head, _ended = True, False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, or of a body, which the admission limits. A head is handed on up to its limit first: it may arrive whole."""
        while data and not self.transport.is_closing():
            room = MOST_BYTES - self._head if self._in_head else len(data)
            self._take(data[:room])
            data = data[room:]
            if data and self._in_head and self._head >= MOST_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request line and headers are above the limit of {MOST_BYTES} bytes.")

    def _take(self, data: bytes) -> None:
        self._ended = False
        super().data_received(data)
        if self._ended or not self._in_head or self.transport.is_closing():
            return  # bytes in which a request ended were its body's
        self._head += len(data)
        if self._timer is None:
            self._start()

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head, self._head = False, 0
        self._stop()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole; what follows is another request, for which uvicorn itself waits some seconds."""
        self._in_head = self._ended = True
        super().on_message_complete()

    def _start(self) -> None:
        self._timer = self.loop.call_later(SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
