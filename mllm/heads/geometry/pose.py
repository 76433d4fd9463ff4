"""Does training on camera poses teach a model where things are (Cambrian-P, arXiv 2605.22819)?

From each frame's own hidden states the head tells where the camera stood, seen from the first frame's, as VGGT's camera head does
(arXiv 2503.11651). It teaches while the model trains and does nothing else: answers, evaluation and serving never run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mllm.errors import ConfigError
from mllm.heads import HEADS
from mllm.heads.base import Head, HeadConfig, HeadLoss, HeadModel, HeadParts, Reading, Step
from mllm.heads.geometry.frames import LaidFrames, frame_states, lay_frames, rows_of_sets, rules_of
from mllm.processing.frames import VideoSpec
from mllm.processing.geometry import POSE_SIZE
from mllm.processing.layout import VIDEO_TIMES, LayoutRules
from mllm.types import ImageSpec, ViewLayout

_FURTHEST = 100.0
"""An error in translation counts no more than this (VGGT's clamp): one lost camera does not rule a batch."""


class PoseHeadConfig(HeadConfig):
    """Where the camera stood in each frame of a video; rows give ``poses``."""

    type: Literal["pose"] = "pose"
    depth: int = Field(default=2, ge=1)
    """Transformer layers in which the frames of a video see each other."""
    num_heads: int = Field(default=8, ge=1)
    width: int | None = Field(default=None, ge=1)
    """Of these layers; default: the language model's."""
    iterations: int = Field(default=4, ge=1)
    """How often the answer is refined; every answer has a loss, the earlier ones less (each 0.6 of the next)."""
    scale: Literal["metric", "free"] = "metric"
    """free: translations are divided by their mean length in each video, for poses whose unit is not known (structure from motion)."""
    error: Literal["absolute", "squared"] = "absolute"
    """What an error costs: its size, as VGGT has it, or its square. Where nothing was learned before, absolute may stay at "not turned",
    which costs least while a camera that turns left cannot be told from one that turns right; squared led away from there."""
    translation: float = Field(default=1.0, ge=0)
    rotation: float = Field(default=1.0, ge=0)
    fov: float = Field(default=0.5, ge=0)
    """Weights of the losses' parts."""
    weight: float = Field(default=1.0, ge=0)
    """Of all of them beside the words' loss."""


@HEADS.register("pose")
class PoseHead(Head):
    """Hidden states of each frame's tokens → the camera's pose seen from the video's first frame."""

    Config = PoseHeadConfig
    config: PoseHeadConfig
    targets = ("target_poses",)
    reads_video = True
    zero3 = True

    def __init__(self, config: PoseHeadConfig, parts: HeadParts):
        super().__init__(config, parts)
        rules = rules_of(parts, "pose")
        if rules.video is None:
            raise ConfigError("heads: pose learns from a video's frames; add model.video, e.g. {frames: 16}")
        self.together = rules.view.frames
        width = config.width or parts.width
        if width % config.num_heads:
            raise ConfigError(f"heads: pose.num_heads: {config.num_heads} do not divide the width {width}")
        self.norm = nn.LayerNorm(parts.width)
        self.score = nn.Linear(parts.width, 1, bias=False)
        self.project = nn.Linear(parts.width, self.together * width)
        self.embed = nn.Linear(POSE_SIZE, width)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.plain = nn.LayerNorm(width, elementwise_affine=False)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.trunk = nn.TransformerEncoder(layer, config.depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.answer = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, POSE_SIZE))

    @classmethod
    def tiny(cls) -> tuple[dict[str, Any], HeadParts]:
        rules = LayoutRules(
            ViewLayout(num_tokens=4, grid=(2, 2)), {"eye": ImageSpec(height=8, width=8)}, video=VideoSpec(frames=3)
        )
        return {"type": cls.name, "depth": 1, "num_heads": 2, "iterations": 2}, HeadParts(32, rules=rules)

    def example(self, parts: HeadParts, batch: int) -> tuple[Step, dict[str, Tensor]]:
        ids = torch.tensor([1, *[4] * 12, 5, 6]).repeat(batch, 1)  # 4: TinyModel's placeholder; 3 frames of 4 tokens
        poses = torch.zeros(batch, 3, POSE_SIZE)
        poses[:, :, 6], poses[:, 1:, 0], poses[:, :, 7:] = 1.0, 0.5, 1.2
        times = torch.tensor([[0, 500, 1000]] * batch)
        return Step(ids, ids.clone(), inputs={VIDEO_TIMES: times}), {"target_poses": poses.flatten(0, 1)}

    def lay(self, model: HeadModel, step: Step, targets: Mapping[str, Tensor]) -> LaidFrames | None:
        return lay_frames(model, step, targets["target_poses"], "target_poses")

    def losses(self, model: HeadModel, step: Step, laid: LaidFrames, reading: Reading) -> HeadLoss:
        states = frame_states(reading.hidden, step, model.config.image_token_id, laid)
        answers, rows, counts = self.answers(states, laid)
        targets = laid.targets.to(answers[0].device)[rows].float()
        if self.config.scale == "free":
            targets = torch.cat([unit_translations(part) for part in targets.split(counts)])
        parts: dict[str, Tensor] = {}
        total = answers[0].new_zeros((), dtype=torch.float32)
        for number, answer in enumerate(answers):
            parts = pose_errors(answer.float(), targets, squared=self.config.error == "squared")
            share = 0.6 ** (len(answers) - 1 - number) / len(answers)
            total = total + share * sum(getattr(self.config, name) * value for name, value in parts.items())
        report = {name: value.detach() for name, value in parts.items()}
        if "rotation" in parts:
            report["degrees"] = mean_angle(answers[-1].detach().float(), targets)
            report["turned"] = mean_angle(standing_still(targets), targets)
        return HeadLoss(step.share() * self.config.weight * total + self.idle(), report)

    def answers(self, states: Tensor, laid: LaidFrames) -> tuple[list[Tensor], list[int], list[int]]:
        """States ``(S, M, L)`` of sets of tokens → poses ``(F, 9)`` after each refinement, of all videos' frames; the row of the targets
        that each is; and how many frames each video has."""
        places = [found for found in rows_of_sets(laid, self.together) if _of_a_video(laid, found[2])]
        counts = [frames for frames, video in zip(laid.frames, laid.video, strict=True) if video]
        states = self.norm(states.to(self.norm.weight.dtype))
        pooled = (self.score(states).softmax(dim=1) * states).sum(dim=1)
        frames = self.project(pooled).unflatten(-1, (self.together, -1))
        tokens = frames[[place[0] for place in places], [place[1] for place in places]]
        padded = nn.utils.rnn.pad_sequence(list(tokens.split(counts)), batch_first=True)
        number = torch.arange(padded.shape[1], device=padded.device)
        real = number[None] < torch.tensor(counts, device=padded.device)[:, None]
        answer = padded.new_zeros(*padded.shape[:2], POSE_SIZE)
        found = []
        for _ in range(self.config.iterations):
            shift, scale, gate = self.modulate(self.embed(answer.detach())).chunk(3, dim=-1)
            x = padded + gate * (self.plain(padded) * (1 + scale) + shift)
            answer = answer.detach() + self.answer(self.trunk(x, src_key_padding_mask=~real))
            found.append(answer[real])
        return found, [place[2] for place in places], counts


def standing_still(targets: Tensor) -> Tensor:
    """Poses ``(F, 9)`` of a camera that stays as it is."""
    still = torch.zeros_like(targets)
    still[:, 6] = 1.0
    return still


def _of_a_video(laid: LaidFrames, row: int) -> bool:
    for frames, video in zip(laid.frames, laid.video, strict=True):
        if row < frames:
            return video
        row -= frames
    return False


def unit_translations(poses: Tensor) -> Tensor:
    """Poses ``(F, 9)`` of one video with translations of mean length 1, the reference (at 0) not counted."""
    lengths = poses[:, :3].norm(dim=-1)
    counted = lengths[lengths.isfinite() & (lengths > 0)]
    if not len(counted):
        return poses
    return torch.cat([poses[:, :3] / counted.mean(), poses[:, 3:]], dim=-1)


def pose_errors(answers: Tensor, targets: Tensor, *, squared: bool = False) -> dict[str, Tensor]:
    """Mean absolute (or squared) errors of poses ``(F, 9)`` by part, over what is known; a part of which nothing is known is absent."""
    parts = {}
    for name, span in (("translation", slice(0, 3)), ("rotation", slice(3, 7)), ("fov", slice(7, 9))):
        known = targets[:, span].isfinite().all(dim=-1)
        if bool(known.any()):
            off = (answers[known][:, span] - targets[known][:, span]).abs()
            off = off.clamp(max=_FURTHEST) if name == "translation" else off
            parts[name] = (off.square() if squared else off).mean()
    return parts


def mean_angle(answers: Tensor, targets: Tensor) -> Tensor:
    """Mean angle in degrees by which rotations of poses ``(F, 9)`` are off, over those that are known."""
    known = targets[:, 3:7].isfinite().all(dim=-1)
    turns = nn.functional.normalize(answers[known, 3:7], dim=-1)
    alike = (turns * targets[known, 3:7]).sum(dim=-1).abs().clamp(max=1.0)
    return torch.rad2deg(2 * alike.acos()).mean()
