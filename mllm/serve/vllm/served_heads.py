"""What do a model's heads answer of a text that vLLM wrote? They run in the engine's process, on the states that wrote it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mllm.heads import HEADS
from mllm.heads.base import HeadParts
from mllm.heads.build import head_configs
from mllm.heads.probability import ProbabilityHead
from mllm.heads.segmentation.answer import laid
from mllm.heads.segmentation.head import SegmentationHead
from mllm.heads.segmentation.in_context import Examples
from mllm.processing.chat import encode_pixels
from mllm.processing.images import image_size
from mllm.processing.mask_files import read_mask
from mllm.processing.pixel_keys import PixelKeys

if TYPE_CHECKING:
    from mllm.models.configuration_mllm import MllmConfig

_KEPT = 4096
"""Answers whose states are remembered, the newest."""


class ServedModel(Protocol):
    """What the heads need of vLLM's model."""

    vision_tower: Any
    pixel_keys: PixelKeys


@dataclass
class Written:
    """What is kept of one answer while vLLM writes it.

    output: vLLM's own list of its ids; marks: place in it of a mask's token → the mask's states ``(n, L)``, the newest last; scores
    ``(C,)``: logits of the class words behind the phrase; recent: the newest steps' states and this answer's row in them, which chose
    the newest ids, the newest last, as many as a mask is told by.
    """

    output: list[int]
    marks: dict[int, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    place: int = -1
    seen: int = 0
    recent: list[tuple[Tensor, int]] = field(default_factory=list)

    def keep_its_own(self) -> None:
        """The answer has ended: keep its own rows of the last steps alone, not the states of all who were answered with it."""
        self.recent = [(states[index : index + 1].clone(), 0) for states, index in self.recent]

    def newest(self) -> Tensor:
        """Its own states of the last steps ``(n, L)``."""
        return torch.stack([states[index] for states, index in self.recent])


class HeadsInEngine:
    """The heads of a served model that read states of the text, the newest answers, and what they say of them. modules: name → head,
    whose weights the model loads."""

    current: HeadsInEngine | None = None
    """Those of this process's engine; a logits processor is made by vLLM, without the model."""

    def __init__(self, config: MllmConfig, infos: Any):
        parts = HeadParts(config.get_text_config().hidden_size, infos)
        built = {name: HEADS.get(c.type) for name, c in head_configs(config.heads).items()}
        wanted = {n: cls for n, cls in built.items() if issubclass(cls, (SegmentationHead, ProbabilityHead))}
        configs = head_configs(config.heads)
        self.modules = nn.ModuleDict({name: cls(configs[name], parts) for name, cls in wanted.items()})
        heads: list[Any] = list(self.modules.values())
        self.marks: Any = next((head for head in heads if isinstance(head, SegmentationHead)), None)
        self.verdict: Any = next((head for head in heads if isinstance(head, ProbabilityHead)), None)
        self.answers: OrderedDict[str, Written] = OrderedDict()
        self.hidden: Tensor | None = None
        self.scores: Tensor | None = None
        self._processor: Any = None
        HeadsInEngine.current = self

    def see(self, hidden: Tensor, logits: Tensor) -> None:
        """Keep a step's states ``(R, L)`` and, before anything changes them, the class words' logits of ``(R, V)``."""
        self.hidden = hidden
        self.scores = None if self.verdict is None else logits[:, self.verdict.config.word_ids].float()

    def begin(self, key: str, output: list[int]) -> Written:
        """An answer begins, or goes on after the engine put it aside. key: the request's name."""
        row = self.answers.setdefault(key, Written(output))
        row.output = output
        self.answers.move_to_end(key)
        while len(self.answers) > _KEPT:
            self.answers.popitem(last=False)
        return row

    def read(self, row: Written, index: int) -> None:
        """An answer's next id is about to be chosen from the step's row ``index``."""
        assert self.hidden is not None
        number = len(row.output)
        state, kept, mark = ("", 1, None) if self.marks is None else self._mark_settings()
        marked = bool(number) and row.output[-1] == mark
        if marked and state == "predict" and number > row.seen and row.recent:
            row.marks[number - 1] = row.newest()
        if number == row.seen:  # this step was run before
            del row.recent[-1:]
        row.recent = [*row.recent, (self.hidden, index)][-kept:]
        if marked and state == "self":
            row.marks[number - 1] = row.newest()
        if self.scores is not None and row.place in (-1, number):
            phrase = self.verdict.config.phrase_ids
            if phrase and row.output[-len(phrase) :] == phrase:
                row.scores, row.place = self.scores[index].clone(), number
        row.seen = number

    def _mark_settings(self) -> tuple[str, int, int]:
        """Whose state tells a mask, how many do, and the id of its token."""
        config = self.marks.config
        return config.state, config.states, config.tokens["mark"]

    @torch.inference_mode()
    def answer(self, model: ServedModel, folder: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """What the heads say of one answer; None where it is not known here.

        Args:
            model: vLLM's, whose encoders are used.
            folder: the checkpoint.
            request: ``key``; ``text``, the answer; ``question``, the last thing that was asked; ``picture``, the file that it is about
                (bytes), None without one; ``example`` where another picture came with its mask: ``picture`` (bytes) and ``mask`` (run
                lengths).

        Returns:
            ``probability`` (word → share, None without the phrase) and ``masks`` (`Segments.records`; None for a mask whose state is
            not known), for the heads that there are.
        """
        row = self.answers.pop(request["key"], None)
        if row is None:
            return None
        found: dict[str, Any] = {}
        if self.verdict is not None:
            scores = None if row.scores is None else self.verdict.probabilities(row.scores[None])[0].tolist()
            found["probability"] = None if scores is None else dict(zip(self.verdict.config.words, scores))
        if self.marks is not None:
            found["masks"] = self._masks(row, model, folder, request)
        return found

    def _masks(self, row: Written, model: ServedModel, folder: str, request: dict[str, Any]) -> list[Any]:
        count, picture = request["text"].count(self.marks.config.token), request["picture"]
        states = [row.marks[place] for place in sorted(row.marks)]
        if len(states) == count - 1 and self.marks.config.state == "predict" and row.recent:
            states.append(row.newest())  # the answer ended with it
        if not count or picture is None:
            return []
        if len(states) < count:  # a token's own state is not computed where the answer ended with it
            return [None] * count
        processor = self._own_processor(folder)
        shown = request.get("example")
        looked = [picture] if shown is None else [shown["picture"], picture]
        pixels, _ = encode_pixels(processor, looked, where="picture")
        encoder, name = model.vision_tower.encoders[self.marks.config.encoder], self.marks.config.encoder
        weight = next(encoder.parameters())
        view = model.pixel_keys.by_encoder(pixels)[name].to(weight.device, weight.dtype)
        states = states[:count]
        ends = torch.tensor([len(part) - 1 for part in states], device=weight.device)
        hidden = nn.utils.rnn.pad_sequence([part.to(weight.device) for part in states], batch_first=True)
        places = torch.stack([torch.arange(count, device=weight.device), ends], 1)
        owners, examples = torch.full_like(ends, len(looked) - 1), None
        if shown is not None:
            mask = read_mask(shown["mask"], image_size(shown["picture"], where="example"), where="example")
            first = torch.zeros_like(ends)
            examples = Examples(processor.segments.lay(mask)[None], first[:1], first)
        logits, _ = self.marks.predict(hidden, places, owners, encoder(view), examples)
        size, threshold = image_size(picture, where="picture"), self.marks.config.threshold
        marked = laid(processor.segments, request["text"], logits, size, threshold)
        return marked.records(processor.segments, request["question"])

    def _own_processor(self, folder: str) -> Any:
        if self._processor is None:
            from transformers import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(folder)
        return self._processor
