"""Do visual tokens say the words of their picture, before the language model looks at them? ``options.word_contrast`` of a stage.

A language model begins to read pictures late: what it should attend to means nothing yet, and what nobody attends to has no reason to mean
anything. Here the visual tokens are taught by themselves. Every token of an answer is looked for among the visual tokens of its own picture
and of the batch's other pictures whose answers lack it, by cosine with the language model's own embedding, and must be found in its own
(the late interaction of FILIP, arXiv 2111.07783, with the words as published embeddings; which visual token says a word is not told, as in
arXiv 1411.4952). A word in all answers of a batch teaches nothing, so no prior can lower this loss. Nothing changes once it is trained.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.errors import AlignmentError
from mllm.models.modeling_base import MllmOutput

SHARPNESS = 20.0
"""What cosines are multiplied with: at a random start (a spread of 0.04 at 576 wide) no visual token is chosen yet."""


def word_contrast(tokens: list[Tensor], words: list[Tensor], table: Tensor) -> Tensor:
    """Mean over each row's different words of −log(how much of the word lies in its own row's tokens, not in those of rows without it).

    Args:
        tokens: one ``(M, L)`` a row: the visual tokens of its pictures; rows without pictures are not compared.
        words: one ``(W,)`` a row: ids of the language model, in any order and number.
        table: ``(V, L)``, the language model's embeddings; they get no gradient.

    Returns:
        A scalar in float32, 0 (with a gradient of zeros) where fewer than two rows have pictures or no word tells rows apart.
    """
    rows = [place for place, own in enumerate(tokens) if len(own)]
    lengths = [len(words[place]) for place in rows]
    if len(rows) < 2 or not any(lengths):
        return sum((own.float().sum() * 0 for own in tokens), table.new_zeros((), dtype=torch.float32))
    # For all rows at once: row by row, a batch of 64 sends thousands of small kernels and waits for the GPU twice a row.
    candidates, position = torch.cat([words[place] for place in rows]).unique(return_inverse=True)
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)).to(table.device)
    said = torch.zeros(len(rows), len(candidates), dtype=torch.bool, device=table.device)
    said[owner, position] = True
    found = _found([tokens[row] for row in rows], F.normalize(table.detach()[candidates].float(), dim=-1))
    elsewhere = found.masked_fill(said, float("-inf")).logsumexp(0)  # -inf for a word of all rows
    told = said & elsewhere.isfinite()
    return F.softplus(torch.where(told, elsewhere - found, 0.0)).mul(told).sum() / told.sum().clamp(min=1)


def _found(tokens: list[Tensor], wanted: Tensor) -> Tensor:
    """How much of each word ``(C, L)`` lies in each row's tokens, ``(R, C)`` on a logarithmic scale."""

    def in_tokens(own: Tensor) -> Tensor:
        return (SHARPNESS * F.normalize(own.float(), dim=-1) @ wanted.T).logsumexp(-2)

    alike = len({len(own) for own in tokens}) == 1
    return in_tokens(torch.stack(tokens)) if alike else torch.stack([in_tokens(own) for own in tokens])


class WordContrast:
    """Behind the model, in training: ``weight`` times `word_contrast` of the call's rows is added to its loss."""

    def __init__(self, weight: float, special: set[int]):
        """special: ids that are no words (the end of a turn)."""
        self.weight, self.special = weight, special

    def attach(self, model: nn.Module) -> Any:
        """The handle that ends it."""
        return model.register_forward_hook(self._add, with_kwargs=True)

    def attach_alone(self, model: nn.Module) -> Alone:
        """The same without the language model's pass: nothing but this loss is learned, in a fraction of the time. The handle that ends
        it."""
        own: Any = model

        def forward(input_ids: Tensor, labels: Tensor, pixel_values: Tensor | None = None, **inputs: Any) -> MllmOutput:
            learned = [p for p in own.model.multi_modal_projector.parameters() if p.requires_grad]
            loss = sum(
                (p.sum() * 0.0 for p in learned), torch.zeros((), device=input_ids.device)
            )  # of rows without pictures
            contrast = loss.detach()
            if pixel_values is not None and len(pixel_values):
                seen = _end_to_end(own.get_image_features(pixel_values, **inputs).pooler_output)
                contrast, share = self._contrast(model, seen, input_ids, labels, inputs.get("num_items_in_batch"))
                loss = loss + self.weight * share * contrast
            return MllmOutput(loss=cast(Any, loss), losses={"word_contrast": contrast.detach()})

        own.forward = forward
        return Alone(model)

    def _add(self, model: Any, arguments: Any, inputs: dict[str, Any], output: Any) -> Any:
        seen = output.image_hidden_states
        if not model.training or output.loss is None or seen is None or not len(seen):
            return None
        whole = inputs.get("num_items_in_batch")
        loss, share = self._contrast(model, _end_to_end(seen), inputs["input_ids"], inputs["labels"], whole)
        output.loss = output.loss + (self.weight * share * loss).to(output.loss.dtype)
        output.losses = {**(output.losses or {}), "word_contrast": loss.detach()}
        return output

    def _contrast(self, model: Any, seen: Tensor, ids: Tensor, labels: Tensor, whole: Any) -> tuple[Tensor, Any]:
        """The loss of these rows, and this call's share of the step. seen: ``(ΣM, L)``."""
        special = torch.tensor(sorted(self.special), device=labels.device)
        is_word = (labels >= 0) & ~torch.isin(labels, special)
        lengths, counts = torch.stack([(ids == model.config.image_token_id).sum(1), is_word.sum(1)]).tolist()
        if sum(lengths) != len(seen):
            raise AlignmentError(
                f"word_contrast: {len(seen)} visual tokens for {sum(lengths)} places in the text, so they cannot be told by rows; set "
                "the stage's options.word_contrast to 0 for this model"
            )
        words = list(labels[is_word].split(counts))
        loss = word_contrast(list(seen.split(lengths)), words, model.get_input_embeddings().weight)
        return loss, 1.0 if whole is None else (labels[:, 1:] != -100).sum().float() / whole


def _end_to_end(seen: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Visual tokens ``(ΣM, L)``: of pictures with equally many ``(N, M, L)``, or picture by picture (tiles)."""
    return seen.flatten(0, -2) if isinstance(seen, Tensor) else torch.cat(list(seen))


class Alone:
    """A model whose own forward pass is set aside."""

    def __init__(self, model: nn.Module):
        self.model = model

    def remove(self) -> None:
        """Give it back."""
        del self.model.forward
