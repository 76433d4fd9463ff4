"""How does a checkpoint answer as a model of VLMEvalKit?

From a checkout of VLMEvalKit, ``run.py`` and its arguments after the checkpoint; the model is added to its table::

    python -m mllm.eval.harnesses.vlmevalkit CKPT run.py --data MME ChartQA_TEST --mode infer
    torchrun --nproc-per-node 8 -m mllm.eval.harnesses.vlmevalkit CKPT run.py --data MMMU_DEV_VAL
"""

from __future__ import annotations

import mimetypes
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.checkpoint import open_generator
from mllm.eval.harnesses.messages import frames_for, interleaved
from mllm.types import Request, Turn

_KINDS = ("text", "image", "video")


class MllmVLMEval:
    """A checkpoint with the interface that VLMEvalKit's inference calls: ``generate``, ``chat``, ``set_dump_image``,
    ``use_custom_prompt``. The data sets' own prompts are used; pictures stay where the message has them.

    generator: ``hf`` or ``vllm``; frames: pictures taken of a video (`frames_for`); options: further generation settings by their
    Hugging Face names. Greedy unless these say otherwise.
    """

    INTERLEAVE = True
    is_api = False
    allowed_types = _KINDS

    def __init__(
        self,
        checkpoint: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        generator: str = "hf",
        max_new_tokens: int = 1024,
        frames: int | None = None,
        system: str | None = None,
        **options: Any,
    ):
        if dtype == "auto":
            import torch

            dtype = "bfloat16" if torch.cuda.is_available() and device != "cpu" else "float32"
        self.generator = open_generator(checkpoint, kind=generator, batch_size=1, dtype=dtype, device=device)
        self.frames, self.system = frames_for(self.generator, frames), system
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
        self.dump_image_func: Any = None

    def set_dump_image(self, function: Any) -> None:
        """Told by the inference loop how a row's pictures become files."""
        self.dump_image_func = function

    def dump_image(self, line: Any, dataset: str) -> Any:
        """Paths of a row's pictures."""
        return self.dump_image_func(line)

    def use_custom_prompt(self, dataset: str) -> bool:
        """False: a prompt that depends on the model makes scores incomparable."""
        return False

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a message: a string, ``{"type": "text" | "image" | "video", "value": …}``, or a list of either;
        a string that is the path of a picture or video file counts as one. Raises `DataError` when there is no answer,
        for an empty one would be scored."""
        return self._answer([self._turn("user", message)])

    def chat(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The next turn of a conversation of ``{"role", "content"}`` with contents as in `generate`."""
        return self._answer([self._turn(str(entry["role"]), entry["content"]) for entry in messages])

    chat_inner = chat

    def _turn(self, role: str, message: Any) -> tuple[Turn, list[Any]]:
        text, images = interleaved(message_parts(message), self.frames)
        return Turn(role, text), images  # type: ignore[arg-type]

    def _answer(self, pairs: Sequence[tuple[Turn, list[Any]]]) -> str:
        turns = [turn for turn, _ in pairs]
        if self.system and turns[0].role != "system":
            turns.insert(0, Turn("system", self.system))
        request = Request("0", turns, [image for _, images in pairs for image in images], dict(self.options))
        response = next(iter(self.generator.generate([request])))
        if response.error is not None:
            raise DataError(f"the model gave no answer: {response.error}")
        return response.text


def message_parts(message: Any) -> list[tuple[str, Any]]:
    """A message in any of its four forms as (kind, value) pairs. Raises `DataError` for anything else."""
    if isinstance(message, str):
        return [("text", message)]
    if isinstance(message, Mapping):
        if "type" not in message or "value" not in message:
            raise DataError(f"a message part needs type and value; got {', '.join(map(str, message))}")
        if message["type"] not in _KINDS:
            raise UnavailableError(f"a message part of type {message['type']!r}: this model reads {', '.join(_KINDS)}")
        return [(message["type"], message["value"])]
    if isinstance(message, Sequence) and message:
        if all(isinstance(entry, str) for entry in message):
            return [(_kind(entry), entry) for entry in message]
        if all(isinstance(entry, Mapping) for entry in message):
            return [part for entry in message for part in message_parts(entry)]
    raise DataError(f"a message is a string, a mapping, or a list of one of them; got {type(message).__name__}")


def _kind(text: str) -> str:
    """``image`` or ``video`` for the path of such a file (or an encoded picture), else ``text``."""
    if text.startswith("data:image/"):
        return "image"
    kind = (mimetypes.guess_type(text)[0] or "").split("/")[0]
    try:
        return kind if kind in ("image", "video") and Path(text).is_file() else "text"
    except OSError:  # a long text is no file name
        return "text"


def main(arguments: Sequence[str]) -> None:
    """Add the checkpoint to VLMEvalKit's table of models and start its ``run.py``."""
    if len(arguments) < 2 or not arguments[1].endswith(".py"):
        raise ConfigError(
            "expected: python -m mllm.eval.harnesses.vlmevalkit CKPT path/to/VLMEvalKit/run.py --data … [--mode infer]"
        )
    checkpoint, script, *rest = arguments
    if not Path(script).is_file():
        raise ConfigError(f"{script}: no such file; give the run.py of a checkout of VLMEvalKit")
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        from vlmeval.config import supported_VLM  # type: ignore[import-not-found]
    except ImportError as error:
        raise UnavailableError(
            f"vlmeval cannot be imported beside {script} ({error}); install its requirements"
        ) from None
    name = "-".join(Path(checkpoint).resolve().parts[-2:])
    supported_VLM[name] = partial(MllmVLMEval, checkpoint)
    sys.argv = [script, "--model", name, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    from mllm.errors import MllmError

    try:
        main(sys.argv[1:])
    except MllmError as problem:
        sys.exit(f"error: {problem}")
