"""How do a tokenizer's codes lie in the vocabulary and in the token sequence?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm.errors import ConfigError
from mllm.heads.build import head_config
from mllm.heads.codes.configs import CodeHeadConfig, VocabularyHeadConfig
from mllm.processing.visual_span import VisualSpan
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.sequence import ImageGrammar, Level, code_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

START, END, CODE, LINE = "<image_start>", "<image_end>", "<image_code>", "<image_line>"


def code_tokens(config: CodeHeadConfig, tokenizer: VisualTokenizer) -> list[str]:
    """Tokens that the language model's vocabulary needs for a head, in the order in which they get ids."""
    names = [START, END, CODE]
    if isinstance(config, VocabularyHeadConfig):
        names.append(LINE)
        for index, _ in enumerate(code_blocks(tokenizer)):
            names += [f"<image_level{index}>", f"</image_level{index}>"]
        first: dict[tuple[str, int], int] = {}
        for index, block in enumerate(code_blocks(tokenizer)):
            if first.setdefault((block.book, block.depth), index) == index:
                names += [f"<|image_level{index}_{code}|>" for code in range(block.size)]
    return names


def with_ids(config: CodeHeadConfig, tokenizer: VisualTokenizer, id_of: Callable[[str], int], *, null: int) -> Any:
    """``config`` with the ids of its tokens filled in. id_of: text of a token → id; null: id that stands for dropped
    text. Scales of one codebook and depth share their ids."""
    update: dict[str, Any] = {
        "tokens": {"start": id_of(START), "end": id_of(END), "code": id_of(CODE), "null": null},
    }
    if isinstance(config, VocabularyHeadConfig):
        update["tokens"]["line"] = id_of(LINE)
        first: dict[tuple[str, int], int] = {}
        levels = []
        for index, block in enumerate(code_blocks(tokenizer)):
            owner = first.setdefault((block.book, block.depth), index)
            base = id_of(f"<|image_level{owner}_0|>")
            if id_of(f"<|image_level{owner}_{block.size - 1}|>") != base + block.size - 1:
                raise ConfigError(
                    f"the tokenizer's ids of {block.name}'s codes do not follow one another; start from a tokenizer "
                    "without <|image_level…|> tokens"
                )
            levels.append(
                {"start": id_of(f"<image_level{index}>"), "end": id_of(f"</image_level{index}>"), "first": base}
            )
        update["levels"] = levels
    return config.model_copy(update=update)


def image_grammar(config: VocabularyHeadConfig, tokenizer: VisualTokenizer) -> ImageGrammar:
    """The grammar of a resolved vocabulary head."""
    levels = [
        Level(block.name, ids["start"], ids["end"], ids["first"], block.size, block.rows, block.columns)
        for block, ids in zip(code_blocks(tokenizer), config.levels)
    ]
    tokens = config.tokens
    return ImageGrammar(levels, start_of_image=tokens["start"], end_of_image=tokens["end"], end_of_line=tokens["line"])


def vocabulary_offsets(config: VocabularyHeadConfig, tokenizer: VisualTokenizer) -> Tensor:
    """``(S,)``: packed code number s is the id ``offset[s] + code``."""
    blocks = code_blocks(tokenizer)
    return torch.cat([torch.full((b.number,), ids["first"]) for b, ids in zip(blocks, config.levels)])


def visual_tokens(
    input_ids: Tensor, config: CodeHeadConfig, grammar: ImageGrammar | None, image_token_id: int | None
) -> Tensor:
    """Which of input_ids ``(…)`` stand for an image, read or drawn. grammar: that of a vocabulary head."""
    visual = torch.isin(
        input_ids, torch.tensor([config.tokens[name] for name in ("start", "end", "code")]).to(input_ids)
    )
    if image_token_id is not None:
        visual |= input_ids == image_token_id
    for first, end in grammar.reserved() if grammar is not None else ():
        visual |= (input_ids >= first) & (input_ids < end)
    return visual


def never_written(config: PreTrainedConfig) -> list[int]:
    """Ids that no text answer of a model holds, in order: those without a token, placeholders and, of a head that draws without writing
    ids, its marks. config: an `MllmConfig`."""
    never, size = {config.image_token_id}, config.get_text_config().vocab_size
    if config.drawing_head is not None:
        head = head_config(config.drawing_head)
        never.add(head.tokens["code"])
        if not isinstance(head, VocabularyHeadConfig):
            never |= {head.tokens["start"], head.tokens["end"]}
    return sorted({*config.unassigned_ids, *(i for i in never if i is not None and i < size)})


def make_span(
    config: CodeHeadConfig, tokenizer: VisualTokenizer, num_slots: int, *, resize: Any = "squash"
) -> VisualSpan:
    """The tokens of a drawn image for a resolved head. num_slots: placeholders of a head with weights."""
    tokens = config.tokens
    if isinstance(config, VocabularyHeadConfig):
        runs = [(tokens["start"], 1)]
        for block, ids in zip(code_blocks(tokenizer), config.levels):
            runs.append((ids["start"], 1))
            runs += [(tokens["code"], block.columns), (tokens["line"], 1)] * block.rows
            runs.append((ids["end"], 1))
        runs.append((tokens["end"], 1))
    else:
        runs = [(tokens["start"], 1), (tokens["code"], num_slots), (tokens["end"], 1)]
    return VisualSpan(
        image=tokenizer.image.model_copy(update={"resize": resize}),
        num_codes=tokenizer.tokens_per_image,
        start=tokens["start"],
        end=tokens["end"],
        code=tokens["code"],
        runs=runs,
        names=[START, END, CODE, LINE, "<image_level", "</image_level", "<|image_level"],
    )
