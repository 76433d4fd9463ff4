"""Which language models have several position axes (M-RoPE), and how does our model give their tokens positions?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from mllm.errors import AlignmentError, ConfigError
from mllm.heads.build import drawing_head
from mllm.models.configuration_mllm import MllmConfig
from mllm.processing.layout import LayoutRules, visuals_of_rows
from mllm.processing.positions import Shown, row_positions
from mllm.types import VisualLayout

SERVED_AS: dict[str, str | None] = {
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": None,
    "qwen3_5_text": None,
    "qwen3_5_moe_text": None,
    "glm4v_text": "Glm4ForCausalLM",
    "glm4v_moe_text": None,
    "glm_ocr_text": "Glm4ForCausalLM",
}
"""The language models of transformers that take three axes as we give them, each with vLLM's class of the same layers (None: none that was
tried)."""
INTERLEAVED = {kind for kind in SERVED_AS if kind.startswith("qwen3")}
"""Those in which channels of the three axes take turns; in the others each axis has a stretch of its own. transformers' classes do it by
themselves, vLLM asks the config (`told_to_vllm`)."""
_KEY = "_mllm_position_shift"


def has_axes(text: PreTrainedConfig) -> bool:
    """Whether a language model's tokens have positions on three axes. text: its config."""
    return text.model_type in SERVED_AS and "mrope_section" in (getattr(text, "rope_parameters", None) or {})


def told_to_vllm(text: PreTrainedConfig) -> None:
    """Write into a language model's config what vLLM reads there and transformers knows by the class. text: changed in place."""
    if has_axes(text):
        text.rope_parameters = {**text.rope_parameters, "mrope_interleaved": text.model_type in INTERLEAVED}  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportGeneralTypeIssues]


def checked_positions(
    text: PreTrainedConfig, wanted: Literal["grid", "text"] | None, heads: Any, router: Any
) -> Literal["grid", "text"] | None:
    """How a model's tokens get their positions, None where each has one number.

    Args:
        text: the language model's config.
        wanted: the recipe's ``model.language_model.positions``.
        heads: the recipe's ``model.heads``.
        router: the recipe's ``model.router``.

    Raises:
        ConfigError: the language model has one axis only, its axes do not divide its channels, or another part knows of one axis only.
    """
    where, kind = "model.language_model", text.model_type
    rope = getattr(text, "rope_parameters", None) or {}
    if kind not in SERVED_AS and ("mrope_section" in rope or rope.get("rope_type") == "mrope"):
        raise ConfigError(
            f"{where}: {kind} has no positions of several axes (mrope_section, M-RoPE) that are known here; {', '.join(SERVED_AS)} have. "
            "Leave mrope_section and rope type mrope out of rope_parameters"
        )
    if kind in SERVED_AS and "mrope_section" not in rope and type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"{where}: {kind} has positions of several axes, and its rope_parameters do not say which channels they turn; give "
            "mrope_section, three numbers that add up to half of a head's channels"
        )
    if not has_axes(text):
        if wanted is not None:
            raise ConfigError(
                f"{where}.positions: {wanted} is for language models with several position axes (rope_parameters with mrope_section), and "
                f"{kind} has one; leave it out"
            )
        return None
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    half, sections = int(width * rope.get("partial_rotary_factor", 1.0)) // 2, list(rope["mrope_section"])
    if len(sections) != 3 or sum(sections) != half:
        raise ConfigError(
            f"{where}: rope_parameters.mrope_section is {sections}, expected three numbers that add up to {half}, half of the "
            "channels that positions turn"
        )
    if wanted == "text":
        return wanted
    if drawing_head(heads) is not None:
        raise ConfigError(
            f"{where}.positions: a head that draws writes its tokens at one axis, and {kind} has three; use positions: text, or a "
            "language model with one axis"
        )
    if (router or {}).get("type") == "language_model":
        raise ConfigError(
            f"{where}.positions: a language_model router shows the language model a picture of another grid first, which was not tried "
            f"with the three axes of {kind}; use positions: text, or another router"
        )
    return "grid"


def axes_of(config: MllmConfig, rules: LayoutRules) -> PositionAxes | None:
    """What gives a model's tokens their positions; None where each has one number. rules: how its visuals lie."""
    if not has_axes(config.text_config):
        return None
    return PositionAxes(config.positions != "text", rules)


@dataclass
class PositionAxes:
    """Positions for a language model with several axes. grid: visual tokens stand where their map says; else all axes are alike."""

    grid: bool
    rules: LayoutRules

    def lay(
        self,
        embeddings: Tensor,
        given: Tensor | None,
        mask: Any,
        cache: Any,
        places: Tensor | None,
        find_layouts: Callable[[], Sequence[VisualLayout] | None],
        times: Tensor | None,
    ) -> Laid:
        """Positions of one pass.

        Args:
            embeddings: ``(B, T, L)``, what the language model is given.
            given: ``(B, T)``, the tokens' places in their samples; None: worked out; three axes, or four with these places, stay as they
                are.
            mask: the attention mask; one of ``(B, T)`` tells padding.
            cache: of earlier passes of the same text, or None.
            places: ``(B, T)`` bool, where visual tokens stand; None: nowhere.
            find_layouts: the visuals' layouts (None: all lie alike, in one view).
            times: ``(visuals, F)``, as `mllm.processing.layout.VIDEO_TIMES` says.

        Raises:
            AlignmentError: layouts and places do not go together, or the cache is of another batch.
        """
        if given is not None and given.ndim == 3:
            return Laid(given, None)
        text = _places_in_text(embeddings, given, mask, cache)
        shift = _shift_of(cache, text)
        if places is None or not self.grid:
            axes = text if shift is None else text + shift[:, None]
            return Laid(torch.stack([text, axes, axes, axes]), shift)
        found, shift = self._laid_out(text, places, find_layouts(), times, shift)  # pyright: ignore[reportAttributeAccessIssue]
        return Laid(torch.cat([text[None], found]), shift)

    @torch.compiler.disable
    def _laid_out(
        self,
        text: Tensor,
        places: Tensor,
        layouts: Sequence[VisualLayout] | None,
        times: Tensor | None,
        shift: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``(3, B, T)``, and how far each row is ahead of its text behind it."""
        rows, seen = text.cpu().numpy(), places.cpu().numpy()
        counts = seen.sum(-1).tolist()
        if layouts is None:
            picture = self.rules.layout()
            layouts = [picture] * (sum(counts) // picture.num_placeholders)
        owned, made, shifts, used = visuals_of_rows(counts, layouts), [], [], 0
        for number, row in enumerate(owned):
            shown = [
                Shown(layout, moments_of(times, used + k) if layout.frames else ()) for k, layout in enumerate(row)
            ]
            used += len(row)
            before = 0 if shift is None else int(shift[number])
            found, behind = self.of_row(rows[number], np.flatnonzero(seen[number]), shown, before)
            made.append(torch.from_numpy(found))
            shifts.append(behind)
        return torch.stack(made, 1).to(text.device), torch.tensor(shifts, device=text.device)

    def of_row(
        self, text: np.ndarray, places: np.ndarray, visuals: Sequence[Shown], shift: int = 0
    ) -> tuple[np.ndarray, int]:
        """`mllm.processing.positions.row_positions` as this model's settings ask for.

        Args:
            text: ``(T,)``, the tokens' places in their sample.
            places: ``(n,)``, where visual tokens stand.
            visuals: whose these are.
            shift: how far positions are ahead of text where the row begins.

        Returns:
            ``(3, T)``, and how far they are ahead behind the row.
        """
        if not self.grid:
            return np.tile(text + shift, (3, 1)), shift
        video = self.rules.video
        per_second = None if video is None else video.positions_per_second
        return row_positions(text, places, visuals, self.rules.view, per_second=per_second, shift=shift)


@dataclass
class Laid:
    """Positions of one pass. ids: ``(4, B, T)``, the place in the text and three axes; shift: ``(B,)``, how far the axes are ahead of the
    text behind it (None: not at all, or not known)."""

    ids: Tensor
    shift: Tensor | None

    def remember(self, cache: Any) -> None:
        """Keep for the passes that follow by this cache how far positions are ahead."""
        if cache is not None and self.shift is not None:
            setattr(cache, _KEY, self.shift)


def moments_of(times: Tensor | None, number: int) -> tuple[int, ...]:
    """Milliseconds of one video's frames. times: ``(visuals, F)``, -1 beyond a video's own."""
    return () if times is None else tuple(int(moment) for moment in times[number].tolist() if moment >= 0)


def _places_in_text(embeddings: Tensor, given: Tensor | None, mask: Any, cache: Any) -> Tensor:
    """``(B, T)``: each token's place in its sample."""
    rows, length = embeddings.shape[:2]
    if given is not None:
        return given.expand(rows, -1)
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + length:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return (torch.arange(length, device=embeddings.device) + past).expand(rows, -1)


def _shift_of(cache: Any, text: Tensor) -> Tensor | None:
    """How far positions are ahead of the text where this pass begins; none where the text begins with it."""
    kept: Tensor | None = getattr(cache, _KEY, None)
    if kept is None:
        return None
    if len(text) % len(kept):
        raise AlignmentError(f"the cache holds positions of {len(kept)} prompts, the batch has {len(text)}")
    return kept.repeat_interleave(len(text) // len(kept)).to(text.device) * (text[:, 0] > 0)
