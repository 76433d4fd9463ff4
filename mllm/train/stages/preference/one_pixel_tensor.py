"""How do several encoders' pixels pass through trainers that carry ``pixel_values`` and nothing else?

TRL's GRPO trainer hands the model the processor outputs it knows by name. For the time of a stage the pixels of all encoders travel
side by side in one ``(images, values)`` tensor and are taken apart where the model begins.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.errors import UnavailableError
from mllm.processing.pixel_keys import PRIMARY_PIXELS
from mllm.processing.protocol import Processor

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


class OnePixelTensor:
    """``with OnePixelTensor(model, processor) as joined:`` – ``joined.processor`` gives one tensor of pixels, which the model
    understands until the block ends. Nothing changes for a model with one encoder. Raises `UnavailableError` for a model whose
    router chooses encoders: the choice is part of the policy, and these trainers do not carry it."""

    def __init__(self, model: MllmForConditionalGeneration, processor: Processor, *, active: bool = True):
        if model.config.router is not None:
            raise UnavailableError(
                "preference and reward stages are not offered for a model with a router: TRL does not carry its choices"
            )
        if processor.rules.needs_size:
            raise UnavailableError(
                f"preference and reward stages are not offered for a model with views {processor.rules.views.type}: TRL does not "
                "carry several views of a picture"
            )
        if processor.rules.video is not None:
            raise UnavailableError(
                "preference and reward stages are not offered for a model that takes video: TRL does not carry several frames"
            )
        self.model = model
        self.processor: Any = processor
        self.keys = dict(processor.pixel_keys)
        self.shapes = {n: (3, s.height, s.width) for n, s in processor.image_processor.specs.items()}
        self._joins = active and len(self.keys) > 1
        self._handles: list[Any] = []

    def __enter__(self) -> OnePixelTensor:
        if self._joins:
            self.processor = copy.copy(self.processor)
            self.processor.image_processor = _joining(self.processor.image_processor, list(self.keys.values()))
            self.understood_by(self.model)
        return self

    def understood_by(self, model: MllmForConditionalGeneration) -> None:
        """Let one more model of the same kind (a reference) take the joined pixels; None is passed over."""
        if self._joins and model is not None:
            self._handles.append(model.model.register_forward_pre_hook(self._take_apart, with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _take_apart(self, _: Any, arguments: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        joined = inputs.get(PRIMARY_PIXELS)
        if not isinstance(joined, Tensor) or joined.dim() != 2:
            return arguments, inputs
        parts = joined.split([shape[0] * shape[1] * shape[2] for shape in self.shapes.values()], dim=1)
        pixels = {self.keys[n]: part.unflatten(1, shape) for (n, shape), part in zip(self.shapes.items(), parts)}
        return arguments, {**inputs, **pixels}


def _joining(image_processor: Any, keys: list[str]) -> Any:
    """A copy of an image processor that gives all encoders' pixels end to end as ``pixel_values`` ``(images, values)``."""
    kind = type(image_processor)

    class Joining(kind):
        def preprocess(self, images: Any, *arguments: Any, **options: Any) -> Any:
            data = super().preprocess(images, *arguments, **options)
            if all(key in data for key in keys):
                flat = [torch.as_tensor(data.pop(key)).flatten(1) for key in keys]
                data[PRIMARY_PIXELS] = torch.cat(flat, dim=1)
            return data

    Joining.__name__ = kind.__name__
    made = copy.copy(image_processor)
    made.__class__ = Joining
    return made
