"""Which tokens does a model add to its language model's vocabulary, and how do their rows begin?"""

# transformers' own annotations (Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AddedToken

from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.protocol import TextTokenizer
from mllm.processing.turns import special_ids

VOCABULARY_MULTIPLE = 64


def add_tokens(tokenizer: TextTokenizer, tokens: Mapping[str, bool]) -> None:
    """Give the tokenizer the tokens that it does not know.

    Args:
        tokenizer: the text tokenizer; changed in place.
        tokens: text → whether it is special, and no part of decoded answers.
    """
    known = tokenizer.get_vocab()
    for token, special in tokens.items():
        if token not in known:
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)


def add_image_token(tokenizer: TextTokenizer, token: str) -> None:
    """Make a text a special token of the tokenizer, where it is none.

    Args:
        tokenizer: the text tokenizer; changed in place.
        token: the placeholder of images, ``<image>`` for instance.
    """
    if tokenizer.get_vocab().get(token) not in special_ids(tokenizer):
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)


def added_ids(before: int, tokenizer: TextTokenizer, vocabulary: int) -> list[int]:
    """Ids of tokens that a language model never read.

    Args:
        before: tokens that the tokenizer had; where it has more than the model, those are new too.
        tokenizer: the tokenizer as it is now.
        vocabulary: rows of the language model's embedding.

    Returns:
        The first such id and one past the last.
    """
    return [min(before, vocabulary), len(tokenizer)]


def num_token_ids(tokenizer: TextTokenizer) -> int:
    """One past the largest id; a tokenizer whose ids have gaps has fewer tokens than that.

    Args:
        tokenizer: the tokenizer.

    Returns:
        Rows that an embedding needs at least.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def grown(num_tokens: int, vocabulary: int) -> int:
    """Rows of the embedding when there are so many tokens.

    Args:
        num_tokens: tokens of the tokenizer.
        vocabulary: rows that there are.

    Returns:
        As many as there were, or a whole multiple of `VOCABULARY_MULTIPLE`.
    """
    return vocabulary if num_tokens <= vocabulary else -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def grow_vocabulary(model: MllmForConditionalGeneration, num_tokens: int) -> None:
    """Give embedding and head rows for so many tokens, where they have fewer. Rows of new tokens start with mean and spread of the
    model's own; rows that only fill the tables up start at the mean, where no answer and hardly any probability goes to them.

    Args:
        model: changed in place.
        num_tokens: tokens of the tokenizer.
    """
    known = model.config.text_config.vocab_size
    if num_tokens > known:
        of_tokenizer = model.config.num_token_ids
        model.resize_token_embeddings(grown(num_tokens, known), mean_resizing=False)
        model.config.num_token_ids = of_tokenizer  # the rest of the rows fills the tables up
        _start_new_rows(model, known, num_tokens)


def _start_new_rows(model: MllmForConditionalGeneration, known: int, num_tokens: int) -> None:
    """Initial values for the embeddings of added tokens: mean and spread of the model's own, in every dimension. Torch's
    start, with a deviation of 1, drowns what is learned beside them; 0.02 is lost among SmolLM2's 0.136."""
    modules = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    with torch.no_grad():
        for table in {id(m.weight): m.weight for m in modules}.values():
            mean, spread = (statistic(table[:known].float(), dim=0) for statistic in (torch.mean, torch.std))  # pyright: ignore[reportIndexIssue]
            fresh = torch.randn(len(table) - known, table.shape[1], device=table.device)  # pyright: ignore[reportArgumentType, reportIndexIssue]
            fresh[num_tokens - known :] = 0.0
            table[known:] = (mean + spread * fresh).to(table.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
        for bias in (getattr(m, "bias", None) for m in modules):
            if bias is not None:
                bias[known:] = bias[:known].mean()
