"""How do codebooks start on real data?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mllm.visual_tokenizers.quantizers.codebook import Codebook, kmeans
from mllm.visual_tokenizers.quantizers.residual import ResidualQuantizer
from mllm.visual_tokenizers.quantizers.search import nearest_codes
from mllm.visual_tokenizers.quantizers.vector import VectorQuantizer

MOST_VECTORS = 65_536


@torch.no_grad()
def initialise_codebooks(tokenizer: nn.Module, pixels: Tensor, batch_size: int, *, seed: int = 0) -> None:
    """Put every learned codebook of a tokenizer on k-means centres of the vectors that ``pixels`` send to it.

    Books that are frozen behind a linear map stay as they are. Quantizers see their own inputs (for multi-scale
    ones: those of all scales, each with the residual that the untrained book leaves).
    """
    found = [m for m in tokenizer.modules() if isinstance(m, (VectorQuantizer, ResidualQuantizer))]
    seen: dict[int, list[Tensor]] = {id(m): [] for m in found}

    def remember(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[id(module)].append(arguments[0].detach().float().flatten(0, 1))

    hooks = [module.register_forward_pre_hook(remember) for module in found]
    training = tokenizer.training
    tokenizer.eval()
    try:
        for start in range(0, len(pixels), batch_size):
            tokenizer(pixels[start : start + batch_size])
    finally:
        for hook in hooks:
            hook.remove()
        tokenizer.train(training)
    for module in found:
        vectors = torch.cat(seen[id(module)])
        generator = torch.Generator().manual_seed(seed)
        vectors = vectors[torch.randperm(len(vectors), generator=generator)[:MOST_VECTORS].to(vectors.device)]
        if isinstance(module, VectorQuantizer):
            _vector(module, vectors, seed)
        else:
            _residual(module, vectors, seed)


def _vector(module: VectorQuantizer, vectors: Tensor, seed: int) -> None:
    if any(book.config.learn == "frozen_linear" for book in module._all_books()):
        return
    joined = torch.cat(module._normalise(module.split(vectors)), -1)
    for book, part in zip(module._all_books(), module.split(kmeans(joined, module.size, seed=seed))):
        book.set_entries(part)


def _residual(module: ResidualQuantizer, vectors: Tensor, seed: int) -> None:
    books: list[Codebook] = list(module.books)  # type: ignore[assignment]
    if books[0].config.learn == "frozen_linear":
        return
    if module.config.shared:
        # One book serves every depth: half of it starts on the vectors, half on what the first half leaves over.
        half = module.size // 2
        coarse = kmeans(vectors, half, seed=seed)
        left = vectors - coarse[nearest_codes(vectors, coarse)]
        books[0].set_entries(torch.cat([coarse, kmeans(left, module.size - half, seed=seed + 1)]))
        return
    for depth, book in enumerate(books):
        centres = kmeans(vectors, module.size, seed=seed + depth)
        book.set_entries(centres)
        vectors = vectors - centres[nearest_codes(vectors, centres)]
