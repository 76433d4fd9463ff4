"""What does an encoder without a text side (an ImageNet network, a text recogniser) learn from pairs? It is compared with a small text side
that starts from a language model's published word embeddings, so that words mean something from the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.damage import opening
from mllm.encoders.base import VisionEncoder
from mllm.errors import MllmError, UnavailableError
from mllm.modes import by_umask
from mllm.parts.get import is_part, part_folder

WIDTH, LAYERS, HEADS, LENGTH = 256, 2, 4, 128


class Towers(nn.Module):
    """The encoder itself (not a copy) and what stands beside it. Embeddings are kept as they were published."""

    logit_scale: nn.Parameter
    table: Tensor

    def __init__(self, encoder: VisionEncoder, table: Tensor):
        """table: ``(V, L)``, word embeddings."""
        super().__init__()
        self.encoder, width = encoder, encoder.config.resolved_info.width
        self.image_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH))
        self.register_buffer("table", table, persistent=False)
        self.enter = nn.Linear(table.shape[1], WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.text_head = nn.Linear(WIDTH, WIDTH)

    def set_grad_checkpointing(self, enabled: bool) -> None:
        """As open_clip's models have it."""
        self.encoder.set_gradient_checkpointing(enabled)


class WordsDual(nn.Module):
    """An encoder of any type beside a text side of its own: the mean over its grid against the mean over a text's tokens."""

    image_prefixes = ("encoder.",)
    fixed_length = False
    max_length = LENGTH
    embed_dim = WIDTH
    shares_encoder = True
    """Its encoder is the model's own: no weights need to be passed back."""

    def __init__(self, encoder: VisionEncoder, source: str, *, where: str):
        """Raises `UnavailableError` where the language model cannot be read."""
        super().__init__()
        table, self.tokenizer = _embeddings(source, where)
        self.model = Towers(encoder, table)

    @property
    def pad_id(self) -> int:
        return 0  # hidden by the mask

    def tokenize(self, text: str, length: int) -> tuple[list[int], bool]:
        """(ids of at most ``length`` tokens, whether the text was cut)."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[:length], len(ids) > length

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.image_head(self.model.encoder(pixels).tokens.mean(1))

    def encode_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        model, there = self.model, mask.bool()
        hidden = model.enter(model.table[ids].to(model.enter.weight.dtype)) + model.positions[: ids.shape[1]]
        hidden = model.layers(hidden, src_key_padding_mask=~there).masked_fill(~there[..., None], 0.0)
        return model.text_head(hidden.sum(1) / there.sum(1, keepdim=True))

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        own = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(own, str(folder / "model.safetensors"))
        by_umask(folder)


def _embeddings(source: str, where: str) -> tuple[Tensor, Any]:
    """A language model's word embeddings ``(V, L)`` in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(part_folder(source)) if is_part(source) else source
    try:
        with opening(folder):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, MllmError):
            raise
        raise UnavailableError(
            f"{where}.words: the language model {source} cannot be read ({str(error).splitlines()[0][:200]})"
        ) from error
    return model.get_input_embeddings().weight.detach().clone(), tokenizer
