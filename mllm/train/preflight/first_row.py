"""What is learned of one row, and by which token does it end? Shown in colour before training and by ``mllm inspect``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from mllm.errors import MllmError
from mllm.processing.chat import encode_sample, encode_text, turn_ends
from mllm.processing.protocol import Processor
from mllm.processing.turns import IGNORE, special_ids, template_notes

LONGEST = 900
"""Characters of a run of text that are shown; of a longer one the middle is left out."""


def show_row(ids: Sequence[int], labels: Sequence[int], processor: Processor) -> Text:
    """One row as text: what is learned green, special tokens bold by name, the rest dim, images counted."""
    tokenizer, image, special = processor.tokenizer, processor.image_token_id, special_ids(processor.tokenizer)
    text = Text()

    def kind(place: int) -> tuple[bool, bool, bool]:
        number = ids[place]
        return number == image, number in special, labels[place] != IGNORE

    for (is_image, is_special, learned), places in itertools.groupby(range(len(ids)), kind):
        run = [ids[place] for place in places]
        style = "green" if learned else "dim"
        if is_image:
            text.append(f"[{processor.image_token} × {len(run)}]", "cyan")
        elif is_special:
            text.append("".join(tokenizer.convert_ids_to_tokens(run)), f"bold {style}" if learned else style)
        else:
            shown = tokenizer.decode(run)
            if len(shown) > LONGEST:
                shown = f"{shown[: LONGEST // 2]} … {shown[-LONGEST // 2 :]}"
            text.append(shown, style)
    return text


def what_is_learned(processor: Processor, data: Any, stops: Any = None) -> list[Any]:
    """Lines before a stage's first step: what to know of the chat template, one row of ``data`` (`StageData`), the tokens that end
    generation. stops: the model's ``eos_token_id``."""
    if hasattr(processor, "encode_sample"):
        return []  # another kind of sample: captions and near misses, questions about experts
    lines: list[Any] = []
    try:
        lines += [f"[yellow]{_plain(note)}[/]" for note in template_notes(processor)]
    except MllmError as error:
        lines.append(f"[yellow]{_plain(error)}[/]")
    for draw in itertools.islice(data.draws(), 20):
        source = data.mixture.sources[draw.dataset]
        if not source.random_access and source.shards is None:
            continue
        try:
            sample = source[draw.row if source.random_access else 0]
            where = f"sample {sample.id!r}"
            if sample.images:  # how many tokens they are, only they tell: a video's frames, a picture's tiles
                row = encode_sample(processor, sample)
                ids, labels = row.input_ids, row.labels
            else:
                ids, labels = encode_text(processor, sample.turns, tools=sample.meta.get("tools"), where=where)
        except MllmError:
            continue  # told when it is drawn
        lines += [
            f"sample {_plain(repr(sample.id))} of {_plain(sample.dataset)}; [green]green[/] is learned:",
            show_row(ids.tolist(), labels.tolist(), processor),
        ]
        break
    return [*lines, _plain(stop_line(processor, stops))]


def stop_line(processor: Processor, stops: Any = None) -> str:
    """The tokens at which generation stops, by name."""
    tokenizer = processor.tokenizer
    given = [stops] if isinstance(stops, int) else list(stops or [])
    ids = dict.fromkeys([*given, *([] if given else turn_ends(processor))])
    if not ids and tokenizer.eos_token_id is not None:
        ids = {tokenizer.eos_token_id: None}
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(number)} ({number})" for number in ids)
    return f"generation stops at {names or 'nothing: no token ends a turn'}"


def _plain(text: Any) -> str:
    return str(text).replace("[", r"\[")
