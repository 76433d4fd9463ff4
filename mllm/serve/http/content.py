"""In which one form do conversations and pictures reach the engine, whatever form a client chose for them?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm.serve.http.errors import Refused, shown
from mllm.serve.http.fields import CHAT, COMPLETIONS, COUNT, DRAW, MESSAGES, RESPONSES, TOKENIZE
from mllm.serve.http.reading import read_object

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Kinds of text part, and the field that holds the text."""
_IGNORED = frozenset({"cache_control", "annotations", "logprobs", "citations", "signature", "id", "index", "status"})
"""What clients send back of an earlier answer, and no answer depends on."""
_SCENE = 64
"""Most characters of a scene's name."""


@dataclass
class Picture:
    """A picture of a request, or a video. address: as the client wrote it; write: puts the checked address into the request;
    file: its bytes, once they were checked; views: the pictures of a scene, which goes on as one video of them; seconds: when one
    of them was taken; mask: what is marked on a picture that is shown as an example, run lengths as the client wrote them."""

    address: str
    write: Callable[[str, str | None], None]
    file: bytes = b""
    is_video: bool = False
    views: list[Picture] = field(default_factory=list)
    seconds: float | None = None
    mask: Any = None


class Content:
    """Rewrites the conversation of one request: known parts only, placeholders in texts pulled apart, pictures and videos listed.

    image_token: the text that stands for a picture in the prompt, which no client may write; videos: whether a chat may hold
    any; example: the text that stands for the mask on a picture before it, None for a model that is shown none.
    """

    def __init__(self, image_token: str, *, videos: bool = False, example: str | None = None):
        self.image_token, self.videos, self.example = image_token, videos, example
        self.pictures: list[Picture] = []
        self._scenes: dict[str, Picture] = {}
        self._scene: str | None = None
        """The scene that the part before is a picture of."""

    def rewrite(self, path: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """The request with its conversation in canonical form. Raises `Refused`."""
        kept = {name: value for name, value in data.items() if name not in ("messages", "input")}
        made: dict[str, Any] = self.clean(kept)
        if path in (CHAT, TOKENIZE) and "messages" in data:
            made["messages"] = [self._message(item) for item in _objects(data["messages"], "messages")]
        elif path in (MESSAGES, COUNT):
            made["messages"] = [self._turn(item) for item in _objects(data.get("messages"), "messages")]
            if made.get("system") is not None:
                made["system"] = self._blocks(data["system"], "system", self._text_only)
        elif path == RESPONSES:
            made["input"] = self._input(data.get("input"))
            _functions_only(made.get("tools"))
        elif path in (COMPLETIONS, TOKENIZE, DRAW) and "prompt" not in data:
            raise Refused(400, "prompt is missing")
        if "messages" in data and "prompt" in data:
            raise Refused(400, "either messages or prompt, not both")
        return made

    def clean(self, value: Any) -> Any:
        """The value with every placeholder in its texts pulled apart. Raises `Refused` for one in a key."""
        if isinstance(value, str):
            token = self.image_token
            return value.replace(token, token[:1] + " " + token[1:])
        if isinstance(value, list):
            return [self.clean(item) for item in value]
        if isinstance(value, dict):
            if any(self.image_token in name for name in value):
                raise Refused(400, f"a key holds {self.image_token}")
            return {name: self.clean(item) for name, item in value.items()}
        return value

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A chat message."""
        made: dict[str, Any] = {"role": _one_of(message.get("role"), ROLES, "role")}
        made["content"] = self._parts(message.get("content"), self._part)
        for name, value in message.items():
            if name in made or name in _IGNORED or value is None:
                continue
            if name == "tool_calls":
                made[name] = [self._call(call) for call in _objects(value, name)]
            elif name in ("name", "tool_call_id", "reasoning", "reasoning_content", "refusal") and isinstance(
                value, str
            ):
                made[name] = self.clean(value)
            else:
                raise Refused(400, f"messages: {shown(name)} is not a field of a message, or not of this type")
        return made

    def _parts(self, content: Any, part: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        """A message's content: text, nothing, or a list of parts."""
        if content is None:
            return None
        if isinstance(content, str):
            return self._said(content)
        if not isinstance(content, list):
            raise Refused(400, f"content must be a text or a list of parts, not {type(content).__name__}")
        made: list[dict[str, Any]] = []
        self._scene = None
        for item in content:
            if isinstance(item, str):
                item = {"type": "text", "text": item}
            if not isinstance(item, dict):
                raise Refused(400, f"a part of content must be an object, not {type(item).__name__}")
            if self._joins_scene(item):
                continue
            made.append(part(item))
            self._keep_apart(made)
            if item.get("mask") is not None:  # only a part that may have one comes here
                made.append({"type": "text", "text": f" {self.example}\n"})
        return made

    def _joins_scene(self, part: dict[str, Any]) -> bool:
        """Whether a part is a further picture of the scene before it, which takes it in. Raises `Refused` for one that stands apart."""
        name, before = part.get("scene"), self._scene
        self._scene = None if name is None else name if isinstance(name, str) else ""
        if name is None or not self.videos:
            return False
        if not isinstance(name, str) or not 0 < len(name) <= _SCENE:
            raise Refused(
                400, f"scene must be a text of 1 to {_SCENE} characters, the same for every picture of a scene"
            )
        if name != before:
            if name in self._scenes:
                raise Refused(400, f"scene {shown(name)}: its pictures must stand side by side in one message")
            return False
        self._scenes[name].views.append(_view(part))
        return True

    def _scene_part(self, part: dict[str, Any]) -> dict[str, Any]:
        """The first picture of a scene: the place of all of them."""
        if not self.videos:
            raise Refused(400, "scene: this model takes no videos and sees pictures one by one; leave scene out")
        view = _view(part)
        made: dict[str, Any] = {"type": "video_url", "video_url": {}}
        whole = Picture(
            "", lambda url, key: _write_part(made, made["video_url"], url, key), is_video=True, views=[view]
        )
        self.pictures.append(whole)
        self._scenes[part["scene"]] = whole
        return made

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        """A part of a chat message."""
        kind = part.get("type")
        if kind is None:
            kind = next((name for name in ("image_url", "video_url") if name in part), "text")
        if kind in ("image_url", "input_image") and part.get("scene") is not None:
            return self._scene_part(part)
        if kind in ("image_url", "input_image") or (kind == "video_url" and self.videos):
            is_video = kind == "video_url"
            name = "video_url" if is_video else "image_url"
            if part.get("mask") is not None and self.example is None:
                raise Refused(
                    400, "mask: this model was not trained to be shown a picture with its mask; leave mask out"
                )
            _only(part, ("type", name) if is_video else ("type", name, "detail", "mask"))
            made: dict[str, Any] = {"type": name, name: {}}
            self._add(part.get(name), lambda url, key: _write_part(made, made[name], url, key), is_video=is_video)
            self.pictures[-1].mask = part.get("mask")
            return made
        field = _TEXTS.get(kind) if isinstance(kind, str) else None
        if field is None:
            raise Refused(
                400, f"a part of type {shown(kind)}: this server takes text and image_url" + ", video_url" * self.videos
            )
        if kind not in ("refusal", "thinking"):
            kind = "text"
        return self._text(part, field, kind)

    def _text(self, part: dict[str, Any], field: str, kind: str) -> dict[str, Any]:
        _only(part, ("type", field))
        if not isinstance(part.get(field), str):
            raise Refused(400, f"a part of type {kind} needs its {field} as a text")
        return {"type": kind, field: self._said(part[field])}

    def _said(self, text: str) -> str:
        """A text of the conversation. Raises `Refused` for one that stands for a mask without giving any."""
        if self.example is not None and self.example in text:
            raise Refused(
                400,
                f"{self.example} stands for the mask of an example, and a text gives none: leave it out, and put the mask beside its "
                f'picture in {CHAT}: {{"type": "image_url", "image_url": …, "mask": {{"size": [h, w], "counts": …}}}}',
            )
        return self.clean(text)

    def _keep_apart(self, parts: list[dict[str, Any]]) -> None:
        """Two texts side by side must not make a placeholder together."""
        if len(parts) < 2:
            return
        before, after = (
            next((part[f] for f in ("text", "refusal", "thinking") if f in part), None) for part in parts[-2:]
        )
        if not before or not after or not isinstance(before, str) or not isinstance(after, str):
            return
        reach = len(self.image_token) - 1
        if self.image_token in before[-reach:] + after[:reach]:
            name = next(f for f in ("text", "refusal", "thinking") if f in parts[-1])
            parts[-1][name] = " " + after

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        """An earlier tool call. Its arguments are JSON inside a text: read here, since the template reads them too."""
        _only(call, ("id", "type", "function"))
        function = call.get("function")
        if call.get("type", "function") != "function" or not isinstance(function, dict):
            raise Refused(400, 'tool_calls: expected {"id": …, "type": "function", "function": {…}}')
        _only(function, ("name", "arguments"))
        made = {"name": function.get("name"), "arguments": self._arguments(function.get("arguments"))}
        if not isinstance(made["name"], str):
            raise Refused(400, "tool_calls: function.name must be a text")
        return self.clean({"id": str(call.get("id") or ""), "type": "function", "function": made})

    def _arguments(self, value: Any) -> str:
        if value is not None and not isinstance(value, str):
            raise Refused(400, "arguments must be the text of a JSON object")
        return json.dumps(self.clean(read_object(value or "", "arguments")), ensure_ascii=False)

    def _turn(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in Anthropic's form."""
        _only(message, ("role", "content"))
        role = _one_of(message.get("role"), ("user", "assistant", "system"), "role")
        return {"role": role, "content": self._blocks(message.get("content"), "content", self._block)}

    def _blocks(self, content: Any, where: str, block: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        if content is None:
            raise Refused(400, f"{where} is missing")
        return self._parts(content, block)

    def _text_only(self, block: dict[str, Any]) -> dict[str, Any]:
        if block.get("type") != "text":
            raise Refused(400, f"a block of type {shown(block.get('type'))} here: only text is taken")
        return self._text(block, "text", "text")

    def _block(self, block: dict[str, Any]) -> dict[str, Any]:
        kind = block.get("type")
        if kind in ("text", "thinking"):
            return self._text(block, kind, kind)
        if kind == "image":
            return self._image_block(block)
        if kind == "tool_use":
            _only(block, ("type", "id", "name", "input"))
            if not isinstance(block.get("input") or {}, dict):
                raise Refused(400, "tool_use: input must be an object")
            return self.clean({"type": kind, **{name: block.get(name) for name in ("id", "name", "input")}})
        if kind == "tool_result":
            _only(block, ("type", "tool_use_id", "content", "is_error"))
            return {
                "type": kind,
                "tool_use_id": self.clean(str(block.get("tool_use_id") or "")),
                "content": self._parts(block.get("content"), self._result_block),
            }
        raise Refused(400, f"a block of type {shown(kind)}: this server takes text, image, tool_use and tool_result")

    def _result_block(self, block: dict[str, Any]) -> dict[str, Any]:
        return self._image_block(block) if block.get("type") == "image" else self._text_only(block)

    def _image_block(self, block: dict[str, Any]) -> dict[str, Any]:
        """Anthropic's picture: base64 and its media type, or an address."""
        _only(block, ("type", "source"))
        source = block.get("source")
        made: dict[str, Any] = {"type": "image", "source": {}}
        if not isinstance(source, dict) or source.get("type") not in ("base64", "url"):
            raise Refused(400, 'image: source must be {"type": "base64", "media_type": …, "data": …} or of type url')
        if source["type"] == "base64":
            _only(source, ("type", "media_type", "data"))
            kind, data = source.get("media_type"), source.get("data")
            if not isinstance(kind, str) or not isinstance(data, str) or "," in kind or ";" in kind:
                raise Refused(400, "image: source needs media_type and data as texts")
            address: Any = f"data:{kind};base64,{data}"
        else:
            _only(source, ("type", "url"))
            address = source.get("url")
        self._add(address, lambda url, _: made["source"].update(_anthropic_source(url)))
        return made

    def _input(self, value: Any) -> Any:
        """The conversation of a Responses request."""
        if isinstance(value, str):
            return self.clean(value)
        return [self._item(item) for item in _objects(value, "input")]

    def _item(self, item: dict[str, Any]) -> dict[str, Any]:
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            _only(item, ("type", "role", "content"))
            role = _one_of(item.get("role"), ROLES[:4], "role")
            parts = self._parts(item.get("content"), lambda part: self._response_part(part, role))
            if parts is None:
                raise Refused(400, "input: content is missing")
            return {"type": kind, "role": role, "content": parts}
        if kind == "function_call":
            _only(item, ("type", "call_id", "name", "arguments"))
            made = {name: str(item.get(name) or "") for name in ("call_id", "name")}
            return self.clean({"type": kind, **made, "arguments": self._arguments(item.get("arguments"))})
        if kind == "function_call_output":
            _only(item, ("type", "call_id", "output"))
            if not isinstance(item.get("output"), str):
                raise Refused(400, "input: output must be a text")
            return self.clean({"type": kind, "call_id": str(item.get("call_id") or ""), "output": item["output"]})
        raise Refused(
            400, f"input: an item of type {shown(kind)}; this server takes message, function_call and its output"
        )

    def _response_part(self, part: dict[str, Any], role: str) -> dict[str, Any]:
        if part.get("type") == "input_image":
            _only(part, ("type", "image_url", "detail"))
            made: dict[str, Any] = {"type": "input_image", "detail": "auto"}
            self._add(part.get("image_url"), lambda url, key: _write_part(made, made, url, key, "image_url"))
            return made
        made = self._part(part)
        if made["type"] != "text":
            raise Refused(400, "input: a part must be input_text, input_image or output_text")
        return {**made, "type": "output_text" if role == "assistant" else "input_text"}

    def _add(self, address: Any, write: Callable[[str, str | None], None], *, is_video: bool = False) -> None:
        self.pictures.append(Picture(_address(address, is_video=is_video), write, is_video=is_video))


def _view(part: dict[str, Any]) -> Picture:
    """A picture of a scene. Raises `Refused`."""
    _only(part, ("type", "image_url", "detail", "scene", "seconds"))
    seconds = part.get("seconds")
    if seconds is not None and (
        isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 10**7
    ):
        raise Refused(400, f"seconds {shown(seconds)}: when a picture of a scene was taken, in seconds from 0 on")
    made = Picture(_address(part.get("image_url")), lambda url, key: None)
    made.seconds = None if seconds is None else float(seconds)
    return made


def _address(address: Any, *, is_video: bool = False) -> str:
    """What a part says where its picture is. Raises `Refused`."""
    if isinstance(address, dict):
        _only(address, ("url", "detail"))
        address = address.get("url")
    if not isinstance(address, str) or not address.strip():
        kind = "video" if is_video else "image"
        raise Refused(
            400,
            f"a {'video' if is_video else 'picture'} without an address: {kind}_url.url must be a data: URI or an address",
        )
    return address


def _write_part(part: dict[str, Any], holder: dict[str, Any], url: str, key: str | None, field: str = "url") -> None:
    holder[field] = url
    if key is not None:
        part["uuid"] = key


def _anthropic_source(url: str) -> dict[str, Any]:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "base64", "media_type": kind, "data": data}


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise Refused(400, f"{name} must be a list of objects")
    return value


def _one_of(value: Any, known: tuple[str, ...], name: str) -> str:
    if value not in known:
        raise Refused(400, f"{name} {shown(value)}: expected {', '.join(known)}")
    return value


def _only(part: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise `Refused` for a field that is neither known, ignored nor null."""
    for name, value in part.items():
        if name == "uuid" and value is not None:
            raise Refused(400, "uuid is not accepted: pictures are cached by their content only")
        if name not in known and name not in _IGNORED and value is not None:
            raise Refused(400, f"{shown(name)} is not a field of {shown(part.get('type', 'this part'))}")


def _functions_only(tools: Any) -> None:
    for tool in tools if isinstance(tools, list) else []:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise Refused(400, 'tools: only {"type": "function", …} is served')
