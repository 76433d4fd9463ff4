"""How does one talk to a checkpoint in Python or a terminal, turn by turn?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, TextIteratorStreamer

from mllm.damage import opening
from mllm.errors import ConfigError, DataError
from mllm.heads.segmentation.answer import Segments
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import longest_conversation, render_prompt, routing_inputs
from mllm.processing.images import load_image
from mllm.processing.protocol import Processor
from mllm.types import IMAGE_MARK, Turn, Video

MAX_DOWNLOAD = 32 * 2**20
"""Bytes of a picture that is fetched."""


def fetch(address: str) -> bytes:
    """What lies at an address; redirects are followed to http and https only. Raises `DataError` naming it."""
    import httpx  # comes with huggingface_hub

    data = bytearray()
    try:
        with httpx.stream("GET", address, follow_redirects=True, timeout=30) as response:
            response.raise_for_status()
            for part in response.iter_bytes():
                data += part
                if len(data) > MAX_DOWNLOAD:
                    raise DataError(
                        f"{address}: more than {MAX_DOWNLOAD // 2**20} MiB, which is no picture to ask about"
                    )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DataError(f"{address}: cannot be fetched ({error})") from error
    return bytes(data)


class ChatSession:
    """A conversation with one model; keeps turns and pictures."""

    def __init__(self, model: MllmForConditionalGeneration, processor: Processor):
        self.model, self.processor = model.eval(), processor
        self.reset()

    @classmethod
    def load(cls, checkpoint: str, *, dtype: str = "auto", device: str | None = None) -> ChatSession:
        """Open a checkpoint.

        Args:
            checkpoint: a folder or hub id.
            dtype: of the weights (``bfloat16``, ``float32``); ``auto``: as they are stored.
            device: default: the GPU when there is one.

        Returns:
            A conversation without turns.

        Raises:
            CheckpointError: the checkpoint is damaged, or needs plug-in code that is not allowed to run.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with opening(checkpoint):
            model = MllmForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).to(device)
            return cls(model, AutoProcessor.from_pretrained(checkpoint))

    def reset(self) -> None:
        """Forget turns and pictures."""
        self.turns: list[Turn] = []
        self.images: list[Any] = []
        self._pending: list[Any] = []

    def add_image(self, source: str | Path | bytes | Any) -> None:
        """Add a picture to the next question.

        Args:
            source: a file, an address (http or https), or what `load_image` takes (bytes, PIL, an array).

        Raises:
            DataError: it cannot be read; it is named.
        """
        where = str(source)
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            source = fetch(source)
        self._pending.append(load_image(source, where=where))

    def add_video(self, source: Any) -> None:
        """Add a video to the next question.

        Args:
            source: a file, a folder of frames, or what `mllm.types.Video` takes.

        Raises:
            DataError: it cannot be read, or the model takes no video; it is named.
        """
        video = source if isinstance(source, Video) else Video(source)
        self.processor.image_layouts([video], where=str(source)[:200])
        self._pending.append(video)

    def mark(self, question: str, **options: Any) -> tuple[Segments, Image.Image]:
        """Ask a model with a segmentation head about the one picture that was added; the answer is no part of the conversation.

        Args:
            question: the user's words ("Please segment the left cup.").
            options: as `segment` takes them.

        Returns:
            The answer with its masks, and the picture with these laid over it.

        Raises:
            ConfigError: the model marks nothing, or not one picture was added.
        """
        if len(self._pending) != 1 or isinstance(self._pending[0], Video):
            raise ConfigError(f"to mark something, add one picture; there are {len(self._pending)} pictures and videos")
        (picture,) = self._pending
        self._pending = []
        found = self.model.segment(picture, questions=question, processor=self.processor, **options)
        return found, found.overlay(picture)

    def ask(self, question: str, **options: Any) -> str:
        """Ask, and wait for the whole answer.

        Args:
            question: the user's words; pictures and videos added before stand in front of it.
            options: as `stream` takes them.

        Returns:
            The answer as text.
        """
        pieces: list[str] = []
        self.stream(question, pieces.append, **options)
        return "".join(pieces)

    def stream(
        self,
        question: str,
        write: Callable[[str], Any],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        experts: Any = None,
    ) -> None:
        """Generate the answer and hand over its text as it comes. A question that fails leaves the conversation as it was.

        Args:
            question: the user's words; pictures and videos added before stand in front of it.
            write: is called with every piece of the answer.
            max_new_tokens: most tokens of the answer; it ends where the model's positions do.
            temperature: 0 is greedy.
            experts: fixes the routing, as `MllmForConditionalGeneration.generate` takes it.

        Raises:
            DataError: the conversation is longer than the model reads, as a server refuses it, or the question speaks of the mask of an
                example, which a conversation here cannot give.
        """
        segments = getattr(self.processor, "segments", None)
        if segments is not None:
            segments.check_question(question)
        kept = list(self.turns), list(self.images), list(self._pending)
        marks = "\n".join([IMAGE_MARK] * len(self._pending))
        self.turns.append(Turn("user", f"{marks}\n{question}" if marks else question))
        self.images += self._pending
        self._pending = []
        try:
            answer = self._generate(write, max_new_tokens, temperature, experts)
        except BaseException:
            self.turns, self.images, self._pending = kept
            raise
        self.turns.append(Turn("assistant", answer))

    def _generate(self, write: Callable[[str], Any], max_new_tokens: int, temperature: float, experts: Any) -> str:
        inputs: Any = self.processor(
            text=[render_prompt(self.processor, self.turns)],
            images=[self.images] if self.images else None,
            return_tensors="pt",
            add_special_tokens=False,
            **({"experts": experts} if experts is not None else {}),
        )
        inputs.update(routing_inputs(self.processor, self.turns, len(self.images)))
        max_new_tokens = min(max_new_tokens, self._room(inputs["input_ids"].shape[1]))
        inputs = inputs.to(self.model.device)
        tokenizer: Any = self.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        failure: list[BaseException] = []

        def run() -> None:
            try:
                self.model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        answer = ""
        for piece in streamer:
            piece = piece if answer else piece.lstrip()  # the template's separator, not part of the answer
            answer += piece
            write(piece)
        thread.join()
        if failure:
            raise failure[0]
        return answer

    def _room(self, length: int) -> int:
        """Tokens that an answer may have after a prompt of ``length``. Raises `DataError` where there is no room for one."""
        limit = longest_conversation(self.model.config.get_text_config())
        if limit is None:
            return 2**31
        if length >= limit:
            pictures = f" with {len(self.images)} pictures" if self.images else ""
            cure = (
                "/reset, or ask with fewer words or pictures"
                if len(self.turns) > 1
                else "ask with fewer words or pictures"
            )
            raise DataError(f"the conversation{pictures} has {length} tokens, and this model reads {limit}: {cure}")
        return limit - length
