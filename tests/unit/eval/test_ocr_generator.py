"""Does a text model get the words of a picture in reading order, before the question, once a picture?"""

from __future__ import annotations

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from mllm.errors import UnavailableError
from mllm.eval.generators.ocr import OcrGenerator, RapidReader, TextGenerator, Word, lines_of
from mllm.types import IMAGE_MARK, Request, Turn
from tests.helpers import tiny_tokenizer


class Reader:
    """Knows what stands in the pictures; one cannot be read."""

    def __init__(self):
        self.asked = 0

    def read(self, picture):
        self.asked += 1
        if picture.size == (9, 9):
            raise ValueError("no picture")
        return [Word("12", 30, 11, 8), Word("Ada", 5, 10, 8), Word("title", 15, 1, 6)]


def _model():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return TextGenerator(LlamaForCausalLM(config), tokenizer, batch_size=2, name="hf:tiny")


def test_words_are_read_line_by_line_from_the_left():
    assert lines_of(Reader().read(Image.new("RGB", (4, 4)))) == ["title", "Ada  12"]
    assert lines_of([]) == []


def test_questions_are_asked_below_the_words_of_their_picture():
    reader = Reader()
    generator = OcrGenerator(_model(), reader)
    good, bad = Image.new("RGB", (4, 4)), Image.new("RGB", (9, 9))
    pictures = {"a": good, "b": good, "c": bad}
    requests = [
        Request(name, [Turn("user", f"{IMAGE_MARK}\nWho {name}?")], [picture], {"max_new_tokens": 3})
        for name, picture in pictures.items()
    ]
    found = {response.id: response for response in generator.generate(requests)}
    prompt = found["a"].prompt
    assert "<assistant>not in the chart<user>" in prompt, "the form of answers is shown"
    assert prompt.index("title") < prompt.index("Ada  12") < prompt.index("Who a?") and IMAGE_MARK not in prompt
    assert found["b"].error is None and found["c"].error == "ValueError: no picture" and set(found) == set(pictures)
    assert reader.asked == 2, "one picture is read once"
    assert generator.name == "ocr:tiny" and generator.fingerprint().startswith("ocr:Reader:")


def test_what_a_reader_of_a_known_version_found_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path))
    reader, picture = Reader(), Image.new("RGB", (4, 4))
    reader.version = "1/2"
    request = Request("a", [Turn("user", f"{IMAGE_MARK}\nWho?")], [picture], {"max_new_tokens": 1})
    (first,) = OcrGenerator(_model(), reader).generate([request])
    (file,) = (tmp_path / "ocr").iterdir()
    assert file.name == "Reader-1-2.jsonl"
    file.write_text(file.read_text() + '{"picture": "cut sh')  # killed while it wrote
    (again,) = OcrGenerator(_model(), reader).generate([request])
    assert reader.asked == 1 and again.prompt == first.prompt
    other = Request("b", [Turn("user", f"{IMAGE_MARK}\nWho?")], [Image.new("RGB", (5, 5))], {"max_new_tokens": 1})
    for _ in range(2):
        list(OcrGenerator(_model(), reader).generate([other]))
    assert reader.asked == 2
    reader.version = "3"
    list(OcrGenerator(_model(), reader).generate([request]))
    assert reader.asked == 3, "another version reads otherwise"


def test_without_the_engine_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(UnavailableError, match=r"rapidocr: .*install .*\[ocr\]"):
        RapidReader()
