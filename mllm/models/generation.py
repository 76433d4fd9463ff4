"""How does ``generate`` treat images and routing?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportAssignmentType=false, reportPrivateImportUsage=false, reportGeneralTypeIssues=false
# pyright: reportIncompatibleVariableOverride=false, reportOptionalIterable=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from mllm.models.routing import check_choices, encode_for_generation
from mllm.processing.layout import PRIMARY_PIXELS
from mllm.types import Routing


class MultimodalGenerationMixin(GenerationMixin):
    """transformers' generation with routing chosen per call, images kept with their samples, and image grammar."""

    config: Any
    model: Any
    visual_config: Any
    last_routing: Routing | None

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *args: Any,
        experts: Any = None,
        expert_budget: int | None = None,
        expert_threshold: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, and for a model with a router: experts (names, name → weight, ``"none"``, or one entry per
        image) fixes the routing; expert_budget: most experts per image; expert_threshold: an expert below this probability
        does not run. A vocabulary head's images keep their grammar, for every sample of the batch; other heads' image tokens
        are not generated (see `generate_images`). The routing of the call is in ``last_routing``, and in the output's ``routing`` with
        ``return_dict_in_generate``. A ``language_model`` router needs ``tokenizer=``."""
        tower = self.model.vision_tower
        pool = tower.experts if tower is not None else ()
        check_choices(pool, experts, expert_budget, expert_threshold)
        self.last_routing = None
        pixels = kwargs.get(PRIMARY_PIXELS)
        if pool and pixels is not None and len(pixels) and kwargs.get("image_features") is None:
            kwargs, self.last_routing = encode_for_generation(
                self,
                kwargs,
                experts=experts,
                expert_budget=expert_budget,
                expert_threshold=expert_threshold,
                tokenizer=kwargs.get("tokenizer"),
            )
        if self.visual_config is not None:
            kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or []), self.image_rules()]
        output = self.generate_text(inputs, *args, **kwargs)
        if self.last_routing is not None and not isinstance(output, Tensor):
            output.routing = self.last_routing
        return output

    def generate_text(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own ``generate``: images are encoded where they stand, nothing is recorded."""
        return super().generate(*args, **kwargs)

    @property
    def _image_inputs(self) -> list[str]:
        return [
            *self.model.pixel_keys.values(),
            "expert_weights",
            "router_input_ids",
            "image_features",
            "target_images",
            "num_image_patches",
        ]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = set(self._image_inputs)
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in own})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, is_first_iteration: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )
        first = is_first_iteration
        if first is None:
            first = past_key_values is None or past_key_values.get_seq_length() == 0
        if not first and kwargs.get("use_cache", True):
            for key in self._image_inputs:
                inputs.pop(key, None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several return sequences: repeat each sample's images as a group, not image by image."""
        images = {k: model_kwargs.pop(k) for k in self._image_inputs if model_kwargs.get(k) is not None}
        source = input_ids
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images and expand_size > 1 and source is not None:
            per_image = max(self.config.num_image_tokens, 1)
            counts = ((source == self.config.image_token_id).sum(-1) // per_image).tolist()
            images = {
                key: torch.cat([part for group in value.split(counts) for part in [group] * expand_size])
                for key, value in images.items()
            }
        model_kwargs.update(images)
        return input_ids, model_kwargs
