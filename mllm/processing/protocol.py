"""What does code that writes and encodes conversations need of a tokenizer and a processor?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mllm.processing.geometry_spec import GeometrySpec
from mllm.processing.layout import LayoutRules
from mllm.processing.pixel_keys import PixelKeys
from mllm.processing.segments import SegmentSpec
from mllm.processing.visual_span import VisualSpan
from mllm.types import VisualLayout


class TextTokenizer(Protocol):
    """A tokenizer of transformers, with the types that its methods have for one text (its own annotations name those for lists too)."""

    chat_template: Any
    padding_side: str
    eos_token: Any
    eos_token_id: Any
    bos_token: Any
    bos_token_id: Any
    pad_token: Any
    pad_token_id: Any
    unk_token: Any
    unk_token_id: Any
    all_special_ids: Any
    model_input_names: list[str]

    @property
    def is_fast(self) -> bool: ...

    @property
    def backend_tokenizer(self) -> Any: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    def __len__(self) -> int: ...

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any: ...

    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any, *args: Any, **kwargs: Any) -> Any: ...

    def add_tokens(self, new_tokens: Any, *args: Any, **kwargs: Any) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any: ...


class Templated(Protocol):
    """A tokenizer with the chat template that conversations are written by."""

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def chat_template(self) -> Any: ...


class TextProcessor(Templated, Protocol):
    """What makes token ids and labels of a conversation: a model's processor, and the wrappers by which a stage makes other samples."""

    @property
    def image_token(self) -> str: ...

    @property
    def image_token_id(self) -> int: ...

    @property
    def layout_key(self) -> str:
        """Text that differs where the tokens of some image differ."""
        ...

    def image_layouts(
        self, images: Sequence[Any], *, where: str = "sample", visual_tokens: int = 0
    ) -> list[VisualLayout]:
        """The tokens of every image of a list, of at most ``visual_tokens`` each where that is not 0."""
        ...


class Processor(TextProcessor, Protocol):
    """The processor of one model (`MllmProcessor`, also with pictures from a cache): besides the text, how images are looked at."""

    @property
    def image_processor(self) -> Any: ...

    @property
    def template_options(self) -> Mapping[str, Any]: ...

    @property
    def span(self) -> VisualSpan | None: ...

    @property
    def segments(self) -> SegmentSpec | None: ...

    @property
    def geometry(self) -> GeometrySpec | None: ...

    @property
    def pixel_keys(self) -> PixelKeys: ...

    @property
    def rules(self) -> LayoutRules: ...

    @property
    def takes_video(self) -> bool: ...

    def write(self, text: str) -> list[int]: ...

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any: ...
