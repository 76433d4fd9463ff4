"""Which class is the multimodal model? Encoders, router and connector joined to any HF causal language model."""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import can_return_tuple  # pyright: ignore[reportPrivateImportUsage]

from mllm.heads.base import HeadParts, Reading, Step, head_losses, lay_targets
from mllm.heads.build import build_heads, drawing_head
from mllm.heads.codes.settings import DrawingMixin
from mllm.heads.probability import ProbabilityMixin
from mllm.heads.segmentation.answer import SegmentationMixin
from mllm.models.configuration_mllm import MllmConfig, head_settings, treated
from mllm.models.encoder_losses import encoder_losses_of_step
from mllm.models.generation import MultimodalGenerationMixin
from mllm.models.loss import linear_cross_entropy, without_placeholders
from mllm.models.modeling_base import MllmOutput, MllmPreTrainedModel
from mllm.models.modeling_body import MllmModel
from mllm.models.routing import routing_loss_of_step
from mllm.processing.pixel_keys import PRIMARY_PIXELS
from mllm.types import Routing


class MllmForConditionalGeneration(
    DrawingMixin, SegmentationMixin, ProbabilityMixin, MultimodalGenerationMixin, MllmPreTrainedModel
):
    """The model with its language-model head: train, generate, save, serve.

    ``model(…, labels=…).loss`` is the whole loss in training: next words, a learning router's own losses (balance, z), images that
    are drawn. A trainer that takes hidden states or logits and makes its own loss (TRL's do) learns from the words alone; for a
    router that learns this is warned of.
    """

    config_class = MllmConfig  # beside its annotation, which transformers would read as a string
    config: MllmConfig
    opens_foreign = True

    def __init__(self, config: MllmConfig):
        super().__init__(config)
        self.model = MllmModel(config)
        text = config.get_text_config()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self._no_split_modules = list(self.model._no_split_modules)
        self._is_stateful = bool(getattr(self.model.language_model, "_is_stateful", False))
        self._head = head_settings(text)
        draws = drawing_head(config.heads) is not None
        tokenizer = self.image_tokenizer if draws else None
        rules = None if config.connector is None else self.model.rules
        self.heads = build_heads(
            config.heads,
            HeadParts(text.hidden_size, config.encoder_infos(), tokenizer, layers=text.num_hidden_layers, rules=rules),
        )
        embedding = self.model.get_input_embeddings()
        name = next(n for n, m in self.model.language_model.named_modules() if m is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        self.last_routing: Routing | None = None
        """What the last ``generate`` call ran on each image; None without images or router."""
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in transformers; every id below ``new_num_tokens`` (``len(tokenizer)``) may be generated from then on.

        Args:
            new_num_tokens: rows that embedding and head get; None changes nothing.
            pad_to_multiple_of: rows are filled up to a multiple; ids of these are never generated.
            mean_resizing: new rows are drawn about the mean of those that were there.

        Returns:
            The embedding.
        """
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None and self.config.num_token_ids is not None:
            self.config.num_token_ids = new_num_tokens
        return embedding

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """Visual tokens of images, as `MllmModel.get_image_features` gives them.

        Args:
            args: pixels of the first encoder, ``(V, 3, H, W)``.
            kwargs: other encoders' pixels as ``pixel_values_<name>``, routing, sizes.

        Returns:
            ``pooler_output`` ``(B, M, L)``; a tuple of B ``(M, L)`` where images differ in M.
        """
        return self.model.get_image_features(*args, **kwargs)

    def named_parts(self) -> dict[str, list[tuple[str, nn.Module]]]:
        """Part → its modules by name: ``language_model``, ``connector``, ``router``, ``encoders.<name>`` …"""
        modules = dict(self.named_modules())
        return {
            part: [(p.rstrip("."), modules[p.rstrip(".")]) for p in prefixes if p.rstrip(".") in modules]
            for part, prefixes in self.part_prefixes().items()
        }

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits with the language model's own scaling and soft cap.

        Args:
            hidden: last hidden states ``(…, L)``.

        Returns:
            ``(…, V)``.
        """
        return treated(self.lm_head(hidden), self._head)

    def token_loss(
        self, hidden: Tensor, labels: Tensor, num_items: Any = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of the next tokens, without their logits; see `linear_cross_entropy`.

        Args:
            hidden: last hidden states ``(B, T, L)``.
            labels: ``(B, T)``; -100: nothing is learned.
            num_items: what the sum is divided by; None: the number of labels.
            position_ids: ``(B, T)``, where samples are packed: none predicts the first token of the next.

        Returns:
            A scalar in nats.
        """
        return linear_cross_entropy(
            hidden,
            self.lm_head.weight,
            labels,
            bias=getattr(self.lm_head, "bias", None),  # PEFT's wrapper for trained tokens has none
            num_items_in_batch=num_items,
            position_ids=position_ids,
            scale=self._head.get("scale", 1.0),
            softcap=self._head.get("softcap"),
        )

    def _words(
        self, hidden: Tensor, step: Step, logits_to_keep: int | Tensor, skip_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss on the next words (None without labels), and logits (None where they are skipped)."""
        if step.labels is not None and skip_logits:
            return self.token_loss(hidden, step.labels, step.num_items, step.position_ids), None
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.compute_logits(hidden[:, slice(None) if isinstance(keep, int) else keep])
        if step.labels is None:
            return None, logits
        vocabulary = self.config.get_text_config().vocab_size
        loss = self.loss_function(
            logits=logits, labels=step.labels, vocab_size=vocabulary, num_items_in_batch=step.num_items
        )
        return loss, logits

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
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        routing_targets: Tensor | None = None,
        **kwargs: Any,
    ) -> MllmOutput:
        """One pass over text and images; with labels, the whole loss in training.

        Args:
            input_ids: ``(B, T)``; each image's placeholders stand where its tokens go.
            attention_mask: ``(B, T)``, 0 for padding, or what the attention in use takes.
            position_ids: ``(B, T)``.
            past_key_values: the cache of earlier calls.
            inputs_embeds: ``(B, T, L)`` in place of input_ids.
            pixel_values: the first encoder's pixels of all views ``(V, 3, H, W)``; other encoders' come as ``pixel_values_<name>``,
                ``image_sizes`` ``(B, 2)`` beside them where the views depend on them.
            expert_weights: ``(images, E)``, fixes the routing; NaN leaves an image to the router.
            router_input_ids: ``(images, T)``, the questions that a router reads, padded with -1.
            image_features: visual tokens computed before, in place of pixels: ``(ΣM, L)`` or ``(images, M, L)``.
            labels: ``(B, T)``; -100 carries no loss, nor do placeholders of images that are read.
            logits_to_keep: logits of the last so many positions, or of these positions; 0: of all.
            skip_logits: with labels, compute the loss on supervised positions in chunks and return no logits (memory).
            routing_targets: ``(images, E)``, what the router should have chosen, as `GateRouter.supervised_loss` takes it; its loss is
                added.
            kwargs: ``num_targets``, head → what the whole optimizer step teaches it; ``target_…``, what the heads
                should answer, as `Head.targets` names it (``target_images``: pixels ``(K, 3, H, W)`` in [-1, 1] or codes ``(K, S)`` of the
                images that the spans of ``input_ids`` stand for); ``num_items_in_batch``, what sums of losses are divided by; what the
                language model takes.

        Returns:
            Loss, logits ``(B, T, V)``, cache, visual tokens and the routing that was used; ``losses`` of the heads by name.

        Raises:
            AlignmentError: placeholders and visual tokens differ in number.
            ConfigError: a target that no head of this model learns from.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        if labels is not None:
            labels, num_items = without_placeholders(labels, self.config.image_token_id, num_items)
        pixels = self.model.pixel_keys.by_encoder({**kwargs, PRIMARY_PIXELS: pixel_values})
        of_step = kwargs.pop("num_targets", None)
        step = Step(input_ids, labels, attention_mask, position_ids, num_items, of_step, inputs=kwargs, pixels=pixels)
        lay_targets(self, step)
        outputs = self.model(
            input_ids=step.input_ids,
            attention_mask=step.attention_mask,
            position_ids=step.position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            expert_weights=expert_weights,
            router_input_ids=router_input_ids,
            image_features=image_features,
            adds_losses=labels is not None,
            return_dict=True,
            **step.inputs,
        )
        loss, logits = self._words(outputs.last_hidden_state, step, logits_to_keep, skip_logits)
        losses = None
        if loss is not None:
            if outputs.routing is not None and self.training:
                loss = loss + routing_loss_of_step(self, outputs.routing, routing_targets, step.labels, step.num_items)  # pyright: ignore[reportArgumentType]
            of_heads, losses = head_losses(
                self, step, Reading(outputs.last_hidden_state, outputs.features, outputs.hidden_states)
            )
            loss = loss + of_heads
            if self.training and self.model.vision_tower is not None:
                of_encoders, named = encoder_losses_of_step(self.model.vision_tower, step)
                loss, losses = loss + of_encoders, {**(losses or {}), **named} or None
        return MllmOutput(
            loss=loss,  # pyright: ignore[reportArgumentType]
            losses=losses,
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            routing=outputs.routing,
        )
