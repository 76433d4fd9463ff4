"""How does a Hugging Face model in this process answer, in batches, the same at any batch size?"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor

from mllm.errors import AlignmentError, UnavailableError
from mllm.eval.generators.base import GeneratorSettings, answer_text, check_marks, cut_at_stops, hf_messages
from mllm.eval.generators.kept_pictures import KeptPictures
from mllm.plugins import code_hashes
from mllm.threads import one_thread
from mllm.types import IMAGE_MARK, Request, Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


_log = logging.getLogger(__name__)
_WINDOW = 16
"""Batches read ahead: requests are sorted by length inside a window of so many batches."""


class HFGenerator:
    """Any image-text model of transformers with its processor, ours included.

    Batches are left-padded and sorted by length inside a window, longest first. None has more pictures than the processor takes in a
    call. A batch that does not fit in the GPU's memory is halved, and so are those that follow. Greedy unless a request says otherwise;
    sampling is seeded per request (from its id and ``seed``), and sampled requests run alone so that the batch does not change them.

    A batch is not refilled when one of its answers ends: an ideal refill, all prompts prefilled at no extra cost, would
    save at most 11 % of the CPU time on short answers, 19 % on mixed and 20 % on long ones
    (`benchmarks/eval_refill.py`); a real one prefills them one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        name: str = "hf",
        model_hash: str | None = None,
        picture_cache: int = 0,
    ):
        """picture_cache: MiB of host memory in which the visual tokens of pictures are kept from batch to batch and task to task (0:
        none); for a model whose weights and hooks stay as they are."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.model: Any = model.eval()
        self.processor: Any = processor
        self.batch_size, self.name = batch_size, name
        self._model_hash = model_hash
        self.kept = KeptPictures(picture_cache) if picture_cache and KeptPictures.fit(model) else None
        tokenizer: Any = getattr(processor, "tokenizer", processor)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer = tokenizer
        self._most_pictures: float = (
            getattr(getattr(processor, "image_processor", None), "max_images", None) or math.inf
        )
        self._told_one_by_one = False
        self._ours = type(model).__module__.startswith("mllm.") or hasattr(processor, "pixel_keys")

    @classmethod
    def open(cls, checkpoint: str, settings: GeneratorSettings) -> HFGenerator:
        """A checkpoint folder or hub id. Under a launcher each process takes the GPU of its LOCAL_RANK among those it
        sees."""
        from mllm.eval.checkpoint import load_model

        device = settings.device
        if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        model, processor = load_model(checkpoint, dtype=settings.dtype, device=device)
        name = f"hf:{Path(checkpoint).name}"
        return cls(model, processor, batch_size=settings.batch_size, name=name, picture_cache=settings.picture_cache)

    @property
    def takes_video(self) -> bool:
        """Whether a request's images may be `Video`s, whose frames the model's processor chooses."""
        return getattr(self.processor, "takes_video", False)

    @property
    def gives_masks(self) -> bool:
        """Whether the model marks what a request asks for: one of its heads is a segmentation head."""
        from mllm.heads.segmentation.build import segmentation_heads

        return self._ours and bool(segmentation_heads(getattr(self.model.config, "heads", None) or {}))

    @property
    def gives_edits(self) -> bool:
        """Whether the model edits pictures: it marks, and one of its heads draws."""
        return self.gives_masks and getattr(self.model.config, "drawing_head", None) is not None

    def fingerprint(self) -> str:
        """Architecture, precision, a hash over every weight, one over the processor's settings, and those of plug-in code."""
        if self._model_hash is None:
            code = "".join(f":{sha256[:16]}" for sha256 in code_hashes(type(m) for m in self.model.modules()))
            self._model_hash = f"{weights_hash(self.model)}:{processor_hash(self.processor)}{code}"
        implementation = getattr(self.model.config, "_attn_implementation", "")
        return f"hf:{type(self.model).__name__}:{self.model.dtype}:{implementation}:{self._model_hash}"

    def render(self, request: Request) -> str:
        """The prompt as the model reads it, one placeholder per image. Raises `AlignmentError` when marks and images
        differ."""
        check_marks(request)
        if self._ours:
            from mllm.processing.chat import render_prompt

            return render_prompt(self.processor, request.turns)
        return self.processor.apply_chat_template(
            hf_messages(request.turns), tokenize=False, add_generation_prompt=True
        )

    def generate(self, requests: Iterable[Request]) -> Iterator[Response]:
        """Answers, window by window."""
        stream = iter(requests)
        while window := list(islice(stream, _WINDOW * self.batch_size)):
            prompts: dict[int, str] = {}
            for position, request in enumerate(window):
                try:
                    prompts[position] = self.render(request)
                except Exception as error:  # a chat template may raise anything; it names this sample only
                    yield Response(request.id, "", error=f"{type(error).__name__}: {error}")
            order = sorted(
                prompts, key=lambda k: (_options_key(window[k]), -len(window[k].images), -len(prompts[k]), k)
            )
            for batch in self._batches(order, window):
                yield from self._answer([window[k] for k in batch], [prompts[k] for k in batch])

    def _batches(self, order: Sequence[int], window: Sequence[Request]) -> Iterator[list[int]]:
        batch: list[int] = []
        pictures = 0
        for position in order:
            request = window[position]
            alone = request.options.get("do_sample", False)
            full = len(batch) == self.batch_size or pictures + len(request.images) > self._most_pictures
            if batch and (full or alone or _options_key(window[batch[0]]) != _options_key(request)):
                yield batch
                batch, pictures = [], 0
            batch.append(position)
            pictures += len(request.images)
        if batch:
            yield batch

    def _answer(self, requests: Sequence[Request], prompts: Sequence[str]) -> Iterator[Response]:
        full = False
        try:
            yield from self._forward(requests, prompts)
        except torch.cuda.OutOfMemoryError:
            full = True  # told below, where the error no longer holds what the batch had taken
        except Exception as error:  # foreign processors raise whatever they like; the request is named
            if len(requests) == 1:
                yield Response(requests[0].id, "", prompts[0], error=f"{type(error).__name__}: {error}")
                return
            if not self._told_one_by_one:
                self._told_one_by_one = True
                _log.warning(
                    "a batch of %d cannot be answered together (%s: %s); such batches are asked one by one, which is slower",
                    len(requests), type(error).__name__, str(error)[:300],
                )  # fmt: skip
            for request, prompt in zip(requests, prompts):  # find the one that cannot be answered; answer the others
                yield from self._answer([request], [prompt])
        if full:
            yield from self._in_halves(requests, prompts)

    def _in_halves(self, requests: Sequence[Request], prompts: Sequence[str]) -> Iterator[Response]:
        """A batch that the GPU cannot hold, and from now on no larger ones than its half. Raises `UnavailableError` for one sample."""
        if len(requests) == 1:
            raise UnavailableError(
                f"out of GPU memory on sample {requests[0].id} alone; free the GPU, or ask with a smaller max_new_tokens; finished "
                "answers are kept"
            )
        torch.cuda.empty_cache()
        middle = (len(requests) + 1) // 2
        if middle < self.batch_size:
            self.batch_size = middle
            _log.warning(
                "out of GPU memory on a batch of %d (first sample %s); going on with batches of %d, whose answers are the same",
                len(requests), requests[0].id, middle,
            )  # fmt: skip
        for part in (slice(0, middle), slice(middle, None)):
            yield from self._answer(requests[part], prompts[part])

    @torch.inference_mode()
    def _forward(self, requests: Sequence[Request], prompts: Sequence[str]) -> list[Response]:
        if requests[0].options.get("masks"):
            return self._marked(requests, prompts)
        if requests[0].options.get("edits"):
            return self._edited(requests, prompts)
        inputs = self._encode(requests, prompts)
        if self.kept is not None:
            inputs = self.kept.encode(self.model, inputs)
        options = dict(requests[0].options)
        stops, seed = options.pop("stop", None), options.pop("seed", None)
        options.setdefault("do_sample", False)
        if not options["do_sample"]:
            options |= {"temperature": None, "top_p": None, "top_k": None}
        options["pad_token_id"] = self._tokenizer.pad_token_id
        sampling = self._seeded(requests[0].id, seed) if options["do_sample"] else nullcontext()
        beams = options.get("num_beams") or getattr(self.model.generation_config, "num_beams", None) or 1
        chosen = None if options["do_sample"] or beams > 1 else ChosenProbabilities()
        if chosen is not None:
            options["logits_processor"] = [chosen]
        with sampling, self._routing_seen() as weights:
            output = self.model.generate(**inputs, **options)
        routing = self._routing_of(requests, weights)
        length = inputs["input_ids"].shape[1]
        replies = output[:, length:]
        prompt_lengths = inputs["attention_mask"].sum(1).tolist()
        sure = chosen.of(replies, self._ends()) if chosen is not None else [None] * len(requests)
        responses = []
        for request, prompt, reply, num_prompt, logprob in zip(requests, prompts, replies, prompt_lengths, sure):
            text = self._tokenizer.decode(reply, skip_special_tokens=True)
            tokens = int((reply != self._tokenizer.pad_token_id).sum())
            seen = routing.get(request.id)
            answer = answer_text(cut_at_stops(text, stops))
            responses.append(Response(request.id, answer, prompt, int(num_prompt), tokens, seen, logprob=logprob))
        return responses

    def _marked(self, requests: Sequence[Request], prompts: Sequence[str]) -> list[Response]:
        """What the model marks in each request's picture, as text: the answer and run lengths of its masks."""
        options = {name: value for name, value in requests[0].options.items() if name != "masks"}
        for request in requests:
            if len(request.images) != 1 or sum(turn.role == "user" for turn in request.turns) != 1:
                raise AlignmentError(f"request {request.id}: masks are given for one question about one picture")
        asked = [request.turns[-1].content.replace(IMAGE_MARK, "").strip() for request in requests]
        pictures = [request.images[0] for request in requests]
        found = self.model.segment(pictures, questions=asked, processor=self.processor, **options)
        texts = [json.dumps({"text": answer_text(one.text), "masks": one.rle()}) for one in found]
        return [Response(request.id, text, prompt) for request, text, prompt in zip(requests, texts, prompts)]

    def _edited(self, requests: Sequence[Request], prompts: Sequence[str]) -> list[Response]:
        """Each request's picture as its question changes it, as text: what the model says changes, and a PNG in base64."""
        from mllm.eval.metrics.editing import png_text
        from mllm.heads.editing import edit_pictures

        for request in requests:
            if len(request.images) != 1 or sum(turn.role == "user" for turn in request.turns) != 1:
                raise AlignmentError(f"request {request.id}: an edit is one instruction about one picture")
        asked = [request.turns[-1].content.replace(IMAGE_MARK, "").strip() for request in requests]
        found = edit_pictures(self.model, [request.images[0] for request in requests], asked, processor=self.processor)
        texts = [
            json.dumps({"text": answer_text(one.text), "picture": png_text(np.asarray(one.pil()))}) for one in found
        ]
        return [Response(request.id, text, prompt) for request, text, prompt in zip(requests, texts, prompts)]

    def _ends(self) -> list[int]:
        """Tokens that end a reply."""
        ends = self.model.generation_config.eos_token_id
        return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]

    @torch.inference_mode()
    def likelihood(self, request: Request, continuation: str) -> tuple[float, bool]:
        """(log probability of ``continuation`` after the rendered request, whether greedy decoding would say it)."""
        inputs = self._encode([request], [self.render(request)])
        reply = self._tokenizer(continuation, add_special_tokens=False, return_tensors="pt")["input_ids"]
        reply = reply.to(self.model.device)
        if not reply.shape[1]:
            return 0.0, True
        shape = inputs["input_ids"].shape
        for name, value in list(inputs.items()):
            if value.shape == shape and not torch.is_floating_point(value):  # ids, mask, kinds of token
                more = reply if name == "input_ids" else torch.full_like(reply, int(name == "attention_mask"))
                inputs[name] = torch.cat([value, more.to(value.dtype)], 1)
        logits = self.model(**inputs).logits[0, -reply.shape[1] - 1 : -1].float()
        chosen = torch.log_softmax(logits, -1).gather(1, reply[0][:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == reply[0]).all())

    @one_thread()
    def _encode(self, requests: Sequence[Request], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        nested = [list(request.images) for request in requests]
        images: Any = nested if self._ours else [image for row in nested for image in row]
        extra = {"add_special_tokens": False} if self._starts_itself(prompts[0]) else {}
        inputs = self.processor(
            text=list(prompts),
            images=images if any(nested) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **extra,
        )
        inputs = dict(inputs)
        if self._ours and any(nested):
            inputs |= self._routing(requests)
        dtype, device = self.model.dtype, self.model.device
        return {
            key: value.to(device, dtype) if torch.is_floating_point(value) else value.to(device)
            for key, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }

    def _starts_itself(self, prompt: str) -> bool:
        """Whether the chat template has already written the first special token."""
        first = getattr(self._tokenizer, "bos_token", None)
        return self._ours or bool(first and prompt.startswith(first))

    @contextmanager
    def _routing_seen(self) -> Iterator[list[torch.Tensor]]:
        """Collects the routing weights ``(B, E)`` of a model with a router while it generates."""
        bank = getattr(getattr(self.model, "model", None), "vision_tower", None)
        collected: list[torch.Tensor] = []
        if not getattr(bank, "experts", ()):
            yield collected
            return

        def note(module: Any, arguments: Any, output: Any) -> None:
            if output[1] is not None:
                collected.append(output[1].weights.detach().float().cpu())

        handle = bank.register_forward_hook(note)  # type: ignore[union-attr]
        try:
            yield collected
        finally:
            handle.remove()

    def _routing_of(self, requests: Sequence[Request], weights: list[torch.Tensor]) -> dict[str, dict[str, float]]:
        """Request → expert → mean weight over its images."""
        if not weights:
            return {}
        rows, names, start = torch.cat(weights), self.model.model.vision_tower.experts, 0
        routing = {}
        for request in requests:
            mine = rows[start : start + len(request.images)]
            start += len(request.images)
            if len(mine):
                routing[request.id] = dict(zip(names, mine.mean(0).tolist()))
        return routing

    def _routing(self, requests: Sequence[Request]) -> dict[str, torch.Tensor]:
        from mllm.processing.chat import routing_inputs

        rows = [routing_inputs(self.processor, request.turns, len(request.images)) for request in requests]
        parts = [row["router_input_ids"] for row in rows if row]
        if not parts:
            return {}
        width = max(part.shape[1] for part in parts)
        padded = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
        return {"router_input_ids": torch.cat(padded)}

    @staticmethod
    def _seeded(name: str, seed: int | None) -> Any:
        digest = hashlib.sha256(f"{seed or 0}|{name}".encode()).digest()
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        fork = torch.random.fork_rng(devices=devices)

        class Seeded:
            def __enter__(self) -> None:
                fork.__enter__()
                torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

            def __exit__(self, *details: Any) -> None:
                fork.__exit__(*details)

        return Seeded()


class ChosenProbabilities(LogitsProcessor):
    """Changes nothing; keeps the log probability of every token that a greedy `generate` chooses."""

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._last is not None:
            self._steps.append(self._last.gather(1, input_ids[:, -1:]))
        self._last = torch.log_softmax(scores.float(), -1)
        return scores

    def of(self, replies: torch.Tensor, ends: Sequence[int]) -> list[float]:
        """Sum for each of the replies ``(B, T)``, up to and with the first token of ``ends``."""
        assert self._last is not None
        steps = torch.cat([*self._steps, self._last.gather(1, replies[:, -1:])], 1)
        ended = torch.isin(replies, torch.tensor(ends, device=replies.device, dtype=replies.dtype)).int()
        counts = (ended.cumsum(1) - ended) == 0
        return torch.where(counts, steps, 0.0).sum(1).tolist()


def weights_hash(model: torch.nn.Module) -> str:
    """Sixteen hex digits over names, dtypes, shapes and bytes of all parameters and saved buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def processor_hash(processor: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    """Eight hex digits over chat template, image settings and vocabulary size."""
    images = getattr(processor, "image_processor", None)
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    settings = [
        getattr(processor, "chat_template", None),
        images.to_dict() if images is not None and hasattr(images, "to_dict") else None,
        len(tokenizer),
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _options_key(request: Request) -> str:
    return repr(sorted(request.options.items()))
