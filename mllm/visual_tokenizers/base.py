"""What is a visual tokenizer here?"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.checkpoint_code import KEY, Part, admit_code, record_code
from mllm.config import StrictModel, to_plain, validate
from mllm.damage import read_json, read_safetensors
from mllm.errors import CheckpointError, ConfigError
from mllm.modes import by_umask
from mllm.types import Grid, ImageSpec, VisualCodes
from mllm.visual_tokenizers import CODE_DECODERS, VISUAL_TOKENIZERS

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
DECODER_CONFIG, DECODER_WEIGHTS = "diffusion_decoder.json", "diffusion_decoder.safetensors"
"""A decoder that was trained beside the tokenizer, in the same folder."""


class VisualTokenizerConfig(StrictModel):
    """What every visual tokenizer's config has."""

    type: str


@dataclass
class TokenizerOutput:
    """reconstruction ``(B, 3, H, W)`` in [-1, 1]; losses: named scalars; usage: named scalars per codebook.

    features: what the codes say to a teacher, where the tokenizer has a semantic part: ``tokens`` ``(B, N, T)`` and
    perhaps ``pooled`` ``(B, T)``.
    """

    reconstruction: Tensor
    codes: VisualCodes
    losses: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)
    usage: dict[str, Tensor] = field(default_factory=dict)


class VisualTokenizer(nn.Module):
    """Image ↔ discrete codes. Pixels are in [-1, 1] (mean and std 0.5).

    ``__init__`` builds on the meta device and touches neither disk nor network; `load_pretrained` does that, once.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[VisualTokenizerConfig]] = VisualTokenizerConfig
    config: VisualTokenizerConfig

    def __init__(self, config: VisualTokenizerConfig):
        super().__init__()
        self.config = config
        # `from_pretrained` gives only modules with a tensor of their own the chance to restore their buffers.
        self.register_buffer("has_lost_buffers", torch.empty(0), persistent=False)
        self.folder: Path | None = None
        self.decoder_of: str | None = None
        """Fingerprint in bfloat16 of the tokenizer that the folder's diffusion decoder was trained beside, where that is known."""
        self._diffusion: tuple[Any, ...] = ()  # beside the tokenizer, no part of it

    image: ImageSpec
    grid: Grid
    """Rows and columns of the decoder's feature map."""
    codebooks: dict[str, tuple[int, int]]
    """Codebook name → (size, codes per position)."""
    scales: tuple[int, ...] | None = None
    compute_dtype: str = "float32"
    """What the networks compute in; see `run_in_bfloat16`."""

    @property
    def grids(self) -> dict[str, Grid]:
        """Codebook name → rows and columns of its map after `embed`; one grid for all unless a tokenizer says
        otherwise."""
        return dict.fromkeys(self.codebooks, self.grid)

    @property
    def num_positions(self) -> dict[str, int]:
        """Codebook name → N, how many positions carry codes (the sum over scales for a multi-scale code)."""
        if self.scales is not None:
            return dict.fromkeys(self.codebooks, sum(s * s for s in self.scales))
        return {name: rows * columns for name, (rows, columns) in self.grids.items()}

    @property
    def embed_dims(self) -> dict[str, int]:
        """Codebook name → D of `embed`."""
        raise NotImplementedError

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, all codebooks and depths together."""
        return sum(n * self.codebooks[name][1] for name, n in self.num_positions.items())

    @property
    def bits_per_image(self) -> float:
        """Bits that the codes of one image carry at most."""
        return sum(n * self.codebooks[k][1] * math.log2(self.codebooks[k][0]) for k, n in self.num_positions.items())

    def encode(self, pixels: Tensor) -> VisualCodes:
        """``(B, 3, H, W)`` → codes."""
        raise NotImplementedError

    def embed(self, codes: VisualCodes) -> dict[str, Tensor]:
        """codes → codebook name → ``(B, N, D)``: the sum over depth or scales, the features a language model reads."""
        raise NotImplementedError

    @property
    def feature_dims(self) -> dict[str, int]:
        """Name of a part (``semantic``, ``pixel``) → its channels. The parts are the codebooks, unless one index
        stands for both."""
        return self.embed_dims

    def feature_parts(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `embed` gives, by part."""
        return vectors

    def quantized(self, pixels: Tensor) -> tuple[VisualCodes, dict[str, Tensor]]:
        """Codes, and their vectors by codebook ``(B, N, D)`` with gradients passed straight through."""
        raise NotImplementedError

    def code_vectors(self, name: str, codes: Tensor) -> Tensor:
        """Ids ``(B, n, q)`` of one codebook → ``(B, n, q, D)``, every code's own vector (what a depth transformer
        sums); any number of positions, the first q of Q codes."""
        raise NotImplementedError

    def decode(self, codes: VisualCodes) -> Tensor:
        """codes → pixels ``(B, 3, H, W)`` in [-1, 1]. Raises `ConfigError` for ids out of range or a wrong grid."""
        raise NotImplementedError

    @property
    def diffusion(self) -> Any:
        """The `DiffusionDecoder` that was trained beside this tokenizer, read from its folder at first use:
        ``tokenizer.diffusion.decode(codes, steps=20, guidance=1.5, seed=0)``. Raises `CheckpointError` where there is none."""
        if not self._diffusion:
            if self.folder is None:
                raise CheckpointError(
                    f"this {self.name} tokenizer was not read from a folder; DiffusionDecoder.from_pretrained(FOLDER, tokenizer) "
                    "reads a decoder for it"
                )
            self._diffusion = (CODE_DECODERS.get("diffusion").from_pretrained(self.folder, self),)
        return self._diffusion[0].to(self.last_layer().device)

    @property
    def has_diffusion(self) -> bool:
        """Whether there is a `diffusion` decoder; reads nothing."""
        return bool(self._diffusion) or (self.folder is not None and (self.folder / DECODER_CONFIG).is_file())

    def forward(self, pixels: Tensor) -> TokenizerOutput:
        """Reconstruction, codes and the losses that need no other network."""
        raise NotImplementedError

    def last_layer(self) -> nn.Parameter:
        """The weight that makes the pixels; the adaptive adversarial weight compares gradients at it."""
        raise NotImplementedError

    def load_pretrained(self) -> None:
        """Load the published weights that the config names for its parts (a student or backbone); nothing without
        any."""

    def restore_buffers(self) -> None:
        """Recompute buffers that are not saved, lost when a model is built on the meta device."""
        self.has_lost_buffers = torch.empty(0, device=next(self.parameters()).device)
        for module in self.modules():
            if module is not self and hasattr(module, "restore_buffers"):
                module.restore_buffers()  # type: ignore[operator]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the networks' weights. Quantizers compute in fp32 whatever it is, so vectors are cast on the way
        out."""
        return self.last_layer().dtype

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """The smallest sensible config of this type; the contract tests build it."""
        raise NotImplementedError

    def check_pixels(self, pixels: Tensor) -> Tensor:
        """``pixels`` in the tokenizer's type. Raises `ConfigError` unless it is ``(B, 3, height, width)`` of this
        tokenizer's image size."""
        expected = (3, self.image.height, self.image.width)
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ConfigError(f"{self.name} takes images (B, {shape}), got {tuple(pixels.shape)}")
        return pixels.to(self.dtype)

    def check_codes(self, codes: VisualCodes) -> None:
        """Raises `ConfigError` for a missing codebook, a grid the decoder cannot make, a wrong shape or an id out
        of range."""
        if set(codes.codes) != set(self.codebooks):
            raise ConfigError(f"{self.name} has codebooks {list(self.codebooks)}, got codes for {list(codes.codes)}")
        if tuple(codes.grid) != tuple(self.grid):
            raise ConfigError(f"{self.name} decodes a grid of {self.grid[0]}×{self.grid[1]}, got {codes.grid}")
        if codes.scales is not None and codes.scales != self.scales:
            raise ConfigError(f"{self.name} uses scales {self.scales}, got {codes.scales}")
        for key, ids in codes.codes.items():
            size, depth = self.codebooks[key]
            if ids.dim() != 3 or tuple(ids.shape[1:]) != (self.num_positions[key], depth):
                raise ConfigError(
                    f"codes of {key!r} must be (B, {self.num_positions[key]}, {depth}), got {tuple(ids.shape)}"
                )
            low, high = torch.stack(ids.aminmax()).tolist() if ids.numel() else (0, 0)
            if low < 0 or high >= size:
                bad = low if low < 0 else high
                raise ConfigError(f"codes of {key!r}: id {bad} is out of range 0 to {size - 1}")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, the plug-in file that defines the class, if one does, and the diffusion
        decoder of the folder that the tokenizer was read from, if there is one."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = to_plain(self.config)
        if code := record_code(_parts(config), directory):
            config[KEY] = code
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {key: value.detach().contiguous().cpu() for key, value in self.state_dict().items()}
        save_file(tensors, str(directory / WEIGHTS_FILE), metadata={"format": "pt"})
        by_umask(directory)
        if self.folder is not None and self.folder.resolve() != directory.resolve():
            for name in (DECODER_CONFIG, DECODER_WEIGHTS):
                if (self.folder / name).is_file():
                    shutil.copy2(self.folder / name, directory / name)

    @staticmethod
    def from_pretrained(directory: str | Path) -> VisualTokenizer:
        """The tokenizer saved in a directory, in evaluation mode. Raises `CheckpointError` naming the file."""
        directory = Path(directory)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / file).is_file():
                raise CheckpointError(
                    f"{directory}: no {file}; a saved visual tokenizer has {CONFIG_FILE} and {WEIGHTS_FILE}"
                )
        tokenizer = build_tokenizer(stored_config(directory))
        try:
            tokenizer.load_state_dict(read_safetensors(directory / WEIGHTS_FILE))
        except RuntimeError as error:
            raise CheckpointError(f"{directory / WEIGHTS_FILE} does not fit its config: {error}") from error
        tokenizer.folder = directory
        return tokenizer.eval()


def stored_config(directory: str | Path) -> dict[str, Any]:
    """The config of a tokenizer saved in a directory. Raises `CheckpointError`, also when it needs plug-in code that is not
    allowed to run."""
    directory = Path(directory)
    config = read_json(directory / CONFIG_FILE)
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / CONFIG_FILE}: expected a mapping of keys")
    admit_code(str(directory), config.pop(KEY, None) or (), _parts(config), lambda name: directory / name)
    return config


def _parts(config: Mapping[str, Any]) -> list[Part]:
    return [Part("visual_tokenizer", VISUAL_TOKENIZERS, config["type"])] if isinstance(config.get("type"), str) else []


def tokenizer_config(value: Any, *, where: str = "visual_tokenizer") -> VisualTokenizerConfig:
    """The strict config that a mapping with ``type`` means. Raises `ConfigError` with the path to the key."""
    if isinstance(value, VisualTokenizerConfig):
        return value
    if not isinstance(value, Mapping) or "type" not in value:
        raise ConfigError(f"{where}: expected a mapping with type, one of {', '.join(VISUAL_TOKENIZERS)}")
    return validate(VISUAL_TOKENIZERS.get(value["type"]).Config, value, where=where)


def build_tokenizer(config: VisualTokenizerConfig | Mapping[str, Any]) -> VisualTokenizer:
    """A visual tokenizer from its config; weights are the initial ones."""
    config = tokenizer_config(config)
    return VISUAL_TOKENIZERS.get(config.type)(config)


def pixel_spec(size: int) -> ImageSpec:
    """Square images of side ``size`` in [-1, 1]."""
    return ImageSpec(height=size, width=size)


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """``(B, N, D)`` → ``(B, D, rows, columns)``."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(maps: Tensor) -> Tensor:
    """``(B, D, rows, columns)`` → ``(B, N, D)``, raster order."""
    return maps.flatten(2).transpose(1, 2)


def as_unit_range(pixels: Tensor) -> Tensor:
    """[-1, 1] → [0, 1], clamped: what a picture file and the metrics use."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def tag_usage(name: str, usage: dict[str, Tensor]) -> dict[str, Tensor]:
    """``usage`` → ``usage/name``."""
    return {f"{key}/{name}": value for key, value in usage.items()}


def sum_losses(named: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of several codebooks under ``loss/codebook`` names."""
    return {f"{key}/{book}": value for book, losses in named.items() for key, value in losses.items()}


__all__ = [
    "TokenizerOutput",
    "VisualTokenizer",
    "VisualTokenizerConfig",
    "as_unit_range",
    "build_tokenizer",
    "pixel_spec",
    "tokenizer_config",
]
