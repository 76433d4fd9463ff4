"""Which tokens does a language model really see in training: those before a token in its own sample, and no others?

Not every class of transformers hands packed samples' boundaries or positions to its attention, and not every one is causal without a mask.
What sees its neighbours, or what it should guess, learns something else and says nothing; so a row of eight tokens is asked first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mllm.models.modeling_mllm import MllmForConditionalGeneration

_HALF = 4
"""Tokens of each of two samples in a row."""
_MOST = {torch.float32: 1e-4}
_MOST_IN_16_BITS = 1e-2
"""What may move in a token that sees nothing of a change, of what moves in those that were changed: rounding, where sums take another
order."""


def check_sight(
    model: MllmForConditionalGeneration,
    attention: str,
    *,
    packing: bool,
    where: str,
    inputs: Callable[[Any, str], dict[str, Any]],
) -> None:
    """Ask a model which tokens it sees.

    Args:
        model: the multimodal model on its device, in its dtype; weights that are spread over processes (ZeRO-3) cannot be asked.
        attention: the implementation that it trains with.
        packing: whether rows hold several samples.
        where: the stage's key, which opens an error.
        inputs: makes a batch the model's inputs for an attention.

    Raises:
        ConfigError: a token sees tokens behind it, or of a sample beside its own.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    device = next(model.get_input_embeddings().parameters()).device
    text, moved = _hidden(model, _rows(model, device, packing), attention, inputs)
    limit = _MOST.get(text.dtype, _MOST_IN_16_BITS) * float(moved)
    kind = model.config.get_text_config().model_type
    if float((text[1, :-1] - text[0, :-1]).abs().max()) > limit:
        raise ConfigError(
            f"{where}.attention: with {attention}, a token of {kind} sees those behind it, and would learn nothing by guessing them; "
            "use a language model that is causal, or attention: sdpa"
        )
    if packing and float((text[2, _HALF:] - text[0, _HALF:]).abs().max()) > limit:
        raise ConfigError(
            f"{where}.packing: with attention {attention}, packed samples of {kind} see those before them in their row; set packing: false "
            "and group_by_length: true (an attention of another name may keep them apart)"
        )


def _rows(model: Any, device: torch.device, packing: bool) -> Any:
    """A batch of a row, the same with another last token, and the same with another first half."""
    ids = [k for k in range(model.get_input_embeddings().num_embeddings) if k != model.config.image_token_id]
    ids = (ids * 4 * _HALF)[-4 * _HALF :]
    row, other = torch.tensor(ids[: 2 * _HALF]), torch.tensor(ids[2 * _HALF :])
    rows = torch.stack([row, torch.cat([row[:-1], other[-1:]]), torch.cat([other[:_HALF], row[_HALF:]])]).to(device)
    if not packing:
        beside, lengths, ends = {"attention_mask": torch.ones_like(rows)}, [[2 * _HALF]] * 3, None
    else:
        places = torch.arange(_HALF, device=device).repeat(3, 2)
        beside, lengths = {"position_ids": places}, [[_HALF, _HALF]] * 3
        ends = torch.arange(0, rows.numel() + 1, _HALF, dtype=torch.int32, device=device)
    return SimpleNamespace(inputs={"input_ids": rows, **beside}, lengths=lengths, cu_seq_lens=ends)


@torch.no_grad()
def _hidden(
    model: Any, batch: Any, attention: str, inputs: Callable[[Any, str], dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Hidden states ``(3, T, L)``, and how much a token's moved where it was changed."""
    with _answering(model):
        hidden = model.model(**inputs(batch, attention)).last_hidden_state
    return hidden, (hidden[1, -1] - hidden[0, -1]).abs().max()


@contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module's own mode comes back."""
    learning = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in learning:
            module.training = True
