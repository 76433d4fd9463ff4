"""How does vLLM keep drawings to the image grammar and guide them? A logits processor that chooses every token of a
drawing itself, for both requests of a guided pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from mllm.heads.build import head_config
from mllm.heads.codes.build import empty_tokenizer
from mllm.heads.codes.configs import VocabularyHeadConfig
from mllm.heads.codes.decoding import SampleNoise
from mllm.heads.codes.grammar import image_grammar, never_written
from mllm.models.configuration_mllm import MllmConfig
from mllm.serve.images.requests import KEY, DrawingRequest
from mllm.visual_tokenizers.sampling import guide, sample

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass
class Row:
    """A drawing's place in the batch: its request, the tokens it has so far (vLLM's own list), and its random numbers."""

    request: DrawingRequest
    output: list[int]
    uniform: list[Tensor]


class TextRules:
    """What a request that is no drawing may say, as `MllmForConditionalGeneration.image_rules` has it: a vocabulary head's
    images keep their grammar, other heads' image tokens are not generated."""

    def __init__(self, config: PreTrainedConfig, device: torch.device):
        self.ranges: list[tuple[int, int]] = []
        self.start, self.never, self.rows = -1, torch.empty(0, dtype=torch.long), {}
        if not isinstance(config, MllmConfig) or config.drawing_head is None or config.visual_tokenizer is None:
            return
        head, never = head_config(config.drawing_head), never_written(config)
        if isinstance(head, VocabularyHeadConfig):
            grammar = image_grammar(head, empty_tokenizer(config.visual_tokenizer, config.encoders))
            self.start, self.ranges = grammar.start_of_image, grammar.ranges
            never += [i for low, high in grammar.reserved() for i in range(low, high)]
        self.never = torch.tensor(sorted(set(never)), device=device)

    def add(self, index: int, prompt: list[int] | None, output: list[int]) -> None:
        if len(self.never):
            self.rows[index] = TextRow(output, list(prompt or ()))

    def apply(self, logits: Tensor) -> None:
        outside = []
        for index, row in self.rows.items():
            place = row.place(self.start)
            if 0 <= place < len(self.ranges):
                low, high = self.ranges[place]
                logits[index, :low] = -torch.inf
                logits[index, high:] = -torch.inf
            else:
                outside.append(index)
        if outside:
            logits[torch.tensor(outside, device=logits.device)[:, None], self.never] = -torch.inf


class TextRow:
    """How far back the last image began in a request's tokens; ``output`` is vLLM's own list, which grows."""

    def __init__(self, output: list[int], prompt: list[int]):
        self.output, self.prompt, self.seen, self.since = output, prompt, 0, -1

    def place(self, start: int) -> int:
        """Tokens since the last start of an image; -1: there is none."""
        if self.prompt:
            ids, self.prompt = self.prompt, []
            self._read(ids, start)
        self._read(self.output[self.seen :], start)
        self.seen = len(self.output)
        return self.since

    def _read(self, ids: list[int], start: int) -> None:
        for token in ids:
            self.since = 0 if token == start else self.since + 1 if self.since >= 0 else -1


class DrawingProcessor(LogitsProcessor):
    """Writes all weight of a drawing's logits on one id: the one that the grammar prescribes, or a code drawn as
    `generate_images` draws it (same formula, same random numbers); both requests of a pair get the same id.

    A pair whose requests are not both in the batch, or are at different places, gets the id ``broken``, which stops
    it; so does a request whose own tokens leave the grammar. A partner still reading its prompt is found out one
    step later, and the grammar ends with tokens that are no codes, so no code is past being checked. Other requests are
    held to `TextRules`.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, Row] = {}
        self.text = TextRules(vllm_config.model_config.hf_config, device)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        settings = (sampling_params.extra_args or {}).get(KEY)
        if settings is not None:
            DrawingRequest.model_validate(settings)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
            self.text.rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            settings = (getattr(params, "extra_args", None) or {}).get(KEY)
            self.rows.pop(index, None)
            self.text.rows.pop(index, None)
            if settings is None:
                self.text.add(index, prompt, output)
                continue
            request = DrawingRequest.model_validate(settings)
            noise = SampleNoise([request.seed], "cpu")
            self.rows[index] = Row(request, output, [noise.take(1)[:, 0] for low, high in request.codes()])
        for first, second, direction in batch_update.moved:
            for rows in (self.rows, self.text.rows):
                one, other = rows.pop(first, None), rows.pop(second, None)
                if one is not None:
                    rows[second] = one
                if other is not None and direction == MoveDirectionality.SWAP:
                    rows[first] = other

    def apply(self, logits: Tensor) -> Tensor:
        """logits ``(R, V)`` of all requests of the batch."""
        self.text.apply(logits)
        drawings: dict[str, list[int]] = {}
        for index, row in self.rows.items():
            drawings.setdefault(row.request.drawing, []).append(index)
        for indices in drawings.values():
            chosen = self._choose(logits, sorted(indices, key=lambda index: self.rows[index].request.free))
            for index in indices:
                logits[index] = -torch.inf
                logits[index, chosen] = 0.0
        return logits

    def _choose(self, logits: Tensor, indices: list[int]) -> int:
        rows = [self.rows[index] for index in indices]
        request, place = rows[0].request, len(rows[0].output)
        free = [row.request.free for row in rows]
        expected = [False, True] if request.cfg_scale != 1.0 else [False]
        if free != expected or any(len(row.output) != place for row in rows) or place >= len(request.ranges):
            return request.broken
        low, high = request.ranges[place]
        if high - low == 1:
            return low
        scores = logits[indices, low:high].float()
        if len(indices) == 2:
            scores = guide(scores[:1], scores[1:], request.cfg_scale)
        number = sum(last - first > 1 for first, last in request.ranges[:place])
        drawn = sample(
            scores,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            uniform=rows[0].uniform[number].to(scores.device),
        )
        return low + int(drawn[0])
