"""How does a program ask a running server about pictures?"""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from mllm.errors import DataError, MllmError, UnavailableError
from mllm.serve.http.errors import plain
from mllm.serve.http.keys import CLIENTS, client_keys

AFFINITY = "x-mllm-affinity"
"""Header with a hash of a request's pictures."""
_HEADS = ("mllm_masks", "mllm_probability")
"""Fields beside an answer's text."""
_PICTURES = ("image_url", "video_url", "source")
"""Where an address or a file stands in a part of a request."""


class ServerClient:
    """A running ``mllm serve`` (or any OpenAI-compatible server, less routing) by its address."""

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 300.0):
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def model(self) -> str:
        """The served model's name. Raises `UnavailableError` when nothing answers."""
        return self.card()["id"]

    def card(self) -> dict[str, Any]:
        """What the server says of its model: ``id``, ``max_model_len`` … Raises `UnavailableError` when nothing answers."""
        return self._get("/v1/models")["data"][0]

    def answers(self) -> bool:
        """Whether the server is there and ready."""
        try:
            return self.http.get("/health", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def information(self) -> dict[str, Any]:
        """Experts, router and limits (`Admission.information`); empty for another kind of server."""
        response = self.http.get("/mllm/info")
        return response.json() if response.status_code == 200 else {}

    def stream(
        self,
        question: str,
        images: Sequence[Path | str] = (),
        *,
        experts: Sequence[str] | None = None,
        max_tokens: int = 512,
        model: str | None = None,
    ) -> Iterator[tuple[str, str | None]]:
        """Answer pieces as they come, each with the experts that looked at the pictures (None: not told). Raises
        `DataError` with the server's words when it refuses, `UnavailableError` when it fails."""
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_uri(path)}} for path in images]
        content.append({"type": "text", "text": question})
        messages = [{"role": "user", "content": content}]
        yield from self.stream_messages(messages, experts=experts, max_tokens=max_tokens, model=model)

    def stream_messages(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        experts: Sequence[str] | None = None,
        max_tokens: int = 512,
        temperature: float | None = None,
        model: str | None = None,
        heads: dict[str, Any] | None = None,
    ) -> Iterator[tuple[str, str | None]]:
        """`stream` of a whole conversation in OpenAI's form. heads: gets what the model's heads say of the answer, as the server
        writes it (``mllm_masks``, ``mllm_probability``). Raises `UnavailableError` too, when the server is not there or goes
        away in the middle."""
        body: dict[str, Any] = {
            "model": model or self.model(),
            "messages": list(messages),
            "max_tokens": max_tokens,
            "stream": True,
        }
        if temperature is not None:
            body["temperature"] = temperature
        if experts is not None:
            body["mm_processor_kwargs"] = {"experts": list(experts)}
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body, headers=affinity(body)) as response:
                yield from _pieces(response, {} if heads is None else heads)
        except httpx.TransportError as error:
            raise UnavailableError(
                f"the server at {self.http.base_url} does not answer ({type(error).__name__})"
            ) from error

    def _get(self, path: str) -> Any:
        try:
            response = self.http.get(path)
        except httpx.TransportError as error:
            raise UnavailableError(
                f"{self.http.base_url}: no server answers ({error}); start one with mllm serve"
            ) from error
        if response.status_code != 200:
            raise UnavailableError(f"{self.http.base_url}{path}: {_message(response)}")
        return response.json()


def _pieces(response: httpx.Response, heads: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    if response.status_code != 200:
        raise _error(response.status_code, _message(response))
    routed = response.headers.get("x-mllm-experts")
    for line in response.iter_lines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise _error(event["error"].get("code"), str(event["error"].get("message", event["error"])))
        heads.update({name: event[name] for name in _HEADS if event.get(name) is not None})
        for choice in event.get("choices", []):
            if piece := choice["delta"].get("content"):
                yield piece, routed


def _error(status: Any, message: str) -> MllmError:
    """A server's error: a refusal of what was asked, or, from 500 on, a failure of its own."""
    message = plain(message)
    return UnavailableError(message) if isinstance(status, int) and status >= 500 else DataError(message)


def own_key() -> str | None:
    """The key that a command of ours sends: the first of ``MLLM_API_KEY``, which for a server may hold several."""
    return next(iter(client_keys(os.environ.get(CLIENTS))), None)


def affinity(body: Any) -> dict[str, str]:
    """The header by which a proxy before several replicas sends the same pictures and videos to the same one
    (``examples/nginx.conf``); {} for a request without any. Pictures in OpenAI's and in Anthropic's form are found."""
    digest, waiting, found = hashlib.blake2b(digest_size=16), [body], False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            address = next((value[name] for name in _PICTURES if value.get(name) is not None), None)
            if isinstance(address, dict):
                address = address.get("url") or address.get("data")
            if address is not None:
                digest.update(str(address).encode())
                found = True
            else:
                waiting += reversed(list(value.values()))
        elif isinstance(value, list):
            waiting += reversed(value)
    return {AFFINITY: digest.hexdigest()} if found else {}


def data_uri(path: Path | str) -> str:
    """A picture file as a base64 data URI."""
    kind = mimetypes.guess_type(str(path))[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def _message(response: httpx.Response) -> str:
    response.read()
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}: {response.text[:300]}"
