"""How do a frozen visual tokenizer's codes become pixels by diffusion?

The networks and schedulers are those of `diffusers`; what they see of the codes is here (ILLUME+, arXiv 2504.01934: the code vectors
of both codebooks as a map beside the noisy latents).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.config import to_plain, validate
from mllm.damage import read_json, read_safetensors
from mllm.errors import CheckpointError, ConfigError
from mllm.types import Grid, VisualCodes
from mllm.visual_tokenizers.base import DECODER_CONFIG, DECODER_WEIGHTS, VisualTokenizer
from mllm.visual_tokenizers.diffusion.branches import ContextBranch, injected, untouched_patches
from mllm.visual_tokenizers.diffusion.conditioning import CodeSequence, Conditions, code_map
from mllm.visual_tokenizers.diffusion.config import ContextBranchSpec, DiffusionDecoderConfig
from mllm.visual_tokenizers.diffusion.library import (
    WHERE,
    autoencoder_factor,
    build_autoencoder,
    build_network,
    build_scheduler,
    load_saved,
    with_saved_settings,
)
from mllm.visual_tokenizers.diffusion.objectives import build_objective
from mllm.visual_tokenizers.diffusion.sampling import draw_noise, generators, sample
from mllm.visual_tokenizers.diffusion.semantic_fusion import weighted_error
from mllm.visual_tokenizers.storage import fingerprint


class DiffusionDecoder(nn.Module):
    """Codes of one tokenizer → pixels. The tokenizer is frozen and no part of this module: it is saved by itself.

    ``__init__`` touches neither disk nor network; `load_pretrained` reads published weights, once.
    """

    def __init__(self, config: DiffusionDecoderConfig | Mapping[str, Any], tokenizer: VisualTokenizer):
        super().__init__()
        self.config = config = with_saved_settings(decoder_config(config))
        self._tokenizer = (tokenizer,)
        self._belongs_to: str | None = None
        for name in config.drop_parts:
            if name not in tokenizer.codebooks:
                raise ConfigError(f"{WHERE}.drop_parts.{name}: the tokenizer has {', '.join(tokenizer.codebooks)}")
        self.image_side = side = tokenizer.image.height * config.scale
        """Rows and columns of the pictures it makes."""
        self.autoencoder = build_autoencoder(config, side).requires_grad_(False) if config.space == "latent" else None
        self.side = side if self.autoencoder is None else side // autoencoder_factor(self.autoencoder)
        self.channels = 3 if self.autoencoder is None else int(self.autoencoder.config.latent_channels)
        self.network = build_network(config, channels=(self._input_channels(), self.channels), side=self.side)
        self.branch = None if config.branch is None else self._build_branch(config.branch)
        self.sequence: CodeSequence | None = None
        if "cross_attention" in config.conditions:
            positions = {name: rows * columns for name, (rows, columns) in tokenizer.grids.items()}
            self.sequence = CodeSequence(tokenizer.embed_dims, positions, self._token_width())
        self.objective = build_objective(config)
        build_scheduler(config, config.steps)  # what it refuses is told before anything is trained

    @property
    def tokenizer(self) -> VisualTokenizer:
        return self._tokenizer[0]

    @property
    def size(self) -> Grid:
        """Rows and columns of what is denoised."""
        return (self.side, self.side)

    def _input_channels(self) -> int:
        conditions, total = self.config.conditions, self.channels
        total += sum(self.tokenizer.embed_dims.values()) if "channels" in conditions else 0
        total += 3 if "reconstruction" in conditions else 0
        return total + (1 + self.channels if "source" in conditions and self.config.branch is None else 0)

    def _build_branch(self, spec: ContextBranchSpec) -> ContextBranch:
        """A network of ``depth`` blocks that also sees the mask and what is kept; it starts from this one's weights."""
        blocks = len(self.network.transformer_blocks)  # type: ignore[arg-type]
        if spec.depth > blocks:
            raise ConfigError(
                f"{WHERE}.branch.depth: {spec.depth} blocks beside a network of {blocks}; give at most as many"
            )
        short = self.config.model_copy(update={"settings": {**self.config.settings, "num_layers": spec.depth}})
        inputs = self._input_channels()
        branch = ContextBranch(
            build_network(short, channels=(inputs + 1 + self.channels, self.channels), side=self.side)
        )
        branch.start_from(self.network, inputs)
        return branch

    def _token_width(self) -> int:
        config: Any = self.network.config
        return int(
            config.cross_attention_dim if self.config.network == "unet_condition" else config.joint_attention_dim
        )

    def load_pretrained(self) -> None:
        """Published weights of network and autoencoder, where the config names some. Raises `CheckpointError`."""
        if self.config.source is not None:
            load_saved(self.network, self.config.source, f"{WHERE}.source", kept_channels=self.channels)
            if self.branch is not None:
                self.branch.start_from(self.network, self._input_channels())
        if self.autoencoder is not None and self.config.autoencoder is not None and self.config.autoencoder.source:
            load_saved(self.autoencoder, self.config.autoencoder.source, f"{WHERE}.autoencoder.source")

    def train(self, mode: bool = True) -> DiffusionDecoder:
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    # Pixels and what is denoised

    def shrunk(self, pixels: Tensor) -> Tensor:
        """Pictures of the decoder's size at the tokenizer's, by the mean of their pixels."""
        return pixels if self.config.scale == 1 else F.avg_pool2d(pixels, self.config.scale)

    def to_space(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] → what is denoised: themselves, or latents of about unit variance."""
        if self.autoencoder is None:
            return pixels
        config = self.autoencoder.config
        with torch.autocast(pixels.device.type, enabled=False) if not pixels.is_meta else torch.no_grad():
            latents = self.autoencoder.encode(pixels.float()).latent_dist.mode()
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def to_pixels(self, clean: Tensor) -> Tensor:
        """The way back, in float32 (SDXL's autoencoder overflows in half precision), clamped to [-1, 1]."""
        if self.autoencoder is None:
            return clean.float().clamp(-1, 1)
        config = self.autoencoder.config
        with torch.autocast(clean.device.type, enabled=False):
            latents = clean.float() / config.scaling_factor + (config.shift_factor or 0.0)
            return self.autoencoder.decode(latents).sample.clamp(-1, 1)

    # Conditions

    def conditions(
        self,
        vectors: Mapping[str, Tensor],
        *,
        reconstruction: Tensor | None = None,
        kept: Tensor | None = None,
        hidden: Mapping[str, Tensor] | None = None,
    ) -> Conditions:
        """What the network sees.

        Args:
            vectors: codebook → code vectors ``(B, N, D)``, as `VisualTokenizer.embed` gives them.
            reconstruction: the tokenizer's own picture ``(B, 3, H, W)``, where that is a condition.
            kept: mask and what is kept of a picture ``(B, 1 + C, *size)``, where ``source`` is a condition.
            hidden: codebook → ``(B,)`` true where its codes are left out.
        """
        device = self.device
        shown = {name: value.to(device, torch.float32) for name, value in vectors.items()}
        if hidden is not None:
            shown = {name: value * ~hidden[name][:, None, None].to(device) for name, value in shown.items()}
        maps = []
        if "channels" in self.config.conditions:
            maps.append(code_map(shown, self.tokenizer.grids, self.tokenizer.grid, self.size))
        if "reconstruction" in self.config.conditions:
            assert reconstruction is not None
            whole = _resized(reconstruction.to(device).float(), self.size)
            if hidden is not None:
                whole = whole * ~torch.stack(list(hidden.values())).any(0)[:, None, None, None].to(device)
            maps.append(whole)
        tokens = None if self.sequence is None else self.sequence(shown)
        if tokens is not None and hidden is not None:
            seen = [~hidden[n][:, None].expand(-1, v.shape[1]) for n, v in shown.items()]
            tokens = tokens * torch.cat(seen, 1)[..., None].to(device)
        if "source" in self.config.conditions and kept is None:  # nothing is kept: all is to be made
            number = len(next(iter(shown.values())))
            kept = torch.zeros(number, 1 + self.channels, *self.size, device=device)
            kept[:, 0] = 1
        return Conditions(torch.cat(maps, 1) if maps else None, tokens, kept)

    def denoise(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """What the network tells of ``(B, C, *size)`` at times ``(B,)``."""
        config, tokens = self.config, conditions.tokens
        if self.branch is None or config.branch is None:
            return _told(self.network, config, conditions.beside(noisy), times, tokens)
        assert conditions.kept is not None
        residuals = self.branch(lambda network: _told(network, config, conditions.beside(noisy), times, tokens))
        patch = int(self.network.config.patch_size)  # type: ignore[union-attr]
        keep = untouched_patches(conditions.kept[:, :1], patch) if config.branch.outside_only else None
        with injected(self.network, residuals, placement=config.branch.placement, keep=keep):
            return _told(self.network, config, conditions.beside(noisy, kept=False), times, tokens)

    # Training

    def loss(
        self,
        pixels: Tensor,
        vectors: Mapping[str, Tensor],
        *,
        reconstruction: Tensor | None = None,
        kept: Tensor | None = None,
        heat: Tensor | None = None,
    ) -> Tensor:
        """``(B,)``: each picture's mean squared error at a random time with random noise, conditions left out for some. heat:
        ``(B, *size)``, how much more an error counts where something matters. Random numbers come from torch's own generator of the pixels'
        device."""
        clean = self.to_space(pixels)
        number, device = len(clean), clean.device
        times, noise = self.objective.draw_times(number, device), torch.randn_like(clean)
        alone = torch.rand(number, device=device) < self.config.drop
        hidden = {}
        for name in vectors:
            share = self.config.drop_parts.get(name, 0.0)
            hidden[name] = alone | (torch.rand(number, device=device) < share) if share else alone
        seen = self.conditions(vectors, reconstruction=reconstruction, kept=kept, hidden=hidden)
        told = self.denoise(self.objective.noisy(clean, noise, times), times, seen)
        return weighted_error(told, self.objective.target(clean, noise), heat).flatten(1).mean(1)

    # Decoding

    @torch.no_grad()
    def decode(
        self,
        codes: VisualCodes,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Tensor:
        """Draw the pictures that codes stand for. A picture depends on its codes and its seed, not on the others of the batch.

        Args:
            codes: of the tokenizer.
            steps: denoising steps; default: the config's.
            guidance: scale of classifier-free guidance; 1 is none; default: the config's.
            seed: of the noise, one for all pictures or one for each.

        Returns:
            Pixels ``(B, 3, H, W)`` in [-1, 1], ``scale`` times the tokenizer's size.

        Raises:
            ConfigError: for codes of another grid, or a number of seeds, steps or scale that cannot be.
        """
        steps, guidance = self.settings(steps, guidance)
        conditions = self.conditions_of(codes)
        sources = generators(seed, len(next(iter(codes.codes.values()))))
        noise = draw_noise(sources, (self.channels, *self.size), self.device)
        scheduler = build_scheduler(self.config, steps)
        return self.to_pixels(sample(self.denoise, scheduler, noise, conditions, guidance=guidance, sources=sources))

    def conditions_of(self, codes: VisualCodes, kept: Tensor | None = None) -> Conditions:
        """The conditions of a picture's codes, with nothing left out."""
        wanted = "reconstruction" in self.config.conditions
        reconstruction = self.tokenizer.decode(codes) if wanted else None
        return self.conditions(self.tokenizer.embed(codes), reconstruction=reconstruction, kept=kept)

    def settings(self, steps: int | None, guidance: float | None) -> tuple[int, float]:
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else float(guidance)
        if steps < 1:
            raise ConfigError(f"steps is {steps}; 1 or more is expected")
        if guidance < 0:
            raise ConfigError(f"guidance is {guidance:g}; 0 or more is expected (1: none)")
        if guidance != 1 and self.config.drop == 0:
            raise ConfigError(
                f"guidance {guidance:g}: this decoder was trained with drop: 0 and never saw a picture without conditions; give 1"
            )
        return steps, guidance

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    # Files

    def save_pretrained(self, directory: str | Path) -> None:
        """The tokenizer's files, and the decoder's beside them."""
        self.tokenizer.save_pretrained(directory)
        self.save_files(directory)

    def save_files(self, directory: str | Path) -> None:
        """``diffusion_decoder.json`` and ``diffusion_decoder.safetensors`` alone."""
        from safetensors.torch import save_file

        directory = Path(directory)
        stored = {**to_plain(self.config), "tokenizer": self._belongs_to or fingerprint(self.tokenizer)}
        (directory / DECODER_CONFIG).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        tensors = {key: value.detach().contiguous().cpu() for key, value in self.state_dict().items()}
        save_file(tensors, str(directory / DECODER_WEIGHTS), metadata={"format": "pt"})

    @staticmethod
    def from_pretrained(directory: str | Path, tokenizer: VisualTokenizer | None = None) -> DiffusionDecoder:
        """The decoder saved in a folder, in evaluation mode.

        Args:
            directory: a saved tokenizer's folder with a decoder in it.
            tokenizer: the same tokenizer, if it is open already.

        Raises:
            CheckpointError: naming the file that is absent, damaged or of another tokenizer.
        """
        directory = Path(directory)
        for file in (DECODER_CONFIG, DECODER_WEIGHTS):
            if not (directory / file).is_file():
                raise CheckpointError(
                    f"{directory}: no {file}; a stage of kind diffusion makes a folder with a diffusion decoder"
                )
        tokenizer = tokenizer or VisualTokenizer.from_pretrained(directory)
        stored = read_json(directory / DECODER_CONFIG)
        found = fingerprint(tokenizer)
        if stored.pop("tokenizer", None) != found:
            raise CheckpointError(
                f"{directory / DECODER_CONFIG}: the decoder was trained beside another visual tokenizer"
            )
        decoder = DiffusionDecoder(
            validate(DiffusionDecoderConfig, stored, where=str(directory / DECODER_CONFIG)), tokenizer
        )
        try:
            decoder.load_state_dict(read_safetensors(directory / DECODER_WEIGHTS))
        except RuntimeError as error:
            raise CheckpointError(f"{directory / DECODER_WEIGHTS} does not fit its config: {error}") from error
        decoder._belongs_to = found
        return decoder.eval()


def decoder_config(value: DiffusionDecoderConfig | Mapping[str, Any]) -> DiffusionDecoderConfig:
    """The strict config. Raises `ConfigError` with the path to the key."""
    return validate(DiffusionDecoderConfig, value, where=WHERE)


def time_ids(number: int, size_index: int) -> Tensor:
    """``(number, 6)``: SDXL's size and crop are gone; the last says which of its sizes ILLUME+ draws."""
    ids = torch.zeros(number, 6)
    ids[:, 5] = size_index
    return ids


def _resized(pixels: Tensor, size: Grid) -> Tensor:
    """Pictures at the size of what is denoised: by the mean of their pixels where that is smaller, else bilinear."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="area" if pixels.shape[-1] > size[1] else "bilinear")


def _told(network: Any, config: DiffusionDecoderConfig, seen: Tensor, times: Tensor, tokens: Tensor | None) -> Tensor:
    """One call of any of the networks."""
    number, device = len(seen), seen.device
    if config.network == "unet":
        return network(seen, times).sample
    if config.network == "dit":
        # Its class embedding drops labels at random in training; the label that stands for a dropped one stays what it is.
        labels = torch.ones(number, dtype=torch.long, device=device)
        return network(seen, timestep=times, class_labels=labels).sample
    if config.network == "sd3":
        width, pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim
        tokens = torch.zeros(number, 1, width, device=device) if tokens is None else tokens
        zeros = torch.zeros(number, pooled, device=device)
        return network(seen, encoder_hidden_states=tokens, pooled_projections=zeros, timestep=times).sample
    # Without a sequence the attention sees one zero: ILLUME+'s 77 zeros of an absent text give the same.
    tokens = torch.zeros(number, 1, network.config.cross_attention_dim, device=device) if tokens is None else tokens
    more = {}
    if network.config.addition_embed_type == "text_time":  # SDXL: its pooled text and six time ids
        ids = time_ids(number, config.size_index or 0).to(device)
        pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
        more["added_cond_kwargs"] = {"text_embeds": torch.zeros(number, pooled, device=device), "time_ids": ids}
    return network(seen, times, encoder_hidden_states=tokens, **more).sample
