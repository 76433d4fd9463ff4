"""Which vLLM model runs our checkpoints? The same encoders, router and connector in front of vLLM's own language
model."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from mllm.errors import CheckpointError, UnavailableError
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.pipeline import build_visual_parts
from mllm.models.position_axes import SERVED_AS, told_to_vllm
from mllm.models.routing import short_image
from mllm.models.weight_files import present_name, published_renamings
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES
from mllm.processing.pixel_keys import PRIMARY_PIXELS, PixelKeys
from mllm.processing.processor import APART
from mllm.processing.template import VIDEO
from mllm.serve.adapters import ADAPTER, SETTING
from mllm.serve.heads import READER
from mllm.serve.http.stats import Choices, EncoderClock
from mllm.serve.vllm.encoder_graphs import EncoderGraphs, compile_encoders, run_blank
from mllm.serve.vllm.feature_memory import FeatureMemory
from mllm.serve.vllm.placeholder import never_ids
from mllm.serve.vllm.positions import PositionsOfPrompts
from mllm.serve.vllm.processing import MllmDummyInputsBuilder, MllmMultiModalProcessor, MllmProcessingInfo, short_grid
from mllm.serve.vllm.refusals import refuse_unserved
from mllm.serve.vllm.served_heads import HeadsInEngine
from mllm.serve.vllm.visual_adapters import VisualAdapters
from mllm.types import VisualLayout

_log = logging.getLogger("vllm.mllm")  # below vLLM's own logger, which has a handler
_VISUAL = ("vision_tower.", "multi_modal_projector.", "heads.")
_NOT_SERVED = ("model.visual_tokenizer.", "visual_head.")


@MULTIMODAL_REGISTRY.register_processor(
    MllmMultiModalProcessor, info=MllmProcessingInfo, dummy_inputs=MllmDummyInputsBuilder
)
class MllmForConditionalGeneration(nn.Module, SupportsLoRA, SupportsMultiModal, SupportsPP, PositionsOfPrompts):
    """Encoder bank and connector as in training (`build_visual_parts`), replicated under tensor parallelism; the
    language model, with its head, is vLLM's."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    supports_encoder_tp_data = True

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return "<image>"
        if modality.startswith("video"):
            return VIDEO
        raise ValueError(f"{modality} input is not supported; only images and videos are")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: MllmConfig = vllm_config.model_config.hf_config  # type: ignore[assignment]
        self.config = config
        refuse_unserved(config)
        told_to_vllm(config.text_config)
        self.pixel_keys = PixelKeys(config.encoders)
        self.rules = config.layout_rules()
        self.short_grid = short_grid(config) if (config.router or {}).get("type") == "language_model" else None
        self.vision_tower: Any
        self.multi_modal_projector: Any
        self.language_model: Any
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_id or 0])
        with self._mark_tower_model(vllm_config, "image"):
            bank, connector = build_visual_parts(config)
            assert bank is not None and connector is not None
            self.vision_tower = bank.to(vllm_config.model_config.dtype)
            self.multi_modal_projector = connector.to(vllm_config.model_config.dtype)
        mode = vllm_config.model_config.multimodal_config.mm_encoder_tp_mode  # type: ignore[union-attr]
        self.shares_images = mode == "data" and get_tensor_model_parallel_world_size() > 1
        if self.shares_images and self.rules.needs_size:
            raise UnavailableError(
                f"--mm-encoder-tp-mode data shares out whole pictures; this model's views ({self.rules.views.type}) differ from "
                "picture to picture. Leave it at weights"
            )
        self.memories: dict[int, FeatureMemory] = {}
        more = vllm_config.additional_config
        self.adapter_folders: dict[str, str] | None = more.get(SETTING) if isinstance(more, dict) else None
        settings = vllm_config.compilation_config
        graphs = settings.cudagraph_mm_encoder or (
            os.environ.get("MLLM_ENCODER_GRAPHS") != "0" and not self.adapter_folders
        )
        self.uses_graphs = torch.cuda.is_available() and graphs and not vllm_config.model_config.enforce_eager
        compiled = settings.compile_mm_encoder and not vllm_config.model_config.enforce_eager
        parts = {"vision_tower": self.vision_tower, "multi_modal_projector": self.multi_modal_projector}
        parts = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        self.adapters = VisualAdapters(parts, frozen=self.uses_graphs or compiled)
        if self.adapter_folders is not None:
            # `mllm serve` says which these are; else vLLM would leave these weights out without a word.
            self.lora_skip_prefixes: list[str] | None = list(_VISUAL)
        self.choices = Choices()
        self.clock = EncoderClock()
        for name, encoder in getattr(self.vision_tower, "encoders", {}).items():
            self.clock.watch(name, encoder)
        self.clock.watch("connector", self.multi_modal_projector)
        self._prepare_encoders = self._encoder_preparation(vllm_config)
        reads = READER in (getattr(vllm_config.model_config, "logits_processors", None) or ())
        reads = reads and hasattr(self.vision_tower, "encoders")  # vLLM leaves it out where images are switched off
        self.heads_in_engine = HeadsInEngine(config, self.vision_tower.infos) if reads else None
        self.heads = nn.ModuleDict() if self.heads_in_engine is None else self.heads_in_engine.modules
        self.heads.to(vllm_config.model_config.dtype).eval()
        if torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
            # This process only stacks pixels on the CPU; with a thread per core one stack took 40 to 120 ms on 16 cores,
            # while the GPU waited (H200, vLLM 0.26).
            torch.set_num_threads(1)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=language_architectures(config.text_config),
            )
        self.never = never_ids(config) if vllm_config.speculative_config is not None else []
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def _encoder_preparation(self, vllm_config: VllmConfig) -> list[Callable[[], object]]:
        """What is to be done before the first request, once weights are there: reading adapters, what vLLM's
        ``compile_mm_encoder`` asks for, and on a GPU CUDA graphs of the encoders and a pass of the most images that one step
        encodes."""
        encoders = dict(getattr(self.vision_tower, "encoders", {}))
        settings, eager = vllm_config.compilation_config, vllm_config.model_config.enforce_eager
        if not encoders or not get_pp_group().is_first_rank:
            return []
        adapters = (self.adapter_folders or {}).items()
        todo: list[Callable[[], object]] = [
            partial(self.add_adapter, int(number), folder) for number, folder in adapters
        ]
        largest = self.rules.layout(self.rules.largest())
        tokens = largest.num_tokens if self.short_grid is None else math.prod(self.short_grid)
        scheduler, media = vllm_config.scheduler_config, vllm_config.model_config.multimodal_config
        pictures = scheduler.max_num_seqs * (media.get_limit_per_prompt("image") if media is not None else 1)
        most = max(1, min(scheduler.max_num_batched_tokens // tokens, pictures)) * largest.num_views
        if settings.compile_mm_encoder and not eager:
            compile_encoders(encoders)
            todo.append(partial(run_blank, encoders, (2, 1)))  # one image is a case of its own for the compiler
        if torch.cuda.is_available():
            if self.uses_graphs:
                graphs = EncoderGraphs(encoders, most)
                todo.append(partial(self._capture_encoders, graphs, settings.cudagraph_mm_encoder))
            todo.append(partial(run_blank, encoders, (most,)))
        return todo

    def _capture_encoders(self, graphs: EncoderGraphs, required: bool) -> None:
        """Two encoders' kernels for a lone picture take the CPU 13 ms to launch, a graph of each 4 (H200)."""
        for name, reason in graphs.install(required).items():
            _log.warning("Encoder %s %s; it runs without", name, reason)

    @torch.inference_mode()
    def _get_encoders_ready(self) -> None:
        """vLLM's memory profile is the first to come here, with the language model alone (model runner V2) or with
        images: what the encoders hold and need is counted, and no request waits for them."""
        started = time.perf_counter()
        while self._prepare_encoders:
            self._prepare_encoders.pop(0)()
        _log.info("Encoders made ready in %.1f s", time.perf_counter() - started)

    @torch.inference_mode()  # always: requests run in it, and a profiling run outside it makes compiled encoders compile twice
    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """Visual tokens, one ``(M, L)`` tensor per image (``(m, L)`` in a routing request)."""
        if self._prepare_encoders:
            self._get_encoders_ready()
        if kwargs.get(APART + VIDEO_TIMES) is not None:
            found = {key: value for key, value in kwargs.items() if key.startswith(APART)}
            return self._embed_videos({key.removeprefix(APART): value for key, value in found.items()})
        if kwargs.get(PRIMARY_PIXELS) is None:
            return []
        layouts = self._picture_layouts(kwargs)
        join = _stacked if layouts is None else _end_to_end
        pixels = {name: join(value) for name, value in self.pixel_keys.by_encoder(kwargs).items()}
        adapters = _numbers(kwargs.get(ADAPTER))
        weights = None if kwargs.get("expert_weights") is None else _stacked(kwargs["expert_weights"])
        text = self._question_summary(kwargs.get("router_input_ids"))
        keys = None if kwargs.get("picture_key") is None else _stacked(kwargs["picture_key"]).flatten().tolist()
        if layouts is not None:
            joined = self._encode(pixels, weights, text, [], layouts, keys, adapters)
            return list(joined.split([layout.num_placeholders for layout in layouts]))
        count = len(pixels[next(iter(pixels))])
        short = self._routing_pass(kwargs.get("routing_pass"), count)
        rows = self._own_rows(count)
        if rows is None:
            tokens = self._of_images(self._encode(pixels, weights, text, short, None, keys, adapters), count)
        else:
            own = {name: value[rows] for name, value in pixels.items()}
            own_weights, own_text = (None if value is None else value[rows] for value in (weights, text))
            own_keys = None if keys is None else [keys[row] for row in rows]
            own_adapters = adapters and [adapters[row] for row in rows]
            own_short = [short[row] for row in rows]
            part = self._encode(own, own_weights, own_text, own_short, None, own_keys, own_adapters)
            tokens = self._of_images(
                tensor_model_parallel_all_gather(part.contiguous(), dim=0),
                len(rows) * get_tensor_model_parallel_world_size(),
            )[:count]
        for index in [row for row, flag in enumerate(short) if flag]:
            assert self.short_grid is not None
            tokens[index] = short_image(tokens[index][None], self.rules.view, self.short_grid)[0]
        return tokens

    def _picture_layouts(self, inputs: dict[str, Any]) -> list[VisualLayout] | None:
        """How each picture lies in the sequence; None where all lie alike, in one view."""
        if self.rules.needs_size:
            return self.rules.layouts(_stacked(inputs[IMAGE_SIZES]).flatten(0, -2))
        if self.rules.view.frames > 1:  # a picture is as many equal frames
            return [self.rules.layout()] * (len(_end_to_end(inputs[PRIMARY_PIXELS])) // self.rules.view.frames)
        return None

    def _embed_videos(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Visual tokens of every video, all its frames together: ``(ΣM, L)``."""
        rows = inputs[VIDEO_TIMES]
        frames = [int(row.ge(0).sum()) for row in (rows.flatten(0, -2) if isinstance(rows, Tensor) else rows)]
        layouts = [self.rules.video_layout(count) for count in frames]
        pixels = {name: _end_to_end(value) for name, value in self.pixel_keys.by_encoder(inputs).items()}
        joined = self._encode(pixels, None, None, [], layouts, None, _numbers(inputs.get(ADAPTER)))
        return list(joined.split([layout.num_placeholders for layout in layouts]))

    def _encode(
        self,
        pixels: dict[str, Tensor],
        weights: Tensor | None,
        text: Tensor | None,
        short: list[bool],
        layouts: list[VisualLayout] | None = None,
        keys: list[int] | None = None,
        adapters: list[int] | None = None,
    ) -> Tensor:
        """Encoders, router and connector, as `MllmModel.encode_images`: ``(ΣM, L)``. keys: by which each picture's routing is
        remembered; adapters: by which number each picture's adapter is known, 0 for none."""
        if adapters is None or not any(adapters):
            return self._encode_alike(pixels, weights, text, short, layouts, keys)
        tokens = self.rules.view.num_tokens
        encode = self._encode_alike
        return self.adapters.encode(encode, adapters, pixels, weights, text, short, layouts, keys, tokens)

    def _encode_alike(
        self,
        pixels: dict[str, Tensor],
        weights: Tensor | None,
        text: Tensor | None,
        short: list[bool],
        layouts: list[VisualLayout] | None = None,
        keys: list[int] | None = None,
        adapter: int = 0,
    ) -> Tensor:
        """`_encode` of pictures that have one adapter, which is applied."""
        base = None
        if self.short_grid is not None:
            if adapter not in self.memories:
                self.memories[adapter] = FeatureMemory(self.vision_tower)
            base = self.memories[adapter].encode(pixels, keep=short)
        features, routing = self.vision_tower(pixels, expert_weights=weights, text=text, base=base, layouts=layouts)
        if keys is not None and routing is not None and any(free := free_keys(keys, weights)):
            self.choices.keep(free, routing)
        parameter = next(self.multi_modal_projector.parameters(), None)
        if parameter is not None:
            for feature in features.values():
                feature.tokens = feature.tokens.to(parameter.device, parameter.dtype)
        return self.multi_modal_projector(features, routing, text, layouts)

    def _of_images(self, tokens: Tensor, count: int) -> list[Tensor]:
        """Visual tokens ``(ΣM, L)`` of images that are alike, image by image."""
        return list(tokens.view(count, self.rules.view.num_tokens, tokens.shape[-1]))

    def _own_rows(self, count: int) -> list[int] | None:
        """Images that this rank encodes under ``--mm-encoder-tp-mode data`` (the last one repeated where they do not
        divide evenly); None: all of them."""
        if not self.shares_images:
            return None
        ranks = get_tensor_model_parallel_world_size()
        each = -(-count // ranks)
        first = get_tensor_model_parallel_rank() * each
        return [min(first + number, count - 1) for number in range(each)]

    def _routing_pass(self, flags: Any, num_images: int) -> list[bool]:
        """Per image, whether it belongs to the routing request of a ``language_model`` router."""
        if flags is None or self.short_grid is None:
            return [False] * num_images
        return [bool(flag) for flag in _stacked(flags).flatten().tolist()]

    def _question_summary(self, questions: Any) -> Tensor | None:
        """Mean embedding ``(B, L)`` of the questions; ids padded with -1. As `MllmModel._question_summary`, by the embedding without
        adapters: the layer that applies them counts on the tokens of the step, and these are none of them."""
        if questions is None:
            return None
        rows = [row.reshape(-1) for item in questions for row in (item if item.ndim > 1 else [item])]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        real = ids.ge(0).unsqueeze(-1)
        with _without_adapters(getattr(self.language_model, "model", None)):
            flat = self.get_language_model().embed_input_ids(ids.clamp(min=0).flatten())
        embeddings = flat.view(*ids.shape, -1)
        return (embeddings * real).sum(1) / real.sum(1).clamp(min=1)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._prepare_encoders:
            self._get_encoders_ready()
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """As the language model's. Beside speculative decoding, which takes no `PlaceholderProcessor`, the ids that no answer
        holds are forbidden here; the log-probabilities are then those of what may be written."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None and self.heads_in_engine is not None:
            self.heads_in_engine.see(hidden_states, logits)
        if logits is not None and self.never:
            logits[..., self.never] = -torch.inf
        return logits

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint as `save_pretrained` wrote it. Raises `CheckpointError` naming a visual weight that has
        no place or another shape; vLLM itself checks that nothing is missing."""
        loaded: set[str] = set()
        rest = self._load_visual(weights, loaded)
        return AutoWeightsLoader(self).load_weights(rest, mapper=self.hf_to_vllm_mapper) | loaded

    def _load_visual(self, weights: Iterable[tuple[str, Tensor]], loaded: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Copy encoders', router's and connector's tensors (buffers too) into place; hand on all others."""
        places = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(_VISUAL)}
        renamings = published_renamings(self)
        for original, tensor in weights:
            name = original.removeprefix("model.")
            if original.startswith(_NOT_SERVED) or (".lora_" in original and name not in places):
                continue  # not used here, or an adapter file that vLLM finds beside the merged model
            if not name.startswith(_VISUAL):
                yield original, tensor
                continue
            served = places and (not name.startswith("heads.") or name.split(".")[1] in self.heads)
            if (
                not served
            ):  # images are switched off (limit 0) and vLLM left the modules out, or a head that no answer comes from
                continue
            if name not in places:
                name = present_name(name, renamings)
            place = places.get(name)
            if place is None:
                raise CheckpointError(f"weight {original!r} has no place in the encoders and connector of this config")
            if place.shape != tensor.shape:
                raise CheckpointError(
                    f"weight {original!r} has shape {tuple(tensor.shape)}, this config needs {tuple(place.shape)}"
                )
            place.copy_(tensor)
            loaded.add(name)

    def add_adapter(self, number: int, folder: str) -> None:
        """Read an adapter's weights on encoders and connector, by whose ``number`` pictures ask for it."""
        self.adapters.add(number, folder)

    def remove_adapter(self, number: int) -> None:
        """Forget it."""
        self.adapters.remove(number)
        self.memories.pop(number, None)


def language_architectures(text_config: Any) -> list[str]:
    """The language model's class names for vLLM: those of its config, else HF's class for its type. Of a text part of another model, whose
    config names that, the class of the same layers."""
    if served := SERVED_AS.get(text_config.model_type):
        return [served]
    if text_config.architectures:
        return list(text_config.architectures)
    try:
        return [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]]
    except KeyError:
        raise UnavailableError(
            f"text_config.model_type: vLLM has no causal language model for {text_config.model_type!r}; try its "
            "Transformers backend (--model-impl transformers)"
        ) from None


def _end_to_end(value: Tensor | list[Tensor]) -> Tensor:
    """``(V, 3, H, W)`` or patches ``(N, 3 p²)``: the views of all images, whether vLLM hands over a tensor or a list of
    images."""
    rows = [value] if isinstance(value, Tensor) else list(value)
    return torch.cat([row.flatten(0, 1) if row.ndim in (3, 5) else row for row in rows])


def _stacked(value: Tensor | list[Tensor]) -> Tensor:
    """``(B, …)`` whether vLLM hands over a tensor or a list of rows."""
    return value if isinstance(value, Tensor) else torch.stack(list(value))


def free_keys(keys: list[int], weights: Tensor | None) -> list[int]:
    """The keys of pictures that the router decides about; 0 for those whose experts the request fixed (weights ``(B, E)``, NaN where
    it did not): the same picture may be asked about both ways, and only the router's word is asked for later."""
    if weights is None:
        return keys
    fixed = weights.isnan().any(dim=-1).logical_not().tolist()
    return [0 if is_fixed else key for key, is_fixed in zip(keys, fixed, strict=True)]


def _numbers(value: Any) -> list[int] | None:
    """One number for each picture."""
    return None if value is None else _stacked(value).flatten().tolist()


@contextmanager
def _without_adapters(body: nn.Module | None) -> Iterator[None]:
    """The body's token embedding as it was before vLLM wrapped it for adapters."""
    wrapped = getattr(body, "embed_tokens", None)
    plain = getattr(wrapped, "base_layer", None)
    if body is None or wrapped is None or plain is None:
        yield
        return
    body.embed_tokens = plain
    try:
        yield
    finally:
        body.embed_tokens = wrapped
