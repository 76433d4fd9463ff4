"""What does a model compute in a stage of kind ``routing``?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mllm.models.loss import without_placeholders
from mllm.models.modeling_base import MllmOutput
from mllm.models.routing import ask_gate, encode_short, routing_loss_of_step

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


@contextmanager
def learning_to_route(model: MllmForConditionalGeneration) -> Iterator[None]:
    """Within the block, ``model(…)`` is a step of a ``routing`` stage: no expert runs, and the loss is the router's alone, or, where the
    language model routes, that of its answer on seeing the short image."""
    forward = model.forward

    def step(*, router_input_ids: Tensor | None = None, **batch: Any) -> Any:
        pixels = model.model.pixel_keys.pop(batch)
        if model.model.vision_tower.router.asks_language_model:
            return forward(
                image_features=encode_short(model, pixels, router_input_ids), router_input_ids=router_input_ids, **batch
            )
        routing = ask_gate(model, pixels, router_input_ids)
        labels, num_items = without_placeholders(
            batch["labels"], model.config.image_token_id, batch.get("num_items_in_batch")
        )
        loss = routing_loss_of_step(model, routing, batch.get("routing_targets"), labels, num_items)
        return MllmOutput(loss=loss, routing=routing)  # type: ignore[arg-type]

    model.forward = step  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del model.forward
