"""How do frozen encoders run beside the update of the step before, which leaves the GPU's arithmetic idle?

The update reads and writes memory; encoders that do not learn need nothing of it. A batch is copied, and its pictures are encoded, on a
CUDA stream of their own; the language model's stream waits for what they give. The same kernels on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm.data.collate import Batch
from mllm.errors import ConfigError
from mllm.recipe import StageSpec
from mllm.train.engine.base import Engine, choose_engine

if TYPE_CHECKING:
    from mllm.types import VisionFeatures, VisualLayout


class EncoderStream:
    """Of a model whose encoders are all frozen and unrouted. `attach` puts it before them, and gives what takes it away again."""

    def __init__(self, model: nn.Module, stage: StageSpec, device: torch.device):
        """Raises `ConfigError` for encoders that learn, are routed, or are not there."""
        where = f"stages.{stage.name}.encoders_beside_update"
        bank: Any = getattr(getattr(model, "model", None), "vision_tower", None)
        if choose_engine(stage).zero_stage == 3:
            raise ConfigError(
                f"{where}: zero3 gathers weights on the stream of all else; use none, zero1 or zero2, or leave it out"
            )
        if bank is None:
            raise ConfigError(f"{where}: this model has no encoders; leave it out")
        learning = [
            name for name, encoder in bank.encoders.items() if any(p.requires_grad for p in encoder.parameters())
        ]
        if learning or bank.experts:
            which = f"encoder {learning[0]!r} learns" if learning else f"encoder {bank.experts[0]!r} is routed"
            raise ConfigError(f"{where}: {which}, so it cannot run before the update is done; leave it out")
        self.bank, self.device, self.runs = bank, device, 0
        self._encode = bank.encode_base
        self._stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._copied: list[Tensor] = []
        self._started = False

    def attach(self, engine: Engine) -> Callable[[], Any]:
        """Let the engine's batches come, and the bank's encoders run, here; returns what undoes it."""
        self.bank.encode_base, engine.to_device = self._encode_base, self.to_device
        return lambda: self.bank.__dict__.pop("encode_base", None)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the device, copied without waiting for what the GPU is doing."""
        if not self._started:  # weights and buffers may yet be on their way
            self._wait(self._stream, self._present())
            self._started = True
        with self._within():
            batch = batch.to(self.device, non_blocking=True)
        self._copied = [*batch.inputs.values()]
        self._hand_over(value for value in (*vars(batch).values(), *self._copied) if isinstance(value, Tensor))
        return batch

    def _encode_base(
        self, pixels: Mapping[str, Tensor], layouts: Sequence[VisualLayout] | None = None
    ) -> dict[str, VisionFeatures]:
        if not all(any(tensor is own for own in self._copied) for tensor in pixels.values()):
            self._wait(self._stream, self._present())  # made by something that the other stream may not have done yet
        with self._within():
            features = self._encode(pixels, layouts)
        self.runs += 1
        parts = [(found.tokens, found.prefix, found.attention) for found in features.values()]
        self._hand_over(tensor for some in parts for tensor in some if tensor is not None)
        return features

    def _within(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _present(self) -> Any:
        return None if self._stream is None else torch.cuda.current_stream(self.device)

    def _hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Tensors made here, to the stream that everything else runs on: it waits, and their memory is not given anew before it is done."""
        present = self._present()
        self._wait(present, self._stream)
        for tensor in tensors:
            if present is not None and tensor.is_cuda:
                tensor.record_stream(present)

    @staticmethod
    def _wait(waiting: Any, awaited: Any) -> None:
        if waiting is not None:
            waiting.wait_stream(awaited)
