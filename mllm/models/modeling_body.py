"""Which module turns text and images into hidden states? Encoders, router, connector and decoder, without the language-model head."""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple  # pyright: ignore[reportPrivateImportUsage]

from mllm.errors import AlignmentError, ConfigError
from mllm.heads.build import encoders_read
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.levels import Visits, VisualReads, install_visits, visits_of
from mllm.models.making import build_language_model, language_model_follows
from mllm.models.modality import VisualPlaces, install_switch
from mllm.models.modeling_base import MllmModelOutput, MllmPreTrainedModel
from mllm.models.pipeline import EncoderBank, build_own_tokenizer, build_visual_parts, home_of
from mllm.models.placeholders import refuse_orphans
from mllm.models.position_axes import axes_of
from mllm.models.slow_tokens import SlowTokens, build_readers, install_readers, take_slow
from mllm.processing.pixel_keys import PRIMARY_PIXELS, PixelKeys
from mllm.types import Routing, VisionFeatures, VisualLayout

_log = logging.getLogger(__name__)


class MllmModel(MllmPreTrainedModel):
    """Encoders, router, connector and decoder, without the language-model head."""

    vision_tower: EncoderBank | None
    multi_modal_projector: nn.Module | None
    language_model: Any

    def __init__(self, config: MllmConfig):
        super().__init__(config)
        self.vision_tower, self.multi_modal_projector = build_visual_parts(config)
        self.visual_tokenizer = build_own_tokenizer(config)
        self.language_model = build_language_model(
            partial(AutoModel.from_config, config.text_config), vocabulary=config.get_text_config().vocab_size
        )
        self.visual_places: VisualPlaces | None = None
        tower = self.vision_tower
        parts = [self.multi_modal_projector, self.visual_tokenizer]
        parts += [] if tower is None else [tower.router, *tower.encoders.values()]
        whole = {type(part).__name__ for part in parts if part is not None}  # ``device_map`` puts each on one device
        self._no_split_modules = [*(getattr(self.language_model, "_no_split_modules", None) or ()), *sorted(whole)]
        self.pixel_keys = PixelKeys(config.encoders)
        self.rules = config.layout_rules()
        self.axes = axes_of(config, self.rules)
        fast = self.rules.view.fast
        self.slow_attention: Any = None if fast is None else build_readers(fast, config.get_text_config())
        if not language_model_follows():
            self._prepare_decoder()
        self.read_by_heads = encoders_read(config.heads)
        self._warned_of_lost_losses = False
        self.post_init()

    def _prepare_decoder(self, *, published: bool = False) -> None:
        """Give the language model's layers what the model's other parts need there. published: its weights are read already."""
        if self.config.modality_switch:
            self.visual_places = install_switch(self.language_model)
        install_visits(self.language_model, self.rules.view.levels, self.readers)
        if self.slow_attention is not None:
            install_readers(self.language_model, self.slow_attention, start=published)

    def take_decoder(self, decoder: nn.Module) -> None:
        """Put a published language model, without its head, into a model that was built without one.

        Args:
            decoder: of the config's own kind, its weights read.
        """
        self.language_model = decoder.train(self.training)
        self._prepare_decoder(published=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def encode_images(
        self,
        pixels: Mapping[str, Tensor],
        *,
        expert_weights: Tensor | None = None,
        router_input_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        video_times: Tensor | None = None,
        kept: dict[str, VisionFeatures] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Routing | None]:
        """Pixels to visual tokens.

        Args:
            pixels: encoder name → ``(V, 3, H, W)``, all views of B images.
            expert_weights: ``(B, E)``, fixes the routing.
            router_input_ids: ``(B, T)``, the questions' token ids, padded with -1.
            image_sizes: ``(B, 2)``, (height, width), where the views depend on them.
            video_times: ``(B, F)``, when each frame of the videos among them is, -1 beyond.
            kept: is given the features that heads read.
            options: ``base`` and limits of the routing, see `EncoderBank.forward`.

        Returns:
            Visual tokens ``(ΣM, L)``, one image after another, and the routing (None without a router).

        Raises:
            AlignmentError: the model is text-only.
        """
        if self.vision_tower is None or self.multi_modal_projector is None:
            raise AlignmentError("images were given to a text-only model (its config has no connector)")
        text = self.question_summary(router_input_ids)
        layouts = self.visual_layouts(image_sizes, video_times)
        options = options if layouts is None else {**options, "layouts": layouts}
        features, routing = self.vision_tower(pixels, expert_weights=expert_weights, text=text, **options)
        if kept is not None:
            kept |= {name: features[name] for name in self.read_by_heads}
        return self.connect(features, routing, text, layouts), routing

    def tokens_of_images(self, total: int, image_sizes: Tensor | None) -> list[int]:
        """How many placeholders each picture of a batch has.

        Args:
            total: all placeholders of the batch.
            image_sizes: ``(images, 2)``, (height, width), where the views depend on them.

        Returns:
            One number a picture, in order.
        """
        layouts = self.visual_layouts(image_sizes)
        if layouts is not None:
            return [layout.num_placeholders for layout in layouts]
        each = self.rules.layout().num_placeholders
        return [each] * (total // each)

    def visual_layouts(
        self, image_sizes: Tensor | None, video_times: Tensor | None = None
    ) -> list[VisualLayout] | None:
        """How each image of a batch lies in the sequence.

        Args:
            image_sizes: ``(images, 2)``, (height, width), where the views depend on them.
            video_times: ``(images, F)``, when each frame of the videos among them is, -1 beyond.

        Returns:
            One layout an image; None where all lie alike, in one view.
        """
        if video_times is None and not self.rules.needs_size:
            return None
        return self.rules.layouts(image_sizes, times=video_times)

    def connect(
        self,
        features: Mapping[str, VisionFeatures],
        routing: Routing | None,
        text: Tensor | None,
        layouts: Sequence[VisualLayout] | None = None,
    ) -> Tensor:
        """Features to visual tokens.

        Args:
            features: encoder name → features of all views.
            routing: which experts ran on each image; None without a router.
            text: ``(B, L)``, the questions' summary.
            layouts: how each image lies in the sequence; None where all lie alike, in one view.

        Returns:
            ``(ΣM, L)``, one image after another; ``(B, M, L)`` joined the same way where layouts is None.
        """
        assert self.multi_modal_projector is not None
        parameter = next(self.multi_modal_projector.parameters(), None)
        if parameter is not None:
            for feature in features.values():
                feature.tokens = feature.tokens.to(home_of(parameter, feature.tokens), parameter.dtype)
        if layouts is None:
            return self.multi_modal_projector(features, routing, text)
        return self.multi_modal_projector(features, routing, text, layouts)

    def question_summary(self, router_input_ids: Tensor | None) -> Tensor | None:
        """What a router or a connector reads of the questions: the mean of their token embeddings, without gradients.

        Args:
            router_input_ids: ``(B, T)``, padded with -1; None passes.

        Returns:
            ``(B, L)``, or None.
        """
        if router_input_ids is None:
            return None
        real = router_input_ids.ge(0).unsqueeze(-1)
        embeddings = self.get_input_embeddings()(router_input_ids.clamp(min=0)).detach()
        return (embeddings * real).sum(1) / real.sum(1).clamp(min=1)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        expert_weights: Tensor | None = None,
        router_input_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        video_times: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of B images.

        Args:
            pixel_values: the first encoder's pixels ``(V, 3, H, W)``, all views of the images.
            expert_weights: ``(B, E)``, fixes the routing.
            router_input_ids: ``(B, T)``, the questions that a router reads, padded with -1.
            image_sizes: ``(B, 2)``, (height, width), where the views depend on them.
            video_times: ``(B, F)``, when each frame of the videos among them is, -1 beyond.
            kwargs: other encoders' pixels as ``pixel_values_<name>``.

        Returns:
            ``pooler_output`` ``(B, M, L)``; a tuple of B ``(M, L)`` where images differ in M (views that depend on ``image_sizes``,
            videos). Of a connector with levels (`ViewLayout.levels`) each token is as many times wider; behind a video's fast tokens
            stand its slow ones (`ViewLayout.fast`).
        """
        pixels = self.pixel_keys.by_encoder({**kwargs, PRIMARY_PIXELS: pixel_values})
        kept: dict[str, VisionFeatures] = {}
        joined, routing = self.encode_images(
            pixels,
            expert_weights=expert_weights,
            router_input_ids=router_input_ids,
            image_sizes=image_sizes,
            video_times=video_times,
            kept=kept,
        )
        layouts = self.visual_layouts(image_sizes, video_times)
        tokens: Any
        if layouts is None:
            tokens = joined.view(len(pixel_values), self.rules.layout().num_placeholders, joined.shape[-1])
        else:
            tokens = joined.split([layout.num_given for layout in layouts])
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens)
        output.routing, output.features = routing, kept
        return output

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Token embeddings; the image placeholder's id may lie outside the vocabulary.

        Args:
            input_ids: ``(B, T)``.

        Returns:
            ``(B, T, L)``.
        """
        image_id = self.config.image_token_id
        embeddings = self.get_input_embeddings()
        if image_id is not None and image_id >= self.config.get_text_config().vocab_size:
            input_ids = input_ids.masked_fill(input_ids == image_id, 0)
        return embeddings(input_ids)

    def image_places(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """Where visual tokens go.

        Args:
            input_ids: ``(B, T)``; None: placeholders are found by their embedding.
            inputs_embeds: ``(B, T, L)``, before anything is put in.

        Returns:
            ``(B, T)``, true at placeholders.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = self.embed_tokens(torch.tensor([[self.config.image_token_id]], device=inputs_embeds.device))
        return (inputs_embeds == placeholder.to(inputs_embeds)).all(-1)

    def merge_images(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_tokens: Any) -> Tensor:
        """Put visual tokens into the placeholders, in order.

        Args:
            input_ids: ``(B, T)``; None: placeholders are found by their embedding.
            inputs_embeds: ``(B, T, L)``.
            image_tokens: ``(ΣM, L)``, ``(images, M, L)`` or a sequence of ``(M, L)``.

        Returns:
            ``(B, T, L)``.

        Raises:
            AlignmentError: the counts or the widths differ.
        """
        mask = self.image_places(input_ids, inputs_embeds)
        if not isinstance(image_tokens, Tensor):
            image_tokens = torch.cat(list(image_tokens))
        images = f" ({len(image_tokens)} images × {image_tokens.shape[1]})" if image_tokens.dim() == 3 else ""
        if image_tokens.shape[-1] != inputs_embeds.shape[-1]:
            raise AlignmentError(
                f"visual tokens are {image_tokens.shape[-1]} wide and the language model's {inputs_embeds.shape[-1]}"
                + (
                    f": of connector {(self.config.connector or {}).get('type')} only the first part stands in the sequence"
                    if self.rules.view.levels or self.rules.view.beside
                    else ""
                )
            )
        image_tokens = image_tokens.reshape(-1, image_tokens.shape[-1]).to(inputs_embeds.device, inputs_embeds.dtype)
        if not torch.compiler.is_compiling():
            found, given = int(mask.sum()), len(image_tokens)
            if found != given:
                raise AlignmentError(
                    f"{found} image placeholder tokens for {given} visual tokens{images}; was the text made by this model's "
                    "own processor and not truncated?"
                )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_tokens)

    def _tell_lost_losses(self, routing: Routing) -> None:
        """Warn, once, when a learning router's losses are left out of the loss of a training step."""
        if self.training and torch.is_grad_enabled() and routing.losses and not self._warned_of_lost_losses:
            self._warned_of_lost_losses = True
            _log.warning(
                "the router's own losses (%s) are not part of this training: the trainer takes its loss from hidden states or logits, "
                "as TRL's do, and not from model(…, labels=…).loss. Nothing keeps the router from choosing always the same "
                "expert: freeze it (model.model.vision_tower.router.requires_grad_(False)), or train with mllm train or "
                "transformers' Trainer",
                ", ".join(routing.losses),
            )

    def _idle_pass(self, inputs_embeds: Tensor) -> Tensor:
        """A text-only batch in training: touch every learning visual parameter with weight zero, so that ranks with and
        without images reduce the same gradients (ZeRO-1/2 go wrong silently, ZeRO-3 fails otherwise). Under ZeRO-3 frozen
        parts run too: their weights are partitioned, and all ranks must gather them together."""
        parameters = [*self.vision_tower.parameters(), *self.multi_modal_projector.parameters()]  # type: ignore[union-attr]
        if not any(p.requires_grad or hasattr(p, "ds_id") for p in parameters):
            return inputs_embeds
        infos = self.vision_tower.infos  # type: ignore[union-attr]
        size = next((info.image.height, info.image.width) for info in infos.values())
        layout, pixels = self.rules.layout(size), {}
        for name, info in infos.items():
            one = (info.image.channels, info.image.height, info.image.width)
            one = one if layout.patches is None else (3 * (info.image.patch or 1) ** 2,)
            pixels[name] = inputs_embeds.new_zeros(layout.rows_of(name), *one)
        routed = bool(self.vision_tower.experts)  # type: ignore[union-attr]
        question = torch.zeros(1, 1, dtype=torch.long, device=inputs_embeds.device) if routed else None
        sizes = torch.tensor([size]) if self.rules.needs_size else None
        still = None if self.rules.video is None else torch.full((1, 1), -1)
        tokens, routing = self.encode_images(pixels, router_input_ids=question, image_sizes=sizes, video_times=still)
        idle = tokens.sum() * 0.0
        if routing is not None:
            idle = idle + routing.weights.sum() * 0.0 + sum(loss * 0.0 for loss in routing.losses.values())
        return inputs_embeds + idle.to(inputs_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        expert_weights: Tensor | None = None,
        router_input_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        image_sizes: Tensor | None = None,
        video_times: Tensor | None = None,
        slot_mask: Tensor | None = None,
        slot_embeds: Tensor | None = None,
        adds_losses: bool = False,
        **kwargs: Any,
    ) -> MllmModelOutput:
        """Last hidden states of text and images.

        Args:
            input_ids: ``(B, T)``; each image's placeholders stand where its tokens go.
            attention_mask: ``(B, T)``, or what the attention in use takes.
            position_ids: ``(B, T)``, places in the sample; of a language model with several axes also ``(4, B, T)``, with these.
            past_key_values: the cache of earlier calls.
            inputs_embeds: ``(B, T, L)`` in place of input_ids.
            pixel_values: the first encoder's pixels, all views of the images; of a visual tokenizer's encoder they may be codes
                ``(images, S)``.
            expert_weights: ``(images, E)``, fixes the routing.
            router_input_ids: ``(images, T)``, the questions that a router reads, padded with -1.
            image_features: ``(ΣM, L)`` or ``(images, M, L)``, visual tokens computed before, in place of pixels.
            image_sizes: ``(images, 2)``, the pictures' (height, width), for views that depend on them.
            video_times: ``(images, F)``, as `VIDEO_TIMES` says.
            slot_mask: ``(B, T)``, where slot_embeds stand in place of token embeddings.
            slot_embeds: ``(n, L)``.
            adds_losses: the caller adds the losses in ``routing`` to its own.
            kwargs: other encoders' pixels as ``pixel_values_<name>``, and what the language model takes.

        Returns:
            Hidden states ``(B, T, L)`` after the final norm, visual tokens, routing, and the features that heads read.

        Raises:
            AlignmentError: placeholders and visual tokens differ in number.
            ValueError: both or none of input_ids and inputs_embeds were given.
            ConfigError: images without input_ids in a model with a modality switch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # pyright: ignore[reportArgumentType]
        if slot_mask is not None and slot_embeds is not None:
            inputs_embeds = inputs_embeds.masked_scatter(slot_mask.unsqueeze(-1), slot_embeds.to(inputs_embeds))
        kwargs.pop("num_image_patches", None)
        extra = {key: kwargs.pop(key) for key in self.pixel_keys.values() if key in kwargs}
        routing, features = None, {}
        if image_features is None and pixel_values is not None and pixel_values.shape[0]:
            output = self.get_image_features(
                pixel_values,
                expert_weights=expert_weights,
                router_input_ids=router_input_ids,
                image_sizes=image_sizes,
                video_times=video_times,
                return_dict=True,
                **extra,
            )
            image_features, routing, features = output.pooler_output, output.routing, output.features  # pyright: ignore[reportAttributeAccessIssue]
            if routing is not None and not adds_losses:
                self._tell_lost_losses(routing)
        visits: Visits | None = None
        slow: SlowTokens | None = None
        if self.slow_attention is not None:
            layouts, places = self.visual_layouts(image_sizes, video_times), self.image_places(input_ids, inputs_embeds)
            given = (image_features, layouts, places, position_ids)
            image_features, slow = take_slow(self.rules.layout(), self.training, inputs_embeds, past_key_values, *given)
        seen = image_features is not None and len(image_features) > 0
        laid = None
        if self.axes is not None:
            places = self.image_places(input_ids, inputs_embeds) if seen else None
            find = partial(self.visual_layouts, image_sizes, video_times)
            laid = self.axes.lay(
                inputs_embeds, position_ids, attention_mask, past_key_values, places, find, video_times
            )
            position_ids = laid.ids
        if seen:
            image_features, visits = visits_of(
                self.rules.view, self.readers, image_features, partial(self.image_places, input_ids, inputs_embeds)
            )
            inputs_embeds = self.merge_images(input_ids, inputs_embeds, image_features)
        elif self.vision_tower is not None:
            refuse_orphans(input_ids, self.config.image_token_id, past_key_values)
            if self.training and torch.is_grad_enabled():
                inputs_embeds = self._idle_pass(inputs_embeds)
                if self.readers:
                    nowhere = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
                    visits = VisualReads(nowhere, inputs_embeds.new_zeros(1, self.rules.view.beside), self.readers)
        if self.visual_places is not None:
            if seen and input_ids is None:
                raise ConfigError("modality_switch: input_ids are needed to tell visual tokens; inputs_embeds do not")
            self.visual_places.mask = input_ids == self.config.image_token_id if seen else None
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
            **({} if visits is None else visits.arguments()),
            **({} if slow is None else slow.arguments()),
        )
        if laid is not None:
            laid.remember(outputs.get("past_key_values"))
        if visits is not None:
            visits.check(self.language_model)
        if slow is not None:
            slow.check(self.language_model)
            if (cache := outputs.get("past_key_values")) is not None:
                slow.remember(cache)
        return MllmModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            routing=routing,
            features=features,
        )

    @property
    def readers(self) -> dict[int, nn.Module]:
        """Modules of the connector that run behind layers of the language model, by layer."""
        return {} if self.multi_modal_projector is None else self.multi_modal_projector.readers()  # type: ignore[operator]
