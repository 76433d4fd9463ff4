"""How does ``generate`` treat images and routing?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from mllm.errors import AlignmentError, ConfigError
from mllm.heads.base import MultimodalModel
from mllm.heads.codes.grammar import never_written
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.routing import check_choices, encode_for_generation
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, visuals_of_rows
from mllm.processing.pixel_keys import PRIMARY_PIXELS
from mllm.types import Routing
from mllm.visual_tokenizers.sequence import NeverWritten


class MultimodalGenerationMixin(GenerationMixin):
    """transformers' generation with routing chosen per call, images kept with their samples, and image grammar."""

    config: MllmConfig
    model: Any
    heads: Any
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
        """As in transformers, for text with images, and for a model with a router.

        A vocabulary head's images keep their grammar, for every sample of the batch; other heads' image tokens are not generated (see
        `generate_images`). The placeholder of images that are read is never generated. The routing of the call is in ``last_routing``, and
        in the output's ``routing`` with ``return_dict_in_generate``.

        Args:
            inputs: the prompts' ids ``(B, T)``, padded on the left; also as ``input_ids=``.
            args: as transformers takes them.
            experts: fixes the routing: names, name → weight, ``"none"``, or one entry per image.
            expert_budget: most experts per image.
            expert_threshold: an expert below this probability does not run.
            kwargs: as transformers takes them, and what the processor gives; a ``language_model`` router needs ``tokenizer=``.

        Returns:
            Ids ``(B, T)`` with the prompts, or transformers' output object.

        Raises:
            AlignmentError: a prompt ends in padding.
            ConfigError: a way to generate that would not see the images, or a routing that the model cannot follow.
        """
        whole = cast("MultimodalModel", self)
        refuse_right_padding(whole, inputs if inputs is not None else kwargs.get("input_ids"), kwargs)
        self._refuse_blind_decoding(args, kwargs)
        tower = self.model.vision_tower
        pool = tower.experts if tower is not None else ()
        check_choices(pool, experts, expert_budget, expert_threshold)
        self.last_routing = None
        pixels = kwargs.get(PRIMARY_PIXELS)
        if pool and pixels is not None and len(pixels) and kwargs.get("image_features") is None:
            kwargs, self.last_routing = encode_for_generation(
                whole,
                kwargs,
                experts=experts,
                expert_budget=expert_budget,
                expert_threshold=expert_threshold,
                tokenizer=kwargs.get("tokenizer"),
            )
        rules = self._token_rules()
        if rules is not None:
            kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or []), rules]
        output = self.generate_text(inputs, *args, **kwargs)
        if self.last_routing is not None and not isinstance(output, Tensor):
            output.routing = self.last_routing
        return output

    def _token_rules(self) -> Any:
        """What may be generated: a placeholder never, since nothing would stand for it, nor an id that no token has."""
        if self.visual_config is not None:
            return self.image_rules()  # pyright: ignore[reportAttributeAccessIssue]
        never = never_written(self.config)
        if not never:
            return None
        return NeverWritten(never, device="cpu" if self.device.type == "meta" else self.device)  # pyright: ignore[reportAttributeAccessIssue]

    def _refuse_blind_decoding(self, args: tuple, kwargs: dict[str, Any]) -> None:
        settings = [kwargs.get("generation_config", args[0] if args else None), self.generation_config]

        def setting(name: str) -> Any:
            values = [kwargs.get(name), *(getattr(config, name, None) for config in settings)]
            return next((value for value in values if value is not None), None)

        if setting("assistant_early_exit") is not None:
            raise ConfigError(
                "assistant_early_exit: this model cannot draft with its first layers; give prompt_lookup_num_tokens, or a smaller "
                "model as assistant_model"
            )
        if not any(kwargs.get(key) is not None for key in self._image_inputs):
            return
        if setting("prefill_chunk_size") is not None:
            raise ConfigError(
                f"prefill_chunk_size={setting('prefill_chunk_size')}: a prompt with images is read whole, chunks would lose them; "
                "leave it out"
            )
        assistant = kwargs.get("assistant_model")
        if assistant is None:
            return
        theirs = (
            getattr(getattr(assistant, "model", None), "pixel_keys", None),
            assistant.config.to_dict().get("image_token_id"),
        )
        if theirs != (self.model.pixel_keys, self.config.image_token_id):
            raise ConfigError(
                f"assistant_model: {type(assistant).__name__} does not read the prompt's images as this model does (encoders "
                f"{', '.join(self.model.pixel_keys)}, placeholder {self.config.image_token_id}); give an mllm model with the same "
                "encoders, or prompt_lookup_num_tokens"
            )

    def generate_text(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own ``generate``: images are encoded where they stand, nothing is recorded."""
        return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def _image_inputs(self) -> list[str]:
        return [
            *self.model.pixel_keys.values(),
            IMAGE_SIZES,
            VIDEO_TIMES,
            "expert_weights",
            "router_input_ids",
            "image_features",
            *(name for head in self.heads.values() for name in head.targets),
            "num_image_patches",
        ]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own = set(self._image_inputs)
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in own})  # pyright: ignore[reportAttributeAccessIssue]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,  # transformers looks for the name
        is_first_iteration: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # An assistant's first pass is not called one, yet it reads the prompt: what counts is an empty cache.
        first = bool(is_first_iteration) or past_key_values is None or past_key_values.get_seq_length() == 0
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, is_first_iteration=first, **kwargs
        )
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
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images and expand_size > 1 and source is not None:
            counts = self._rows_of_samples(source, model_kwargs.get("inputs_embeds"), expand_size, images)
            images = {
                key: torch.cat([part for group in value.split(counts[key]) for part in [group] * expand_size])
                for key, value in images.items()
            }
        model_kwargs.update(images)
        return input_ids, model_kwargs

    def _rows_of_samples(
        self, input_ids: Tensor, embeddings: Tensor | None, repeats: int, images: dict[str, Tensor]
    ) -> dict[str, list[int]]:
        """For every image input, how many of its rows belong to each sample of the batch: one per image, per view where it
        is pixels, per visual token where it is features. embeddings: the prompts', each ``repeats`` times, in place of ids."""
        encoders = {key: name for name, key in self.model.pixel_keys.items()}
        sizes, times = images.get(IMAGE_SIZES), images.get(VIDEO_TIMES)
        places = input_ids == self.config.image_token_id
        if embeddings is not None:
            places = self.model.image_places(None, embeddings[::repeats])
        tokens: list[int] = places.sum(-1).tolist()
        flat: set[str] = {key for key, value in images.items() if key == "image_features" and value.dim() == 2}
        if flat == set(images):
            return dict.fromkeys(flat, tokens)
        described = [value for value in (sizes, times) if value is not None]
        described = described or [value for key, value in images.items() if key not in flat]
        count = len(described[0])
        owned = visuals_of_rows(tokens, self.model.rules.layouts(sizes, count, times))
        return {
            key: [sum(layout.num_given for layout in row) for row in owned]
            if key in flat
            else [sum(layout.rows_of(encoders[key]) if key in encoders else 1 for layout in row) for row in owned]
            for key in images
        }


def refuse_right_padding(model: MultimodalModel, input_ids: Tensor | None, given: Any) -> None:
    """Raises `AlignmentError` when a row of the prompt ends in padding: its answer would continue the padding.

    input_ids ``(B, T)``; given: the call's arguments; without an attention mask, a padding id that ends no text tells."""
    mask = given.get("attention_mask")
    if mask is not None:
        if mask.ndim != 2 or not mask.shape[1]:
            return
        ended = mask[:, -1] == 0
    else:
        pad, stops = (getattr(model.generation_config, name, None) for name in ("pad_token_id", "eos_token_id"))
        if input_ids is None or pad is None or pad in (stops if isinstance(stops, list) else [stops]):
            return
        ended = input_ids[:, -1] == pad
    rows = ended.nonzero()[:, 0].tolist()
    if rows:
        raise AlignmentError(
            f"prompt {rows[0]} of {len(ended)} ends in padding, and its answer would continue that. Pad on the left: "
            "processor(..., padding=True, padding_side='left'), or processor.tokenizer.padding_side = 'left'"
        )
