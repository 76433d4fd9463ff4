"""Which rows of the embedding and of the head belong to tokens that were added to the source's, and do they learn?

An adapter leaves the embedding as it is, and rows of added tokens start at random: they would stay noise. PEFT's
``trainable_token_indices`` lets chosen rows learn beside the adapter, and merging writes them into the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm.errors import ConfigError
from mllm.recipe import StageSpec

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.train.engine.trainable import TrainableModel


PART = "language_model"


def added_rows(model: TrainableModel) -> list[int]:
    """Ids of added tokens whose rows are read: all but the image placeholder, in whose place features stand."""
    first, end = getattr(model.config, "added_token_ids", None) or (0, 0)
    return [number for number in range(first, end) if number != getattr(model.config, "image_token_id", None)]


def rows_beside_adapter(
    model: MllmForConditionalGeneration, stage: StageSpec, *, zero_stage: int
) -> dict[str, list[int]]:
    """Module name → rows that learn beside the language model's adapter; tied to the embedding, the head follows it.

    Raises `ConfigError` where PEFT cannot carry them: under ZeRO-3 (it reads a table that is not gathered), and for a
    head with a bias (which it leaves out).
    """
    spec = stage.learning()[PART].lora
    rows = added_rows(model)
    if spec is None or not spec.added_tokens or not rows:
        return {}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    where = f"stages.{stage.name}.learn.{PART}.lora"
    if zero_stage == 3:
        raise ConfigError(
            f"{where}: {len(rows)} rows of added tokens learn beside the adapter, which ZeRO-3 cannot do; use engine: fsdp2, or "
            "added_tokens: false to leave them at their random start"
        )
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"{where}: {len(rows)} rows of added tokens would learn beside the adapter, but PEFT drops the bias of this "
            "model's head; let the whole language_model learn, or set added_tokens: false to leave them at their random start"
        )
    tables = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)]: rows for table in tables}


def rows_line(model: TrainableModel, stage: StageSpec) -> str | None:
    """How many rows of added tokens learn in a stage, or why none does; None where there is nothing to say. ``model`` as
    `mllm.train.engine.groups.apply_learning` left it, or before."""
    config, learns = model.config, stage.learning().get(PART)
    known = getattr(config, "added_token_ids", None)
    lora = None if learns is None else learns.lora
    if known is None:
        return (
            "rows of added tokens: not recorded which they are (a model from scratch, or of an older version); the adapter "
            "leaves all rows as they are"
            if lora is not None
            else None
        )
    number = len(added_rows(model))
    if not number:
        return (
            "rows of added tokens: none learns, the image placeholder is the only one and its row is never read"
            if lora is not None
            else None
        )
    if learns is None:
        return f"rows of added tokens: none of {number} learns in this stage, {PART} is frozen"
    if lora is None:
        return f"rows of added tokens: all {number} learn with the whole {PART}"
    if not lora.added_tokens:
        return f"rows of added tokens: none of {number} learns, learn.{PART}.lora.added_tokens is false"
    return f"rows of added tokens: all {number} learn beside the adapter"
