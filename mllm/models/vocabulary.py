"""Which tokens does a model add to its language model's vocabulary, and how do their rows begin?"""

# transformers' own annotations (Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from transformers import AddedToken

from mllm.errors import ConfigError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.protocol import TextTokenizer
from mllm.processing.turns import special_ids

VOCABULARY_MULTIPLE = 64


def add_tokens(tokenizer: TextTokenizer, tokens: Mapping[str, bool]) -> None:
    """Give the tokenizer the tokens that it does not know.

    Args:
        tokenizer: the text tokenizer; changed in place.
        tokens: text → whether it is special, and no part of decoded answers.

    Raises:
        ConfigError: the vocabulary leaves ids out, and a new token would take another's.
    """
    known = tokenizer.get_vocab()
    for token, special in tokens.items():
        if token not in known:
            _add(tokenizer, token, special=special)


def add_image_token(tokenizer: TextTokenizer, token: str) -> None:
    """Make a text a special token of the tokenizer, where it is none.

    Args:
        tokenizer: the text tokenizer; changed in place.
        token: the placeholder of images, ``<image>`` for instance.

    Raises:
        ConfigError: as `add_tokens`.
    """
    if tokenizer.get_vocab().get(token) not in special_ids(tokenizer):
        _add(tokenizer, token, special=True)


def _add(tokenizer: TextTokenizer, token: str, *, special: bool) -> None:
    """The tokenizers library gives a token the number of tokens as its id, which is another's where the vocabulary leaves ids out."""
    before = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
    given = tokenizer.convert_tokens_to_ids(token)
    taken = [name for name, number in before.items() if number == given and name != token]
    if taken:
        free = sorted(set(range(given)) - set(before.values()))
        raise ConfigError(
            f"the tokenizer gives {token!r} the id {given}, which {taken[0]!r} has: its vocabulary of {len(before)} tokens leaves out "
            f"{len(free)} ids below that ({', '.join(map(str, free[:4]))}{' …' if len(free) > 4 else ''}). In its tokenizer.json, under "
            f'model.vocab, give each of them a name, such as "<|unused_{free[0] if free else 0}|>"'
        )


def give_padding(tokenizer: TextTokenizer) -> None:
    """Let EOS (else the unknown token) fill rows up, where a tokenizer has no token for it; the attention mask tells which is which.

    Args:
        tokenizer: the text tokenizer; changed in place.

    Raises:
        ConfigError: it has none of the three.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            "the tokenizer has neither pad_token, eos_token nor unk_token, so that rows of unlike length cannot be filled up and no answer "
            'ends; name them in its tokenizer_config.json, such as "eos_token": "</s>"'
        )


def added_ids(before: Collection[int], tokenizer: TextTokenizer, vocabulary: int) -> list[int]:
    """Ids of tokens that a language model never read.

    Args:
        before: ids that the tokenizer had; where one is no row of the model, it is new too.
        tokenizer: the tokenizer as it is now.
        vocabulary: rows of the language model's embedding.

    Returns:
        The first such id and one past the last; twice the same where there is none.
    """
    now = set(tokenizer.get_vocab().values())
    new = now.difference(before) | {number for number in now if number >= vocabulary}
    end = num_token_ids(tokenizer)
    return [min(new, default=end), 1 + max(new, default=end - 1)]


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
