"""How do gradients of a stage become updates, and how does the rate change over it?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mllm.config import StrictModel


class ScheduleSpec(StrictModel):
    """Learning-rate shape over the stage."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup: float = Field(default=0.03, ge=0)
    """Below 1: share of the stage's steps; 1 or more: steps."""
    minimum: float = Field(default=0.0, ge=0, le=1)
    """Final rate as a share of the peak."""


class OptimizerSpec(StrictModel):
    """How gradients become updates."""

    type: Literal["adamw", "adamw_8bit", "muon", "sgd"] = "adamw"
    """adamw_8bit needs bitsandbytes; muon takes matrices, AdamW the rest."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    eps: float = 1e-8
    """AdamW's guard against division by zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; norms and biases have none."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """None: no clipping. Always written explicitly to DeepSpeed, whose own default is 1.0."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a running average of the learning weights (e.g. 0.999); the stage then ends with the average. engine: none."""
    fused: bool | None = None
    """AdamW's whole update in one kernel, for bf16 weights under engine: none on CUDA. Default: where it can be."""
    master: Literal["float32", "low_bits"] = "float32"
    """What keeps float32's precision of bf16 weights under adamw: a copy of 4 bytes a weight, or low_bits: the 16 bits that bf16 lacks,
    2 bytes; both together are the copy bit for bit. engine: none."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """AdamW's two moments of bf16 weights. bfloat16: 4 bytes a weight instead of 8, each rounded up or down at random (the same way in
    every run of a recipe), so that on average it is what float32 keeps. engine: none."""

    @property
    def compact(self) -> bool:
        """Whether AdamW's state is kept in fewer bytes than usual."""
        return self.master != "float32" or self.moments != "float32"

    @model_validator(mode="after")
    def _for_adamw(self) -> OptimizerSpec:
        if self.compact and self.type != "adamw":
            raise ValueError(
                f"master: low_bits and moments: bfloat16 are of type adamw, and type is {self.type}; leave them out"
            )
        if self.master == "low_bits" and self.ema is not None:
            raise ValueError(
                "ema averages float32 copies of the weights, which master: low_bits does without; keep one of the two"
            )
        return self
