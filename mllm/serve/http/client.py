"""How does a program ask a running server about pictures?"""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from mllm.errors import DataError, UnavailableError


class ServerClient:
    """A running ``mllm serve`` (or any OpenAI-compatible server, less routing) by its address."""

    def __init__(self, address: str, api_key: str | None = None, timeout: float = 300.0):
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def model(self) -> str:
        """The served model's name. Raises `UnavailableError` when nothing answers."""
        return self._get("/v1/models")["data"][0]["id"]

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
        `DataError` with the server's words when it refuses."""
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_uri(path)}} for path in images]
        content.append({"type": "text", "text": question})
        body: dict[str, Any] = {
            "model": model or self.model(),
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "stream": True,
        }
        if experts is not None:
            body["mm_processor_kwargs"] = {"experts": list(experts)}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise DataError(_message(response))
            routed = response.headers.get("x-mllm-experts")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise DataError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", []):
                    if piece := choice["delta"].get("content"):
                        yield piece, routed

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
