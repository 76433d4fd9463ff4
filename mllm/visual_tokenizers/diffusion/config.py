"""What does one say of a diffusion decoder: its network, what it denoises, what it sees of the codes, how it samples?"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mllm.config import StrictModel

NetworkName = Literal["unet", "unet_condition", "dit", "sd3"]
Condition = Literal["channels", "cross_attention", "reconstruction", "source"]

SAMPLERS: dict[str, dict[str, str]] = {
    "flow_matching": {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"},
    "epsilon": {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "dpm_solver": "DPMSolverMultistepScheduler",
        "ddpm": "DDPMScheduler",
    },
}
"""Objective → sampler → class of `diffusers`; the first is the default. ddpm draws noise at every step, the others only once."""


class AutoencoderSpec(StrictModel):
    """The frozen autoencoder between pixels and the latents that are denoised: `diffusers.AutoencoderKL`."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `AutoencoderKL`; default: those in ``source``."""
    source: str | None = None
    """Folder that `AutoencoderKL.save_pretrained` wrote. Its weights are read once, by the first stage."""

    @model_validator(mode="after")
    def _given(self) -> AutoencoderSpec:
        if not self.settings and self.source is None:
            raise ValueError(
                "give settings (arguments of diffusers' AutoencoderKL), or source, a folder that it was saved in"
            )
        return self


class DiffusionDecoderConfig(StrictModel):
    """A denoiser of `diffusers` that sees a visual tokenizer's codes."""

    type: Literal["diffusion"] = "diffusion"
    network: NetworkName = "unet"
    """unet: UNet2DModel. unet_condition: UNet2DConditionModel, with cross attention (SDXL's). dit: DiTTransformer2DModel. sd3:
    SD3Transformer2DModel, whose second stream is the codes."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that class (``block_out_channels``, ``num_layers`` …), all but the channels and the size, which follow from the
    rest; default: those in ``source``."""
    source: str | None = None
    """Folder that the network's ``save_pretrained`` wrote: published weights to start from. Channels of the conditions are new, and zero at
    the start."""
    scale: int = Field(default=1, ge=1)
    """Side of the pictures it makes, as a multiple of the tokenizer's (ILLUME+ decodes codes of 256 pixels to 512 and more)."""
    space: Literal["pixel", "latent"] = "pixel"
    """What is denoised: the picture itself, or an autoencoder's latents of it."""
    autoencoder: AutoencoderSpec | None = None
    """space latent: between pixels and latents."""
    objective: Literal["flow_matching", "epsilon"] = "flow_matching"
    """flow_matching: x_t = (1-t) x + t n, the network tells n - x (arXiv 2210.02747). epsilon: DDPM's, it tells the noise n."""
    prediction: Literal["objective", "sample"] = "objective"
    """What the network itself tells. objective: what the loss compares. sample (flow_matching): the clean picture, turned into n - x by
    (x_t - told) / t with t of at least 0.05 (JiT, arXiv 2511.13720): a network need not carry the noise, so that patches may hold more
    values than its width."""
    times: Literal["uniform", "logit_normal"] = "uniform"
    """flow_matching: which noise levels are trained more often; logit_normal: the middle ones (Stable Diffusion 3)."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the scheduler (``beta_start``, ``timestep_spacing``, ``shift`` …); epsilon is trained with the same noise."""
    conditions: list[Condition] = Field(default=["channels"], min_length=1)
    """channels: all code vectors as a map beside what is denoised (ILLUME+). cross_attention: as a sequence. reconstruction: the
    tokenizer's own picture as three more channels. source: for editing, a mask and what of a picture is kept."""
    branches: dict[str, Any] = Field(default_factory=dict)
    """dit, sd3 and unet_condition: name → a conditioning branch ``{type: context | control | …, sees: [source]}``. A branch sees conditions
    in the network's place; what several tell is added up. All start by changing nothing."""
    drop: float = Field(default=0.1, ge=0, le=1)
    """Training: share of pictures that are denoised without conditions, which guidance needs."""
    drop_parts: dict[str, float] = Field(default_factory=dict)
    """Training: codebook → share of pictures that lack its codes alone."""
    sampler: str | None = None
    """flow_matching: euler (default) or heun; epsilon: ddim (default), euler, dpm_solver or ddpm."""
    steps: int = Field(default=20, ge=1)
    """Denoising steps of `decode` unless it is told otherwise."""
    guidance: float = Field(default=1.0, ge=0)
    """Guidance scale of `decode` unless it is told otherwise; 1: none, at half the cost."""
    size_index: int | None = Field(default=None, ge=0)
    """SDXL networks: the last of the six time ids (ILLUME+: which of its 12 sizes; 11 is 512 × 512)."""

    @model_validator(mode="before")
    @classmethod
    def _one_branch(cls, value: Any) -> Any:
        """``branch: {…}``, the key of the time when there was one, is a branch named context."""
        if isinstance(value, dict) and "branch" in value and "branches" not in value:
            value = dict(value)
            one = value.pop("branch")
            if one is not None:
                value["branches"] = {"context": {"type": "context", **one}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionDecoderConfig:
        if (self.space == "latent") != (self.autoencoder is not None):
            raise ValueError("space latent and autoencoder go together: give both or neither")
        if self.times != "uniform" and self.objective != "flow_matching":
            raise ValueError(f"times {self.times} is for flow_matching; epsilon draws its times uniformly")
        if self.prediction != "objective" and self.objective != "flow_matching":
            raise ValueError(f"prediction {self.prediction} is for flow_matching; an epsilon network tells the noise")
        if self.sampler is not None and self.sampler not in SAMPLERS[self.objective]:
            raise ValueError(
                f"sampler {self.sampler!r} of {self.objective} is one of {', '.join(SAMPLERS[self.objective])}"
            )
        if len(set(self.conditions)) != len(self.conditions):
            raise ValueError("a condition is named twice")
        if not {"channels", "cross_attention"} & set(self.conditions):
            raise ValueError(
                "conditions: name channels or cross_attention, else the picture would not depend on all codes"
            )
        if "cross_attention" in self.conditions and self.network in ("unet", "dit"):
            other = {"unet": "unet_condition", "dit": "sd3"}[self.network]
            raise ValueError(f"network {self.network} has no cross attention; use {other}, or conditions: [channels]")
        if self.branches and self.network == "unet":
            raise ValueError("branches go beside network dit, sd3 or unet_condition")
        if bad := [name for name in self.branches if not name.isidentifier()]:
            raise ValueError(f"branches: {bad[0]!r} is a name of a part: letters, digits and _")
        if bad := [name for name, share in self.drop_parts.items() if not 0 <= share <= 1]:
            raise ValueError(f"drop_parts.{bad[0]} is a share, 0 to 1")
        return self

    @property
    def scheduler(self) -> str:
        """Class of `diffusers` that samples."""
        known = SAMPLERS[self.objective]
        return known[self.sampler or next(iter(known))]
