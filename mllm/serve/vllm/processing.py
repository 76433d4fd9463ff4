"""How do a request's pictures and prompt become the native vLLM model's inputs?

Only what is the same in vLLM 0.26 to 0.33 is overridden, and nothing that moved between modules is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, VideoProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.routing import routing_grid
from mllm.processing.engine_videos import MODALITY as VIDEOS
from mllm.processing.engine_videos import VIDEO_ID, unpack
from mllm.processing.images import beside_pixels, load_image
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules
from mllm.processing.panels import as_panels
from mllm.processing.pixel_keys import PRIMARY_PIXELS, PixelKeys
from mllm.processing.processor import APART, MllmProcessor
from mllm.processing.questions import pad_questions
from mllm.processing.template import VIDEO
from mllm.routers.build import build_router
from mllm.routers.fixed import fixed_weights_of
from mllm.serve.adapters import ADAPTER
from mllm.serve.http.stats import picture_key
from mllm.serve.vllm.questions import QuestionReader
from mllm.serve.vllm.videos import mark_videos, packed
from mllm.types import VisualLayout

MODALITY = "image"


def short_grid(config: MllmConfig) -> tuple[int, int]:
    """Rows and columns of an image in a routing request of a ``language_model`` router."""
    return routing_grid(config.view_layout(), build_router(dict(config.router or {}), 0, 0))


class MllmProcessingInfo(BaseProcessingInfo):
    """What vLLM may ask about the model's inputs."""

    def get_hf_config(self) -> MllmConfig:  # type: ignore[override]
        return self.ctx.get_hf_config(MllmConfig)

    def get_hf_processor(self, **kwargs: object) -> MllmProcessor:  # type: ignore[override]
        """The checkpoint's processor. A request's settings go to the call, not here: vLLM would load and keep one
        processor per distinct setting."""
        return self.ctx.get_hf_processor(MllmProcessor)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {MODALITY: None, **({VIDEOS: None} if self.takes_video else {})}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        most = {MODALITY: self.rules.layout(self.rules.largest()).num_tokens}
        if self.takes_video:
            most[VIDEOS] = self.longest_video()
        return most

    @property
    def takes_video(self) -> bool:
        """Whether a request may hold videos: where the model takes them, and this vLLM hands on a prompt's tokens alone."""
        return self.rules.video is not None and hasattr(BaseMultiModalProcessor, "_get_hf_mm_inputs")

    def longest_video(self) -> int:
        """Most tokens of a video, the text before its frames included."""
        spec, processor = self.rules.video, self.get_hf_processor()
        assert spec is not None
        late = [round(spec.max_seconds * 1000) - 1] * spec.most
        return self.rules.timed_layout(late, processor.write).num_tokens

    @cached_property
    def rules(self) -> LayoutRules:
        """How an image is looked at and lies in the prompt."""
        return self.get_hf_config().layout_rules()

    @cached_property
    def asks_language_model(self) -> bool:
        """Whether the language model routes, by answering a request of its own."""
        return (self.get_hf_config().router or {}).get("type") == "language_model"

    @cached_property
    def num_short_tokens(self) -> int | None:
        """Placeholder tokens of one image in a routing request; None for models that make none."""
        if not self.asks_language_model:
            return None
        rows, cols = short_grid(self.get_hf_config())
        return rows * cols

    @cached_property
    def question_reader(self) -> QuestionReader | None:
        """For models whose router or connector may look at the question."""
        processor = self.get_hf_processor()
        return QuestionReader(processor) if processor.image_processor.experts else None


class MllmDummyInputsBuilder(BaseDummyInputsBuilder[MllmProcessingInfo]):
    """Pictures for memory profiling."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        pictures = self.info.get_hf_processor().image_token * mm_counts.get(MODALITY, 0)
        return pictures + VIDEO * mm_counts.get(VIDEOS, 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any, *args: Any, **kwargs: Any
    ) -> Any:
        specs = self.info.get_hf_processor().image_processor.specs.values()
        rules = self.info.rules
        height, width = max(spec.height for spec in specs), max(spec.width for spec in specs)
        if rules.needs_size:
            height, width = rules.largest()
        more: dict[str, Any] = {}
        if mm_counts.get(VIDEOS, 0) and rules.video is not None:
            film = np.zeros((rules.video.most, height, width, 3), dtype=np.uint8)
            more[VIDEOS] = [(film, {"fps": rules.video.fps or 1.0})] * mm_counts[VIDEOS]
        panels = max(spec.panels for spec in specs)
        pictures = self._get_dummy_images(
            width=width,
            height=height if panels == 1 else -(-height // panels) * panels,
            num_images=mm_counts.get(MODALITY, 0),
            overrides=mm_options.get(MODALITY) if mm_options and panels == 1 else None,
        )
        return {**more, MODALITY: pictures if panels == 1 else [as_panels(picture, panels) for picture in pictures]}


def read_as_in_training(items: Any) -> None:
    """Decode pictures again by our own rules where vLLM already made them RGB by its own: palettes, alpha, CMYK and 16
    bits would look otherwise."""
    for index, item in enumerate(getattr(items, "data", ())):
        encoded = getattr(item, "original_bytes", None)
        if encoded is None:
            continue
        with Image.open(BytesIO(encoded)) as header:
            original = header.mode
        if item.media.mode != original:
            item.media = load_image(encoded, where=f"image {index}", max_pixels=None)


def with_items(inputs: Any, modality: str, items: Any) -> Any:
    """A request with other items of a modality."""
    return replace(inputs, mm_data_items=MultiModalDataItems({**inputs.mm_data_items, modality: items}))


def told_apart(items: Any) -> Any:
    """Pictures as `PictureItems`; embeddings that a request brings as they are."""
    return PictureItems(items.data) if type(items) is ImageProcessorItems else items


class PictureItems(ImageProcessorItems):
    """A request's pictures, told apart by all that decides how they are seen. vLLM knows one that came as no file by its values alone:
    a picture of other panels, or turned otherwise, would get the answer of the first."""

    def get_item_for_hash(self, index: int) -> Any:
        item: Any = self.data[index]
        beside = beside_pixels(item) if isinstance(item, Image.Image) else {}
        return {"picture": item, "beside": repr(beside)} if beside else item


class MllmMultiModalProcessor(BaseMultiModalProcessor[MllmProcessingInfo]):
    """Pixels of every encoder as one batched field each; routing and question as fields beside them.

    A request's ``mm_processor_kwargs={"experts": […]}`` fixes its routing. vLLM shares an image's visual tokens
    between requests by a hash over the image and these settings, so two routings never mix; the question's token ids,
    which a learned router reads, are put among the settings for the same reason.
    """

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        count = inputs.mm_data_items.get_all_counts().get(MODALITY, 0)
        inputs = self.with_videos(inputs)
        self._check_placeholders(inputs.prompt, count)
        if count:
            read_as_in_training(inputs.mm_data_items[MODALITY])
            inputs = with_items(inputs, MODALITY, told_apart(inputs.mm_data_items[MODALITY]))
        if self.info.question_reader is not None and count:
            inputs = replace(inputs, hf_processor_mm_kwargs=self.with_routing(inputs, count))
        share = self.info.rules.share(count)
        if share:  # among the settings, which the hash of an image is made of
            settings = {**inputs.hf_processor_mm_kwargs, "visual_tokens": share}
            inputs = replace(inputs, hf_processor_mm_kwargs=settings)
        return super().apply(inputs, *args, **kwargs)

    def with_videos(self, inputs: Any) -> Any:
        """A request's videos in the form in which they go on, each with one id of its own in the prompt. Raises `AlignmentError`."""
        found: Any = inputs.mm_data_items.get(VIDEOS)
        if not found:
            return inputs
        processor = self.info.get_hf_processor()
        marked = mark_videos(processor.tokenizer, inputs.prompt, processor.image_token, int(processor.image_token_id))
        places = marked.count(VIDEO_ID)
        if places != len(found):
            raise AlignmentError(f"{places} places of videos in the prompt ({VIDEO}) and {len(found)} videos")
        metadata = getattr(found, "metadata", None)
        metadata = metadata if isinstance(metadata, list) else [metadata] * len(found)
        items = VideoProcessorItems([packed(item, its) for item, its in zip(found.data, metadata, strict=True)])
        return with_items(replace(inputs, prompt=marked), VIDEOS, items)

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        """The processor is given videos as training gives them."""
        made: Any = super()._get_hf_mm_inputs(mm_items, hf_kwargs)
        if "videos" in made.hf_data:
            made.hf_data["videos"] = [unpack(item) for item in made.hf_data["videos"]]
        return made

    def _call_hf_processor(self, *args: Any, **kwargs: Any) -> Any:
        """What is wrong with a picture or a video, in our words; vLLM's own say only that a processor failed."""
        plain = [_without_adapter(argument) for argument in args]
        try:
            return super()._call_hf_processor(*plain, **{name: _without_adapter(one) for name, one in kwargs.items()})
        except ValueError as error:
            if isinstance(error.__cause__, DataError):
                raise error.__cause__ from None
            raise

    def with_routing(self, inputs: Any, num_images: int) -> dict[str, Any]:
        """A request's settings with its questions, and with a fixed routing written out image by image. Raises
        `ConfigError` for a routing that names no expert of this model, or is missing where the engine cannot decide
        it."""
        nested = dict(inputs.hf_processor_mm_kwargs.get("images_kwargs") or {})
        settings = {**inputs.hf_processor_mm_kwargs, **nested}
        settings.pop("images_kwargs", None)
        assert self.info.question_reader is not None
        questions = self.info.question_reader(inputs.prompt, num_images)
        settings["router_input_ids"] = pad_questions(questions).numpy()  # an array: hashed at once
        settings["routing_pass"] = bool(settings.get("routing_pass", False))
        settings["picture_key"] = np.array(self._picture_keys(inputs, num_images), dtype=np.int64)
        pool = self.info.get_hf_processor().image_processor.experts
        weights = fixed_weights_of(settings.get("experts"), pool, num_images)
        if (
            self.info.asks_language_model
            and not settings["routing_pass"]
            and weights.isnan().any()
            and self._is_real(inputs.prompt)
        ):
            raise ConfigError(
                "this model's language model routes by answering first, which takes two requests: use `mllm serve`, "
                'which makes both, or fix the routing with mm_processor_kwargs={"experts": […]}'
            )
        free = weights.isnan().any(dim=-1).tolist()
        rows = [None if f else dict(zip(pool, row, strict=True)) for f, row in zip(free, weights.tolist(), strict=True)]
        settings["experts"] = None if all(free) else rows
        return settings

    def _picture_keys(self, inputs: Any, num_images: int) -> list[int]:
        """By what a server asks later who looked (`mllm.serve.http.stats`): the file and what was asked about it; 0 for a
        picture that is no file."""
        assert self.info.question_reader is not None
        files = [getattr(item, "original_bytes", None) for item in getattr(inputs.mm_data_items[MODALITY], "data", ())]
        questions = self.info.question_reader.texts(inputs.prompt, num_images)
        files += [None] * (num_images - len(files))
        adapter = int(inputs.hf_processor_mm_kwargs.get(ADAPTER, 0))
        return [0 if file is None else picture_key(file, question, adapter) for file, question in zip(files, questions)]

    def _check_placeholders(self, prompt: str | Sequence[int], num_images: int) -> None:
        """Raise `AlignmentError` where a prompt lost placeholders (a truncated one does); vLLM itself would call it
        its own mistake."""
        processor = self.info.get_hf_processor()
        mark = processor.image_token if isinstance(prompt, str) else processor.image_token_id
        found = prompt.count(mark)  # type: ignore[arg-type]
        if found < num_images:
            raise AlignmentError(f"{found} image placeholders in the prompt and {num_images} images")

    def _is_real(self, prompt: str | Sequence[int]) -> bool:
        """Whether a prompt holds anything but placeholders: those that vLLM makes up for profiling do not."""
        processor = self.info.get_hf_processor()
        if isinstance(prompt, str):
            return bool(prompt.replace(processor.image_token, "").strip())
        return any(token != processor.image_token_id for token in prompt)

    def _cached_apply_hf_processor(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Past vLLM's cache of processed images where the processor is given one question per image: on a partial hit
        the cache hands over the missing images only, and image k would get another image's question."""
        if "router_input_ids" in inputs.hf_processor_mm_kwargs:
            return self._apply_hf_processor(inputs, *args, **kwargs)
        return super()._cached_apply_hf_processor(inputs, *args, **kwargs)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        pixels, rules = PixelKeys(self.info.get_hf_config().encoders), self.info.rules
        names = [*pixels.values(), "expert_weights", "router_input_ids", "routing_pass", "picture_key"]
        fields = {name: MultiModalFieldConfig.batched(MODALITY) for name in names}
        # What says how a visual lies: vLLM leaves nothing else of one whose tokens it has, and positions are counted by it.
        fields[IMAGE_SIZES] = MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True)

        def lay_out(prefix: str, modality: str, layouts: Sequence[VisualLayout]) -> None:
            """As many rows of pixels for each visual as it has views."""
            for name, key in pixels.items():
                rows = torch.tensor([layout.rows_of(name) for layout in layouts])
                fields[prefix + key] = MultiModalFieldConfig.flat_from_sizes(modality, rows)

        if rules.needs_size and IMAGE_SIZES in hf_inputs:
            lay_out("", MODALITY, rules.layouts(hf_inputs[IMAGE_SIZES]))
        elif rules.view.frames > 1 and PRIMARY_PIXELS in hf_inputs:
            lay_out("", MODALITY, [rules.layout()] * (len(hf_inputs[PRIMARY_PIXELS]) // rules.view.frames))
        if APART + VIDEO_TIMES in hf_inputs:
            frames = hf_inputs[APART + VIDEO_TIMES].ge(0).sum(-1).tolist()
            fields[APART + VIDEO_TIMES] = MultiModalFieldConfig.batched(VIDEOS, keep_on_cpu=True)
            lay_out(APART, VIDEOS, [rules.video_layout(count) for count in frames])
        adapter: Any = hf_processor_mm_kwargs.get(ADAPTER, 0)  # the processor knows nothing of it
        for prefix, modality, count in (
            ("", MODALITY, _count_of(hf_inputs, rules)),
            (APART, VIDEOS, len(hf_inputs.get(APART + VIDEO_TIMES, ()))),
        ):
            if count:
                hf_inputs[prefix + ADAPTER] = torch.full((count,), adapter, dtype=torch.long)
                fields[prefix + ADAPTER] = MultiModalFieldConfig.batched(modality)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        token = self.info.get_hf_processor().image_token_id
        short = bool(hf_processor_mm_kwargs.get("routing_pass"))
        rules, few = self.info.rules, self.info.num_short_tokens

        def tokens(number: int) -> Any:
            if short and few is not None:
                return [token] * few
            size = out_mm_kwargs[MODALITY][number][IMAGE_SIZES].data.tolist() if rules.needs_size else None
            layout = rules.layout() if size is None else rules.layouts([size])[0]
            ids = _ids_of(layout, token)
            return PromptUpdateDetails.select_token_id(ids, token) if layout.literals else ids

        def film_tokens(number: int) -> Any:
            times = out_mm_kwargs[VIDEOS][number][APART + VIDEO_TIMES].data.tolist()
            layout = rules.timed_layout([int(time) for time in times if time >= 0], self.info.get_hf_processor().write)
            return PromptUpdateDetails.select_token_id(_ids_of(layout, token), token)

        updates = [PromptReplacement(modality=MODALITY, target=[token], replacement=tokens)]
        if out_mm_kwargs.get(VIDEOS):
            film = PromptReplacement(modality=VIDEOS, target=[VIDEO_ID], replacement=film_tokens)
            updates.append(film)
        return updates


def _count_of(hf_inputs: Any, rules: LayoutRules) -> int:
    """How many pictures the processor was given."""
    if PRIMARY_PIXELS not in hf_inputs:
        return 0
    if rules.needs_size:
        return len(hf_inputs[IMAGE_SIZES])
    return len(hf_inputs[PRIMARY_PIXELS]) // max(1, rules.view.frames)


def _without_adapter(argument: Any) -> Any:
    """An argument of the processor's call, without the setting that is none of the processor's."""
    if not isinstance(argument, Mapping) or ADAPTER not in argument:
        return argument
    return {name: value for name, value in argument.items() if name != ADAPTER}


def _ids_of(layout: VisualLayout, token: int) -> list[int]:
    """The ids of a visual: its placeholder, and the vocabulary's tokens between."""
    return [i for block in layout.blocks for i in (block.ids or [token] * block.num_tokens)]
