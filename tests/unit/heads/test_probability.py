"""Does the probability of a named class come from the right place, and is it worth what it says?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mllm.data.collate import collate, collate_packed
from mllm.errors import ConfigError
from mllm.heads.probability import (
    best_threshold,
    calibrate,
    calibration_error,
    class_tokens,
    class_word_loss,
    phrase_end,
)
from mllm.processing.chat import encode_sample
from mllm.types import IMAGE_MARK, Sample, Turn
from tests.golden.fill import check, load
from tests.helpers import picture, tiny_model

GOLDEN = Path(__file__).parents[2] / "golden"


def test_class_word_loss_equals_fakereasonings_probability_mapper() -> None:
    meta, given, expected = load(GOLDEN / "fakereasoning_probability_mapper.json")
    ctor = meta["ctor"]
    logits = torch.full((2, 14, ctor["vocab"]), -5.0)
    logits[:, :, ctor["ids"]] = torch.from_numpy(given["input.compact"])
    loss = class_word_loss(
        logits,
        torch.from_numpy(given["input.labels"]),
        ids=logits.argmax(-1),
        phrase=ctor["pattern"],
        class_ids=[ctor["real_id"], ctor["fake_id"]],
        temperature=ctor["temperature"],
    )
    check(meta, expected, {"output.loss": np.asarray(loss[None])})


def test_phrase_end_finds_the_first_occurrence_and_refuses_one_that_closes_the_row():
    ids = torch.tensor([[9, 1, 2, 5, 1, 2, 6], [9, 9, 9, 9, 9, 1, 2], [1, 2, 7, 7, 7, 7, 7], [1, 1, 1, 1, 1, 1, 1]])
    position, found = phrase_end(ids, [1, 2])
    assert position.tolist() == [3, 0, 2, 0] and found.tolist() == [True, False, True, False]
    position, found = phrase_end(ids[:, :2], [1, 2])
    assert position.tolist() == [0] * 4 and not found.any()


def test_class_word_loss_reads_the_place_from_the_targets_and_leaves_out_samples_without_it():
    logits = torch.zeros(3, 5, 10, requires_grad=True)
    ids = torch.tensor([[4, 5, 8, 0, 0], [0, 4, 5, 9, 0], [0, 0, 0, 0, 0]])
    with torch.no_grad():
        logits[0, 2, 8], logits[1, 3, 9] = 10.0, 30.0
    labels = torch.tensor([0, 0, 1])
    loss = class_word_loss(logits, labels, ids=ids, phrase=[4, 5], class_ids=[8, 9])
    want = F.cross_entropy(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    assert logits.grad[2].abs().sum() == 0 and logits.grad[0, 2, 8] < 0
    nothing = class_word_loss(logits, labels, ids=torch.zeros(3, 5, dtype=torch.long), phrase=[4, 5], class_ids=[8, 9])
    assert nothing.item() == 0.0 and nothing.requires_grad


def said(number: int, word: str) -> Sample:
    answer = f"It shines. This image is {word}"
    return Sample("s", [Turn("user", IMAGE_MARK + "Real?"), Turn("assistant", answer)], [picture(number)])


def test_a_model_with_the_head_learns_from_the_words_alone(tmp_path: Path) -> None:
    head = {"type": "probability", "phrase": "This image is", "words": ["real", "fake"]}
    model, processor = tiny_model(tmp_path, heads={"sure": head})
    config = model.heads["sure"].config
    assert processor.tokenizer.decode(config.word_ids) == "rf" and len(config.phrase_ids) == 13
    other = Sample("o", [Turn("user", IMAGE_MARK + "What?"), Turn("assistant", "Seven.")], [picture(3)])
    encoded = [encode_sample(processor, s) for s in (said(1, "real"), other, said(2, "fake"))]
    padded = collate(encoded, pad_token_id=0).inputs
    packed = collate_packed([encoded], max_length=400, pad_token_id=0).inputs
    with torch.no_grad():
        output, again = model(**padded), model(**packed, use_cache=False)
    ids, logits = padded["input_ids"], output.logits.float()
    by_hand = []
    for row, word in ((0, 0), (2, 1)):
        place = int((padded["labels"][row] == config.word_ids[word]).nonzero()[-1])
        assert ids[row, place] == config.word_ids[word]
        by_hand.append(F.cross_entropy(logits[row, place - 1, config.word_ids][None] / 10, torch.tensor([word])))
    torch.testing.assert_close(output.losses["sure/class"], torch.stack(by_hand).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.losses["sure/class"], again.losses["sure/class"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert model(**collate(encoded[1:2], pad_token_id=0).inputs).losses is None  # nothing was said of it
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(40):
        model(**padded).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    found = model.probability([picture(1), picture(2)], "Real?", processor=processor, max_new_tokens=40)
    assert [part.text for part in found] == ["It shines. This image is real", "It shines. This image is fake"]
    assert found[0].probabilities["real"] > 0.9 and found[1].probabilities["fake"] > 0.9
    assert sum(found[0].probabilities.values()) == pytest.approx(1)
    assert not found[0].scores.requires_grad
    calibrate(torch.stack([part.scores for part in found]), torch.tensor([1, 0]))  # two answers, both called wrong
    silent = model.probability(picture(3), "What?", processor=processor, max_new_tokens=4)
    assert silent.probabilities is None
    with pytest.raises(ConfigError, match="do not each begin with a token of their own"):
        tiny_model(tmp_path / "b", heads={"sure": {**head, "words": ["real", "really"]}})


def test_tokens_of_phrase_and_words_are_those_of_one_text() -> None:
    def letters(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    phrase, words = class_tokens(letters, "is", ["a", "b"])
    assert phrase == letters("s ") and words == letters("ab")


def test_calibration_finds_the_temperature_that_was_put_in() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 3, generator=generator)
    classes = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
    assert calibrate(scores * 4, classes) == pytest.approx(4, rel=0.1)
    sharp, mild = ((scores * 4 / t).softmax(-1) for t in (1.0, calibrate(scores * 4, classes)))
    assert calibration_error(sharp, classes) > 0.1 > 0.03 > calibration_error(mild, classes)
    always = torch.tensor([[0.75, 0.25]] * 4)
    assert calibration_error(always, torch.tensor([0, 0, 0, 1])) == pytest.approx(0)
    assert calibration_error(always, torch.tensor([1, 1, 1, 1])) == pytest.approx(0.75)


def test_the_threshold_parts_what_can_be_parted() -> None:
    probability = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.9])
    assert best_threshold(probability, torch.tensor([0, 0, 1, 1, 1]).bool()) == pytest.approx(0.25)
    assert 0.3 < best_threshold(probability, torch.tensor([0, 0, 0, 1, 1]).bool()) < 0.8
