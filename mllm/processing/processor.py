"""How do text and images become model inputs in one call?"""

# transformers' and torch's own annotations (FloatTensor outputs, Tensor | Module attributes) do not fit their documented use.

# No `from __future__ import annotations`: transformers reads the kwargs class's annotations as types, not strings.

from typing import Any, Unpack

from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from mllm.config import to_plain
from mllm.damage import opening
from mllm.door import AUTO_MAP, SavesDoor
from mllm.errors import AlignmentError, ConfigError
from mllm.processing.frames import VideoSpec
from mllm.processing.geometry_spec import GeometrySpec
from mllm.processing.image_processor import MllmImagesKwargs
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules
from mllm.processing.masks import apply_template
from mllm.processing.pixel_keys import PixelKeys
from mllm.processing.segments import SegmentSpec
from mllm.processing.settings_in_call import refuse_unread
from mllm.processing.template import is_wrapped, wrap
from mllm.processing.video_text import flat_visuals, join_videos, layout_in_call, marks_video, stamped, write_stamps
from mllm.processing.visual_span import IGNORE, VisualSpan
from mllm.types import Video, VisualLayout

APART = "videos_"
"""Before the keys of videos that a processor was given without text: they stand in no order among its pictures."""


class MllmProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MllmImagesKwargs  # type: ignore[misc]
    _defaults = {  # pyright: ignore[reportGeneralTypeIssues]
        "text_kwargs": {"padding": False, "return_mm_token_type_ids": False, "return_text_replacement_offsets": False},
    }


class MllmBatch(BatchFeature):
    """What the processor returns. ``labels`` put into it (TRL's collators copy ``input_ids``) never hold a placeholder: an
    image that is read is not learned, by whatever trainer counts the labels."""

    placeholder: int | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "labels" and isinstance(value, Tensor) and self.placeholder is not None:
            value = value.masked_fill(value == self.placeholder, IGNORE)
        super().__setitem__(key, value)


class MllmProcessor(SavesDoor, ProcessorMixin):
    """Tokenizer and image processor of one model: ``processor(text=…, images=…)``, chat template, token counts.

    It pads on the left, as generation needs; training states its own side.

    visual_span: how an image that the model draws lies in the text (`VisualSpan`), where it draws any; template_options: values
    of the chat template's own variables (``{"enable_thinking": False}``), kept inside the saved template; segment_spec: how masks lie on
    what the model sees (`SegmentSpec`), where it answers with any; geometry_spec: which poses and depth maps its heads learn from
    (`GeometrySpec`).
    """

    valid_processor_kwargs = MllmProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        visual_span: Any = None,
        template_options: Any = None,
        segment_spec: Any = None,
        geometry_spec: Any = None,
        **kwargs: Any,
    ):
        self.segment_spec = None if segment_spec is None else to_plain(segment_spec)
        self.geometry_spec = None if geometry_spec is None else to_plain(geometry_spec)
        self.visual_span = None if visual_span is None else to_plain(visual_span)
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ConfigError(
                f"the tokenizer has no token {image_token!r}; add it as a special token before the processor is made"
            )
        template = chat_template or getattr(tokenizer, "chat_template", None)
        self.template_options = dict(template_options or {})
        if getattr(image_processor, "video", None) is not None:
            self._check_stamp(image_processor.rules.video, tokenizer)
        if isinstance(template, str) and not is_wrapped(template):
            takes_video = getattr(image_processor, "video", None) is not None
            template = wrap(tokenizer, template, image_token, self.template_options, video=takes_video)
        super().__init__(image_processor, tokenizer, chat_template=template)
        tokenizer.chat_template = template
        tokenizer.padding_side = "left"
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a file that is damaged, or missing without a word, raises `CheckpointError` with its name."""
        with opening(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _check_stamp(self, video: VideoSpec, tokenizer: Any) -> None:
        """Raises `ConfigError` for text before frames that holds a token by which pictures or turns are told."""
        special = {self.image_token_id, *tokenizer.all_special_ids}
        for text in video.stamps([0]):
            for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
                if number in special:
                    raise ConfigError(
                        f"model.video.stamp: {video.stamp!r} holds the token {tokenizer.convert_ids_to_tokens(number)!r}, which is no text"
                    )

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Unpack[ProcessingKwargs],  # vLLM reads this annotation
    ) -> MllmBatch:
        refuse_unread(kwargs, audio)
        if isinstance(text, (list, tuple)) and not text:
            raise AlignmentError("text is an empty list; give at least one prompt")
        if text is None and videos is not None and flat_visuals(videos):
            return self._without_text(images, videos)
        if (videos is not None and flat_visuals(videos)) or (self.takes_video and marks_video(text)):
            text, images = join_videos(text, images, videos, self.image_token, takes=self.takes_video)
        batch = MllmBatch(super().__call__(images=images, text=text, audio=audio, **kwargs))  # pyright: ignore[reportArgumentType]
        batch.placeholder = self.image_token_id
        if VIDEO_TIMES in batch and "input_ids" in batch:
            write_stamps(self, batch)
        return batch

    def _without_text(self, images: Any, videos: Any) -> MllmBatch:
        """Pictures under their keys, videos under the same with `APART` before them."""
        films = [film if isinstance(film, Video) else Video(film) for film in flat_visuals(videos)]
        seen = self.image_processor(films, return_tensors="pt")
        batch = MllmBatch({} if images is None else self.image_processor(images, return_tensors="pt"))
        batch.placeholder = self.image_token_id
        batch.update({APART + key: value for key, value in seen.items() if key != IMAGE_SIZES})
        return batch

    @property
    def takes_video(self) -> bool:
        """Whether a visual may be a video (``<video>`` in text, ``videos=``, a `Video` among the images)."""
        return self.rules.video is not None

    def write(self, text: str) -> list[int]:
        """Token ids of a text by itself.

        Args:
            text: any text.

        Returns:
            Ids, without BOS or EOS.
        """
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        """As in transformers, where images may be videos."""
        processed, visuals = self.image_processor(images, **kwargs), flat_visuals(images)
        return processed, [self.replace_image_token(processed, k, **kwargs) for k in range(len(visuals))]

    def apply_chat_template(
        self, conversation: Any, *args: Any, return_assistant_tokens_mask: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, for any chat template. Tokenised is what the template writes, without a second BOS.

        Args:
            conversation: messages, or a list of conversations.
            args: as transformers takes them.
            return_assistant_tokens_mask: give ``assistant_masks``, 1 where training takes a loss.
            kwargs: as transformers takes them, and the template's own variables.

        Returns:
            Text, ids, or the batch, as ``tokenize`` and ``return_dict`` say.

        Raises:
            ConfigError: options that do not go together.
            AlignmentError: the tokens are not those of the text.
        """
        return apply_template(
            super().apply_chat_template, self, conversation, args, return_assistant_tokens_mask, kwargs
        )

    @property
    def span(self) -> VisualSpan | None:
        """How an image to draw is written; None for a model that draws nothing."""
        return None if self.visual_span is None else VisualSpan.model_validate(self.visual_span)

    @property
    def segments(self) -> SegmentSpec | None:
        """How masks are read and written; None for a model that marks nothing."""
        return None if self.segment_spec is None else SegmentSpec.model_validate(self.segment_spec)

    @property
    def geometry(self) -> GeometrySpec | None:
        """What heads learn of poses and depth; None for a model without such heads."""
        return None if self.geometry_spec is None else GeometrySpec.model_validate(self.geometry_spec)

    @property
    def pixel_keys(self) -> PixelKeys:
        """Encoder name → key of its pixels in the output."""
        return self.image_processor.pixel_keys

    @property
    def rules(self) -> LayoutRules:
        """How an image is looked at and lies in the sequence."""
        return self.image_processor.rules

    @property
    def layout_key(self) -> str:
        """Text that differs where the tokens of some image differ."""
        return self.rules.key()

    def image_layouts(self, images: Any, *, where: str = "sample", visual_tokens: int = 0) -> list[VisualLayout]:
        """The tokens of every image of a list; at most the header of each is read.

        Args:
            images: files, pictures or videos, in order.
            where: what an error begins with.
            visual_tokens: most that each may take (0: what the model's views allow).

        Returns:
            One layout an image.

        Raises:
            DataError: an image cannot be read.
        """
        return self.image_processor.image_layouts(images, where=where, write=self.write, visual_tokens=visual_tokens)

    @property
    def model_input_names(self) -> list[str]:
        return list(dict.fromkeys([*self.tokenizer.model_input_names, *self.image_processor.model_input_names]))

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Raise `AlignmentError` unless every placeholder has its image."""
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if images is None or text is None:
            return
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(item, str) for item in texts):
            return
        found = [item.count(self.image_token) for item in texts]
        nested = (
            isinstance(images, (list, tuple)) and images and all(isinstance(item, (list, tuple)) for item in images)
        )
        given = [len(item) for item in images] if nested else [len(images) if isinstance(images, (list, tuple)) else 1]
        if nested and len(given) == len(found):
            for position, (placeholders, pictures) in enumerate(zip(found, given)):
                if placeholders != pictures:
                    raise AlignmentError(
                        f"text {position} has {placeholders} {self.image_token} placeholders and {pictures} images; {self._cure}"
                    )
        elif sum(found) != sum(given):
            raise AlignmentError(
                f"{sum(found)} {self.image_token} placeholders in the text and {sum(given)} images; {self._cure}"
            )

    @property
    def _cure(self) -> str:
        return (
            f"give one image for each, in their order. A {self.image_token} that somebody typed stays text where messages with parts "
            "go through apply_chat_template"
        )

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ):
        """Empty lists of images mean no image; a flat list beside several texts is each text's own pictures, which share a sample's
        budget."""
        nested_empty = isinstance(images, (list, tuple)) and not any(
            (len(item) if isinstance(item, (list, tuple)) else 1) for item in images
        )
        return super().prepare_inputs_layout(
            images=None if nested_empty else self._of_each_text(images, text),  # pyright: ignore[reportArgumentType]
            text=text,
            videos=videos,
            audio=audio,
            **kwargs,
        )

    def _of_each_text(self, images: Any, text: Any) -> Any:
        """Pictures in one list, told apart by the placeholders of several texts."""
        several = isinstance(text, (list, tuple)) and len(text) > 1 and all(isinstance(item, str) for item in text)
        flat = isinstance(images, (list, tuple)) and not any(isinstance(item, (list, tuple)) for item in images)
        counts = [item.count(self.image_token) for item in text] if several else []
        if not flat or sum(counts) != len(images):
            return images
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in counts]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholder, once per visual token, and the vocabulary's tokens between them. Text before a video's frames has room
        kept by placeholders (`write_stamps`)."""
        layout = layout_in_call(self.rules, image_inputs, image_idx)
        if self.rules.video is not None and self.rules.video.stamp is not None:
            layout = stamped(self, image_inputs, image_idx) or layout
            if layout.num_views and layout.literals:
                return self.image_token * layout.num_tokens
        return "".join(
            "".join(self.tokenizer.convert_ids_to_tokens(list(block.ids)))
            if block.ids
            else self.image_token * block.num_tokens
            for block in layout.blocks
        )

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Token counts for vLLM, from image sizes ``(height, width)``."""
        if image_sizes is None:
            return MultiModalData()
        layouts = self.rules.layouts(image_sizes)
        return MultiModalData(
            num_image_tokens=[layout.num_tokens for layout in layouts],
            num_image_patches=[layout.num_views for layout in layouts],
        )
