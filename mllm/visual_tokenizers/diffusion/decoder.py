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
from mllm.modes import by_umask
from mllm.types import Grid, VisualCodes
from mllm.visual_tokenizers.base import DECODER_CONFIG, DECODER_WEIGHTS, VisualTokenizer
from mllm.visual_tokenizers.diffusion.branches.base import BranchConfig, Seen, Trunk, branch_config, build_branch
from mllm.visual_tokenizers.diffusion.branches.injection import summed, told_with
from mllm.visual_tokenizers.diffusion.calls import called
from mllm.visual_tokenizers.diffusion.carried import ROUNDED
from mllm.visual_tokenizers.diffusion.conditioning import CodeSequence, Conditions, code_map
from mllm.visual_tokenizers.diffusion.config import DiffusionDecoderConfig
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
        specs = {name: branch_config(spec, f"{WHERE}.branches.{name}") for name, spec in config.branches.items()}
        self.config = config = config.model_copy(update={"branches": {n: to_plain(spec) for n, spec in specs.items()}})
        self._told_apart = {name for spec in specs.values() for name in spec.sees}
        self._check_sees(specs)
        self.network = build_network(config, channels=(self._input_channels(), self.channels), side=self.side)
        self.sequence: CodeSequence | None = None
        if "cross_attention" in config.conditions:
            positions = {name: rows * columns for name, (rows, columns) in tokenizer.grids.items()}
            self.sequence = CodeSequence(tokenizer.embed_dims, positions, self._token_width())
        trunk = self._trunk()
        self.branches = nn.ModuleDict()
        for name, spec in specs.items():
            width = sum(self._map_channels()[seen] for seen in spec.sees)
            self.branches[name] = build_branch(spec, trunk, width, f"{WHERE}.branches.{name}")
        self.objective = build_objective(config)
        build_scheduler(config, config.steps)  # what it refuses is told before anything is trained

    @property
    def tokenizer(self) -> VisualTokenizer:
        return self._tokenizer[0]

    @property
    def size(self) -> Grid:
        """Rows and columns of what is denoised."""
        return (self.side, self.side)

    def _map_channels(self) -> dict[str, int]:
        """Channels of everything that can be seen as a map: conditions, and codebooks by their names."""
        dims = self.tokenizer.embed_dims
        return {**dims, "channels": sum(dims.values()), "reconstruction": 3, "source": 1 + self.channels}

    def shows(self, condition: str) -> bool:
        """Whether the network itself sees a condition as maps."""
        return condition in self.config.conditions and condition not in self._told_apart

    def _input_channels(self) -> int:
        widths = self._map_channels()
        return self.channels + sum(widths[c] for c in ("channels", "reconstruction", "source") if self.shows(c))

    def _check_sees(self, specs: Mapping[str, BranchConfig]) -> None:
        maps = [c for c in self.config.conditions if c != "cross_attention"]
        for name, spec in specs.items():
            for seen in spec.sees:
                if seen not in maps and seen not in self.tokenizer.embed_dims:
                    raise ConfigError(
                        f"{WHERE}.branches.{name}.sees: {seen!r} is neither a map among this decoder's conditions "
                        f"({', '.join(maps) or 'none'}) nor a codebook ({', '.join(self.tokenizer.embed_dims)})"
                    )

    def _trunk(self) -> Trunk:
        def build(channels: int, blocks: int | None) -> nn.Module:
            settings = self.config.settings if blocks is None else {**self.config.settings, "num_layers": blocks}
            same = self.config.model_copy(update={"settings": settings})
            return build_network(same, channels=(channels, self.channels), side=self.side)

        width = None if self.sequence is None else self._token_width()
        return Trunk(self.network, build, self._input_channels(), width)

    def _token_width(self) -> int:
        config: Any = self.network.config
        return int(
            config.cross_attention_dim if self.config.network == "unet_condition" else config.joint_attention_dim
        )

    def load_pretrained(self) -> None:
        """Published weights of network and autoencoder, where the config names some. Raises `CheckpointError`."""
        if self.config.source is not None:
            load_saved(self.network, self.config.source, f"{WHERE}.source", kept_channels=self.channels)
            for branch in self.branches.values():
                branch.start_from(self._trunk())  # type: ignore[operator]
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
        maps: dict[str, Tensor] = {}
        if "channels" in self.config.conditions:
            maps["channels"] = code_map(shown, self.tokenizer.grids, self.tokenizer.grid, self.size)
        for name in self._told_apart & set(shown):
            maps[name] = code_map({name: shown[name]}, self.tokenizer.grids, self.tokenizer.grid, self.size)
        if "reconstruction" in self.config.conditions:
            assert reconstruction is not None
            whole = _resized(reconstruction.to(device).float(), self.size)
            if hidden is not None:
                whole = whole * ~torch.stack(list(hidden.values())).any(0)[:, None, None, None].to(device)
            maps["reconstruction"] = whole
        tokens = None if self.sequence is None else self.sequence(shown)
        if tokens is not None and hidden is not None:
            seen = [~hidden[n][:, None].expand(-1, v.shape[1]) for n, v in shown.items()]
            tokens = tokens * torch.cat(seen, 1)[..., None].to(device)
        if "source" in self.config.conditions and kept is None:  # nothing is kept: all is to be made
            number = len(next(iter(shown.values())))
            kept = torch.zeros(number, 1 + self.channels, *self.size, device=device)
            kept[:, 0] = 1
        beside = [maps[name] for name in maps if self.shows(name)]
        apart = {name: value for name, value in maps.items() if name in self._told_apart}
        return Conditions(torch.cat(beside, 1) if beside else None, tokens, kept, apart)

    def denoise(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        """What the objective asks for, of ``(B, C, *size)`` at times ``(B,)``."""
        told = self._told(noisy, times, conditions)
        return self.objective.from_sample(told, noisy, times) if self.config.prediction == "sample" else told

    def _told(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        inputs = conditions.beside(noisy, kept=self.shows("source"))

        def call(network: nn.Module, seen: Tensor, **more: Any) -> Any:
            return called(network, self.config, seen, times, conditions.tokens, **more)

        if not self.branches:
            return call(self.network, inputs).sample
        hidden = None if conditions.kept is None else conditions.kept[:, :1]
        told = []
        for branch in self.branches.values():
            maps = conditions.seen(branch.config.sees).to(noisy.dtype)  # type: ignore[union-attr]
            told.append(branch(Seen(inputs, maps, hidden, conditions.tokens, call)))
        return told_with(self.network, summed(told), lambda **more: call(self.network, inputs, **more)).sample

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
        by_umask(directory)

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
        rounded = stored.pop(ROUNDED, None)  # in a multimodal checkpoint, which may hold the tokenizer in bfloat16
        if stored.pop("tokenizer", None) != found and (
            rounded is None or rounded != fingerprint(tokenizer, rounded=True)
        ):
            raise CheckpointError(
                f"{directory / DECODER_CONFIG}: the decoder was trained beside another visual tokenizer"
            )
        decoder = DiffusionDecoder(
            validate(DiffusionDecoderConfig, stored, where=str(directory / DECODER_CONFIG)), tokenizer
        )
        try:
            decoder.load_state_dict(_present_names(read_safetensors(directory / DECODER_WEIGHTS)))
        except RuntimeError as error:
            raise CheckpointError(f"{directory / DECODER_WEIGHTS} does not fit its config: {error}") from error
        decoder._belongs_to = found
        return decoder.eval()


def decoder_config(value: DiffusionDecoderConfig | Mapping[str, Any]) -> DiffusionDecoderConfig:
    """The strict config. Raises `ConfigError` with the path to the key."""
    return validate(DiffusionDecoderConfig, value, where=WHERE)


def _resized(pixels: Tensor, size: Grid) -> Tensor:
    """Pictures at the size of what is denoised: by the mean of their pixels where that is smaller, else bilinear."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="area" if pixels.shape[-1] > size[1] else "bilinear")


def _present_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files of the time when there was one branch."""
    former, present = "branch.", "branches.context.copy."
    return {present + n.removeprefix(former) if n.startswith(former) else n: value for n, value in weights.items()}
