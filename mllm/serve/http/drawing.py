"""How does a request for drawings become an answer, while the client may leave?"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from mllm.errors import ConfigError, UnavailableError
from mllm.serve.http.errors import Refused
from mllm.serve.http.routes import ClientGone, disconnected


class Drawings:
    """Draws with the server's engine, or beside it where a head needs the model itself; reads the weights for it at the first
    request. settings: `AdmissionSettings`."""

    def __init__(self, settings: Any):
        self.settings = settings
        self._generator: Any = None
        self._lock = asyncio.Lock()

    async def draw(self, client: Any, request: Any, receive: Any) -> bytes:
        """The answer's body; stops drawing when the client goes away. client: vLLM's ``AsyncLLM``; request: of
        `request`. Raises `Refused` and `ClientGone`."""
        from mllm.serve.images.api import Busy

        drawing = asyncio.create_task((await self._made()).draw(client, request))
        gone = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise ClientGone
            return json.dumps(drawing.result()).encode()
        except Busy as error:
            raise Refused(503, str(error), retry_after=5) from None
        except (ConfigError, UnavailableError, ValueError) as error:  # ValueError: vLLM's, a prompt too long
            raise Refused(400, str(error)[:400]) from None
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:
            raise Refused(500, f"the engine could not draw: {type(error).__name__}") from error
        finally:
            drawing.cancel()
            gone.cancel()

    def request(self, data: dict[str, Any]) -> Any:
        """The checked request. Raises `Refused`."""
        if self.settings.checkpoint is None:
            raise Refused(400, self.settings.cannot_draw)
        from mllm.serve.images.api import ImagesRequest

        try:
            request = ImagesRequest.model_validate(data)
        except ValueError as error:
            raise Refused(400, _one_line(error)) from None
        if request.n > self.settings.max_drawings:
            raise Refused(
                400, f"n: {request.n} pictures in one request; at most {self.settings.max_drawings} are drawn"
            )
        if request.model not in (None, self.settings.name):
            raise Refused(404, f"model {request.model!r:.80} is not served here; this is {self.settings.name!r}")
        return request

    async def _made(self) -> Any:
        from mllm.serve.images.api import ImageGenerator
        from mllm.serve.images.beside import ModelGenerator

        kind = ModelGenerator if self.settings.draws_beside else ImageGenerator
        async with self._lock:
            if self._generator is None:
                self._generator = await asyncio.to_thread(kind, self.settings.checkpoint)
        return self._generator


def _one_line(error: ValueError) -> str:
    """A validation error on one line: the fields and what is wrong with them."""
    if not hasattr(error, "errors"):
        return str(error)[:400]
    found = error.errors()  # type: ignore[attr-defined]
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in found)[:400]
