"""Are the digits that are read the digits that are drawn, and are held-out ones kept apart?"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from mllm.demo.drawing import NAMES, REQUESTS, drawing_request, prepare_drawing, train_text_tokenizer


def test_the_same_digits_are_read_and_drawn_in_the_tokenizers_split(tmp_path: Path) -> None:
    files = prepare_drawing(tmp_path / "a", size=16)
    again = prepare_drawing(tmp_path / "b", size=16)
    assert {name: path.read_bytes() for name, path in files.items()} == {n: p.read_bytes() for n, p in again.items()}
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert {name: len(found) for name, found in rows.items()} == {
        "read_train": 1438,
        "draw_train": 1438,
        "read_held_out": 359,
        "draw_held_out": 359,
    }
    for read, draw in zip(rows["read_train"][:50], rows["draw_train"][:50]):
        asked, answer = (message["content"] for message in read["messages"])
        request, drawn = (message["content"] for message in draw["messages"])
        assert asked[0] == drawn[0] and asked[0]["type"] == "image"
        assert answer in request or NAMES[int(answer)] in request
        assert Image.open(tmp_path / "a" / asked[0]["image"]).size == (16, 16)


def test_the_text_tokenizer_reads_every_request_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(train_text_tokenizer(tmp_path))
    for kind in range(len(REQUESTS)):
        text = drawing_request(7, kind)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
