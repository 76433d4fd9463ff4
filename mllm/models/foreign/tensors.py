"""Was every tensor of a foreign checkpoint used exactly once?"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mllm.errors import CheckpointError
from mllm.models.weight_files import some_names

NEVER_LEARNED = (r".*rotary_emb\.inv_freq", r".*position_ids", r".*\.masked_bias", r".*\.attn\.bias")
"""Buffers that older libraries wrote and that are computed from the config."""


class Tensors:
    """The tensors of a file; each must be taken once, or be named as spare, before `finish`."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str | Path):
        self._tensors = dict(tensors)
        self._where = where
        self._used: set[str] = {k for k in tensors if any(re.fullmatch(p, k) for p in NEVER_LEARNED)}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, prefix: str, *, to: str = "") -> dict[str, Tensor]:
        """Every tensor whose name begins with ``prefix`` and was not taken yet, under ``to`` + the rest of its name."""
        found = {k: v for k, v in self._tensors.items() if k.startswith(prefix) and k not in self._used}
        self._used |= set(found)
        return {to + name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def finish(self) -> None:
        """Raise `CheckpointError` when a tensor has no place in the converted model."""
        left = sorted(set(self._tensors) - self._used)
        if left:
            raise CheckpointError(
                f"{self._where}: {len(left)} tensors have no place in the converted model ({some_names(left)}); nothing was converted, "
                "since without them it would compute something else"
            )


def output_head(embedding: Tensor, head: Mapping[str, Tensor], *, tied: bool, where: str | Path) -> dict[str, Tensor]:
    """The output head as ``{"weight": …}`` (and bias): tied or not is what the config says, never what the file lacks.

    Raises `CheckpointError` for an untied head that is absent, and for a tied one that differs from the embedding.
    """
    if tied:
        if "weight" in head and not torch.equal(head["weight"], embedding):
            raise CheckpointError(
                f"{where}: its config ties the output head to the embedding (tie_word_embeddings), but the file holds two "
                "different ones; set tie_word_embeddings: false in the config if both were trained"
            )
        return {**head, "weight": embedding}
    if "weight" not in head:
        raise CheckpointError(
            f"{where}: the output head (lm_head.weight) is missing and the config does not tie it to the embedding; a shard may "
            "be absent: copy the checkpoint again"
        )
    return dict(head)


def within(
    state: Mapping[str, Tensor], kept: Collection[str], whole: Collection[str], *, where: str
) -> dict[str, Tensor]:
    """What a shortened encoder keeps of a whole one's tensors.

    Args:
        state: The file's tensors of this encoder.
        kept: Names in the encoder as it is used, cut after the layer it hands out.
        whole: Names in the encoder before it is cut, pooling heads included: what may be left over.

    Raises `CheckpointError` for tensors of neither.
    """
    foreign = sorted(set(state) - set(kept) - set(whole))
    if foreign:
        raise CheckpointError(
            f"{where}: {len(foreign)} tensors belong to no part of this encoder ({some_names(foreign)}); is its config "
            "that of another size?"
        )
    return {name: tensor for name, tensor in state.items() if name in kept}
