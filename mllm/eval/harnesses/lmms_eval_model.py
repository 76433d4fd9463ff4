"""How does a checkpoint answer as a model of lmms-eval (0.7.3 and later)?

::

    python -m lmms_eval --model mllm --model_args pretrained=CKPT,dtype=bfloat16 --tasks mme --batch_size 8
    accelerate launch --num_processes 8 -m lmms_eval --model mllm --model_args pretrained=CKPT --tasks mme --batch_size 8
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.eval.checkpoint import open_generator
from mllm.eval.harnesses.messages import frames_for, turns_and_images, visuals, with_images
from mllm.types import Request, Response, Turn

_MAX_NEW_TOKENS = 1024
_USED = {
    "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "until", "repetition_penalty", "seed",
}  # fmt: skip
_TOLD: set[str] = set()
_LOG = logging.getLogger(__name__)


class _Mllm(lmms):
    """What both kinds share. pretrained: checkpoint folder or hub id; generator: ``hf`` or ``vllm``; frames: pictures
    taken of a video (`frames_for`)."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        generator: str = "hf",
        frames: int | None = None,
        system_prompt: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ConfigError(
                f"--model_args {', '.join(sorted(unknown))}: not known; expected pretrained, dtype, generator, frames, "
                "system_prompt, device, batch_size"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size {batch_size}: expected a number of at least 1")
        if dtype == "auto":
            dtype = "bfloat16" if torch.cuda.is_available() and device != "cpu" else "float32"
        place = None if device in (None, "", "cuda") else device
        self.generator = open_generator(
            str(pretrained), kind=generator, batch_size=int(batch_size), dtype=dtype, device=place
        )
        self.frames = frames_for(self.generator, frames)
        self.system = self._resolve_system_prompt(system_prompt) if system_prompt else None

    @property
    def device(self) -> torch.device:
        """Where the evaluator puts the tensors it exchanges between processes."""
        return getattr(getattr(self.generator, "model", None), "device", torch.device("cpu"))

    @property
    def tokenizer(self) -> Any:
        return self.generator.processor.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def _answer(self, requests: Iterator[Request], count: int) -> list[Response]:
        """Responses in the order of the requests' ids ``"0" … "count - 1"``. A request that cannot be answered stops
        the run: an empty answer would be scored."""
        found: dict[int, Response] = {}
        for response in self.generator.generate(requests):
            if response.error is not None:
                raise DataError(f"request {response.id}: {response.error}")
            found[int(response.id)] = response
        if len(found) != count:
            raise DataError(f"{count - len(found)} of {count} requests were left without an answer")
        return [found[k] for k in range(count)]

    def _turns(self, turns: list[Turn]) -> list[Turn]:
        if not self.system:
            return turns
        return [Turn("system", self.system), *(turn for turn in turns if turn.role != "system")]

    def _document(self, task: str, split: str, number: Any) -> Any:
        return self.task_dict[task][split][number]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per instance, with token counts."""

        def stream() -> Iterator[Request]:
            for number, instance in enumerate(requests):
                turns, images, settings = self._question(instance.args)
                yield Request(str(number), self._turns(turns), images, options(settings))

        responses = self._answer(stream(), len(requests))
        return [
            GenerationResult(r.text, TokenCounts(input_tokens=r.num_prompt_tokens, output_tokens=r.num_tokens))
            for r in responses
        ]

    def _question(self, arguments: Any) -> tuple[list[Turn], list[Any], dict[str, Any]]:
        """(turns, pictures, generation settings) of one instance."""
        raise NotImplementedError

    def _ask(self, turns: list[Turn], images: list[Any], settings: dict[str, Any]) -> str:
        return self._answer(iter([Request("0", self._turns(turns), images, options(settings))]), 1)[0].text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(summed log probability of the continuation, whether greedy decoding would say it)."""
        raise UnavailableError(
            "lmms-eval asks chat models for no likelihoods; add --force_simple for tasks with output_type "
            "loglikelihood or multiple_choice"
        )


class MllmChat(_Mllm):
    """A checkpoint asked in messages: pictures stay where the task puts them."""

    is_simple = False

    def _question(self, arguments: Any) -> tuple[list[Turn], list[Any], dict[str, Any]]:
        _, to_messages, settings, number, task, split = arguments
        turns, images = turns_and_images(to_messages(self._document(task, split, number)), self.frames)
        return turns, images, settings

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """All rounds' answers of each instance; the task makes the next round's message from the last answer."""
        answers = []
        for instance in requests:
            arguments: Any = instance.args
            _, to_messages, settings, number, task, split = arguments
            document = self._document(task, split, number)
            messages, outputs, state, place = to_messages(document), [], None, 0
            while messages is not None:
                turns, images = turns_and_images(messages, self.frames)
                outputs.append(self._ask(turns, images, settings))
                place += 1
                messages, ended, outputs, state = to_messages(
                    document, round_idx=place, previous_output=list(outputs), previous_round_info=state
                )
                outputs = list(outputs)
                if ended:
                    break
            answers.append(outputs)
        return answers


class MllmSimple(_Mllm):
    """A checkpoint asked with a text and pictures: pictures come first, or where ``<image>`` stands when the text holds
    as many as there are pictures."""

    is_simple = True

    def _question(self, arguments: Any) -> tuple[list[Turn], list[Any], dict[str, Any]]:
        context, settings, to_visuals, number, task, split = arguments
        document = self._document(task, split, number)
        images = visuals(to_visuals(document) if to_visuals else None, self.frames)
        return [Turn("user", with_images(context, len(images)))], images, settings

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """All rounds' answers of each instance; the task makes the next round's text and pictures."""
        answers = []
        for instance in requests:
            arguments: Any = instance.args
            context, settings, to_visuals, to_text, number, task, split = arguments
            document = self._document(task, split, number)
            shown = to_visuals(document) if to_visuals else None
            outputs, state, place, ended = [], None, 0, False
            while not ended:
                images = visuals(shown, self.frames)
                outputs.append(self._ask([Turn("user", with_images(context, len(images)))], images, settings))
                place += 1
                shown, context, ended, outputs, state = to_text(
                    document, previous_output=list(outputs), round_idx=place, previous_round_info=state
                )
                outputs = list(outputs)
            answers.append(outputs)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(summed log probability of the continuation, whether greedy decoding would say it), instance by instance."""
        if not hasattr(self.generator, "likelihood"):
            raise UnavailableError("likelihoods need the model in this process; use generator=hf")
        results = []
        for number, instance in enumerate(requests):
            arguments: Any = instance.args
            if len(arguments) == 2:  # a choice without its question, for mutual information
                turns, images, continuation = [Turn("user", arguments[0])], [], arguments[1]
            else:
                context, continuation, to_visuals, name, task, split = arguments
                document = self._document(task, split, name)
                images = visuals(to_visuals(document) if to_visuals else None, self.frames)
                turns = [Turn("user", with_images(context, len(images)))]
                continuation = continuation if isinstance(continuation, str) else str(continuation(document))
            request = Request(str(number), self._turns(turns), images)
            results.append(self.generator.likelihood(request, continuation))
        return results


def options(settings: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation settings as a request's options. Greedy when the temperature is 0 or absent, unless
    ``do_sample`` says otherwise; a setting that is not used is named in a warning, once."""
    for name in sorted(set(settings) - _USED - _TOLD):
        _TOLD.add(name)
        _LOG.warning("generation setting %s=%r is not used by mllm", name, settings[name])
    temperature = float(settings.get("temperature") or 0)
    sample = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
    chosen: dict[str, Any] = {
        "max_new_tokens": int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
        "do_sample": sample,
    }
    if sample:
        chosen["temperature"] = temperature
        chosen |= {name: settings[name] for name in ("top_p", "top_k", "seed") if settings.get(name) is not None}
    if int(settings.get("num_beams") or 1) > 1:
        chosen["num_beams"] = int(settings["num_beams"])
    if settings.get("repetition_penalty") not in (None, 1, 1.0):
        chosen["repetition_penalty"] = float(settings["repetition_penalty"])
    stops = settings.get("until") or []
    # the framework puts a blank line there for every task that names no stop; it would cut long answers
    stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop.strip()]
    if stops:
        chosen["stop"] = stops
    return chosen
