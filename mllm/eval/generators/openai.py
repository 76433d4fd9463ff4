"""How does a server with an OpenAI-compatible interface answer?"""

from __future__ import annotations

import base64
import io
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.generators.base import GeneratorSettings, answer_text
from mllm.install import install_hint
from mllm.processing.frames import VideoSpec
from mllm.processing.videos import frames_of, named
from mllm.types import IMAGE_MARK, Request, Response, Turn, Video

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_HTTP_NAMES = {"max_new_tokens": "max_tokens"}
_GREEDY = {"temperature": 0.0}
_OF_BODY = 0.9
"""Share of what a request may hold that a video's file may take; of a larger one its frames are sent."""


class OpenAIGenerator:
    """Chat completions over HTTP with bounded concurrency.

    base_url: up to and including ``/v1``. concurrency: requests under way at once. Statuses 408, 409, 425, 429, 5xx
    and lost connections are tried again up to ``max_retries`` times with growing, jittered pauses (the server's
    ``Retry-After`` is respected); any other refusal becomes the response's error. The key comes from ``api_key`` or
    ``$OPENAI_API_KEY`` and is written nowhere.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        max_retries: int = 6,
        timeout: float = 300.0,
        image_format: str = "PNG",
        extra: dict[str, Any] | None = None,
    ):
        try:
            import httpx
        except ImportError:
            raise UnavailableError(f"the OpenAI generator needs httpx: {install_hint('eval')}") from None
        if concurrency < 1:
            raise ConfigError(f"concurrency is {concurrency}; expected at least 1")
        self.name, self.model, self.base_url = f"openai:{model}", model, base_url.rstrip("/")
        self.concurrency, self.max_retries, self.image_format = concurrency, max_retries, image_format
        self.extra = dict(extra or {})
        self.first_pause = 0.5
        self._told, self._telling = False, threading.Lock()
        self._stopped = threading.Event()
        self.answered_by: dict[str, int] = {}
        """Models that the server says answered (a version behind a name), and how often."""
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=timeout, limits=limits)
        self._httpx = httpx

    @classmethod
    def open(cls, checkpoint: str, settings: GeneratorSettings) -> OpenAIGenerator:
        """The server at ``settings.base_url``, asked for the model of this name."""
        if not settings.base_url:
            raise ConfigError("generator openai: where is the server? base_url, e.g. http://localhost:8000/v1")
        return cls(checkpoint, settings.base_url, concurrency=settings.concurrency)

    @cached_property
    def info(self) -> dict[str, Any]:
        """What a server of ours says of itself and its model (``mllm serve``: /mllm/info); empty for another's. Raises
        `UnavailableError` where none answers."""
        address = f"{self.base_url.removesuffix('/v1')}/mllm/info"
        reply, problem = self._reply(partial(self._client.get, address))
        if reply is None:
            raise UnavailableError(f"{self.base_url}: no server answers ({problem}); start one with mllm serve")
        return _object(reply) if reply.status_code == 200 else {}

    @property
    def takes_video(self) -> bool:
        """Whether a request's images may be `Video`s: the server is ours and its model takes them."""
        return bool(self.info.get("video"))

    def fingerprint(self) -> str:
        """Model and endpoint by name (what runs behind them cannot be hashed), and that videos are given whole."""
        return f"openai:{self.model}:{self.base_url}:{sorted(self.extra.items())}" + ":videos" * self.takes_video

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        """Answers as they come; at most ``concurrency`` requests are under way and as many read ahead."""
        stream, stopped = iter(requests), threading.Event()
        self._stopped = stopped
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            waiting: set[Future[Response]] = set()
            while True:
                while len(waiting) < 2 * self.concurrency and (request := next(stream, None)) is not None:
                    waiting.add(pool.submit(self._answer, request))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:  # whoever asks no more waits for no pause before another try
            stopped.set()
            pool.shutdown(cancel_futures=True)
            self._stopped = threading.Event()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _answer(self, request: Request) -> Response:
        shown = "".join(f"[{turn.role}] {turn.content}\n" for turn in request.turns).replace(IMAGE_MARK, "<image>")
        try:
            body = self._body(request)
        except DataError as error:
            return Response(request.id, "", shown, error=f"{type(error).__name__}: {error}")
        reply, problem = self._reply(partial(self._client.post, f"{self.base_url}/chat/completions", json=body))
        if reply is None:
            return Response(request.id, "", shown, error=problem)
        if reply.status_code != 200:
            return Response(request.id, "", shown, error=_refusal(reply))
        return self._read(request, reply, shown)

    def _reply(self, send: Callable[[], Any]) -> tuple[Any, str]:
        """What the server says in the end, tried again as the class tells; None and the last problem where it stays away, or where
        nobody waits for the answers any more."""
        stopped, problem = self._stopped, ""
        for attempt in range(self.max_retries + 1):
            pause = self.first_pause * 2**attempt * (0.5 + random.random())
            try:
                reply = send()
            except self._httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code not in _RETRIED:
                    return reply, ""
                problem = _refusal(reply)
                after = reply.headers.get("Retry-After", "")
                pause = max(pause, float(after)) if after.replace(".", "", 1).isdigit() else pause
            if attempt < self.max_retries:
                self._tell_once(problem)
                if stopped.wait(pause):
                    break
        return None, problem

    def _tell_once(self, problem: str) -> None:
        """Say that the server does not answer while it is asked again: nobody looks at a terminal that is silent for a minute."""
        with self._telling:
            if not self._told:
                self._told = True
                sys.stderr.write(f"{self.base_url}: {problem}; tried again, {self.max_retries} times a request\n")

    def _read(self, request: Request, reply: Any, shown: str) -> Response:
        try:
            data = reply.json()
            text = data["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return Response(request.id, "", shown, error=f"unreadable reply ({type(error).__name__}: {error})")
        if isinstance(name := data.get("model"), str):
            self.answered_by[name] = self.answered_by.get(name, 0) + 1
        usage = data.get("usage") or {}
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        return Response(request.id, answer_text(text), shown, *counts)

    def _body(self, request: Request) -> dict[str, Any]:
        options = dict(request.options)
        if not options.pop("do_sample", False):
            options |= _GREEDY
        beams = options.pop("num_beams", 1)
        if beams != 1:
            raise ConfigError("an OpenAI-compatible server has no beam search; set generation.num_beams=1")
        options = {_HTTP_NAMES.get(name, name): value for name, value in options.items()}
        images = enumerate(request.images)
        messages = [{"role": turn.role, "content": self._content(turn, images)} for turn in request.turns]
        return {"model": self.model, "messages": messages, **options, **self.extra}

    def _content(self, turn: Turn, images: Iterator[tuple[int, Any]]) -> str | list[dict[str, Any]]:
        if IMAGE_MARK not in turn.content:
            return turn.content
        parts: list[dict[str, Any]] = []
        for position, text in enumerate(turn.content.split(IMAGE_MARK)):
            if position:
                parts += self._visual(*next(images))
            if text.strip():
                parts.append({"type": "text", "text": text.strip("\n")})
        return parts

    def _visual(self, number: int, visual: Any) -> list[dict[str, Any]]:
        """The parts of a picture, or of a video: its file as it is where the server may choose its frames, else the frames that the model's
        specification chooses, as pictures of one scene. Raises `DataError`."""
        if not isinstance(visual, Video):
            return [{"type": "image_url", "image_url": {"url": self._data_url(visual)}}]
        spec, where = VideoSpec.model_validate(self.info["video"]), named(visual)
        file, most = visual.source, _OF_BODY * self.info["max_body_bytes"]
        whole = isinstance(file, Path) and file.is_file() and visual == Video(file, key=visual.key)
        if whole and spec.which != "space_aware" and 4 / 3 * file.stat().st_size < most:
            return [{"type": "video_url", "video_url": {"url": _url("video/mp4", file.read_bytes())}}]
        seen = frames_of(visual, spec, where=where)
        shown = {place: self._data_url(picture) for places, picture in seen.pictures() for place in places}
        times = seen.chosen.seconds
        return [
            {"type": "image_url", "image_url": {"url": shown[place]}, "scene": f"video {number}"}
            | ({} if times is None else {"seconds": times[place]})
            for place in sorted(shown)
        ]

    def _data_url(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.save(buffer, self.image_format)
        return _url(f"image/{self.image_format.lower()}", buffer.getvalue())


def _refusal(reply: Any) -> str:
    return f"HTTP {reply.status_code}: {reply.text[:200]}"


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _object(reply: Any) -> dict[str, Any]:
    """A reply's JSON object; empty for any other body."""
    try:
        found = reply.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
