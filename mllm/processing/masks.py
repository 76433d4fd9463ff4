"""Which tokens of a templated conversation does the assistant say, as transformers reports it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mllm.errors import AlignmentError, ConfigError
from mllm.processing.message_parts import known_parts
from mllm.processing.protocol import Processor
from mllm.processing.template import VIDEO, template_variables, unwrapped
from mllm.processing.turns import IGNORE, added_texts, find_replies, label_text


def apply_template(
    base: Callable[..., Any],
    processor: Processor,
    conversation: Any,
    args: Sequence[Any],
    masks: bool,
    kwargs: dict[str, Any],
) -> Any:
    """transformers' ``apply_chat_template`` (``base``), with ``assistant_masks`` where ``masks`` asks for them."""
    if not conversation:
        raise ConfigError("apply_chat_template: the conversation is empty, expected a list of messages")
    filled, several = (
        bool(kwargs.get("tokenize") and kwargs.get("return_dict")),
        isinstance(conversation[0], (list, tuple)),
    )
    talks = [known_parts(talk, filled=filled) for talk in (conversation if several else [conversation])]
    conversation = talks if several else talks[0]
    template = args[0] if args else kwargs.get("chat_template")
    read = template_variables(unwrapped(str(template or processor.chat_template)))
    own = {"chat_template", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}
    own |= {"return_tensors", "return_dict", "load_audio_from_video", "processor_kwargs", *read}
    settings = {
        **(kwargs.pop("processor_kwargs", None) or {}),
        **{k: kwargs.pop(k) for k in list(kwargs) if k not in own},
    }
    if kwargs.get("tokenize"):
        kwargs["processor_kwargs"] = {"add_special_tokens": False, **settings}
    elif settings:
        kwargs["processor_kwargs"] = settings
    if not masks:
        return base(conversation, *args, **kwargs)
    if not (kwargs.get("tokenize") and kwargs.get("return_dict")):
        raise ConfigError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
    if kwargs.get("continue_final_message"):
        raise ConfigError("return_assistant_tokens_mask and continue_final_message do not go together")
    rows = [_text_tokens(processor, talk, args, kwargs, read) for talk in talks]
    output = base(conversation, *args, **kwargs)
    stamps = processor.rules.video is not None and processor.rules.video.stamp
    if any(int(time) >= 0 for row in output.get("video_times", ()) for time in row) and stamps:
        raise ConfigError(
            "return_assistant_tokens_mask does not go with text before a video's frames (model.video.stamp)"
        )
    ids = output["input_ids"]
    nested = several or hasattr(ids, "shape")
    seen = output["attention_mask"]
    padded = zip(ids, seen, strict=True) if nested else [(ids, seen)]
    found = [
        _spread(processor, list(map(int, row)), list(map(int, real)), text)
        for (row, real), text in zip(padded, rows, strict=True)
    ]
    output["assistant_masks"] = found if nested else found[0]
    return output.convert_to_tensors(kwargs.get("return_tensors")) if kwargs.get("return_tensors") else output


def _text_tokens(
    processor: Processor, messages: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any], read: Sequence[str]
) -> list[tuple[int, bool]]:
    """(id, whether it is learned) of every text token."""
    tokenizer, tools = processor.tokenizer, kwargs.get("tools")
    template = (args[0] if args else kwargs.get("chat_template")) or processor.chat_template

    def render(given: Sequence[Any], add_generation_prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(given), tools=tools, documents=kwargs.get("documents"), chat_template=template, tokenize=False,
            add_generation_prompt=add_generation_prompt, **{k: v for k, v in kwargs.items() if k in read},
        )  # fmt: skip
        return text.replace(VIDEO, processor.image_token) if getattr(processor, "takes_video", False) else text

    where = "conversation"
    text, replies = find_replies(
        render, messages, template=template, tokens=added_texts(tokenizer), tools=tools, where=where
    )
    if kwargs.get("add_generation_prompt"):
        text = render(messages, True)
    ids, labels, _ = label_text(tokenizer, text, replies, [True] * len(replies), parts=False)
    pairs = zip(ids.tolist(), (labels != IGNORE).tolist(), strict=True)
    return [(number, learned) for number, learned in pairs if number != processor.image_token_id]


def _spread(processor: Processor, ids: list[int], real: list[int], text: list[tuple[int, bool]]) -> list[int]:
    """The mask over tokens with images expanded and padding around: neither is said by the assistant."""
    says = [bool(r) and number != processor.image_token_id for number, r in zip(ids, real, strict=True)]
    learned = iter(flag for _, flag in text)
    mask = [int(next(learned, False)) if by_assistant else 0 for by_assistant in says]
    if [number for number, by_assistant in zip(ids, says) if by_assistant] != [number for number, _ in text]:
        raise AlignmentError("the tokens of a conversation are not those of its text; was it truncated?")
    return mask
