"""Does a model learn to mark, answer with masks the same in any batch, and refuse what it cannot mark?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mllm.data.collate import collate, collate_packed
from mllm.data.sources import open_source
from mllm.data.spec import DatasetSpec
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.eval.generators.hf import HFGenerator
from mllm.heads.base import HeadParts
from mllm.heads.build import head_config, keep_in_head
from mllm.heads.segmentation.answer import laid
from mllm.heads.segmentation.decoders import DECODERS as DECODERS_BY_TYPE
from mllm.heads.segmentation.head import raised
from mllm.processing.chat import encode_sample
from mllm.processing.mask_files import decode_rle
from mllm.processing.segments import SegmentSpec
from mllm.testing.heads import CHECKS
from mllm.train.preflight.head_memory import kept_by_heads
from mllm.types import IMAGE_MARK, EncoderInfo, ImageSpec, Request, Sample, Turn
from tests.helpers import picture, tiny_model

HEAD: dict[str, Any] = {
    "type": "segmentation",
    "encoder": "semantic",
    "decoder": {"type": "query", "width": 32, "depth": 1, "heads": 2},
}
MASK = np.zeros((30, 40), np.uint8)
MASK[5:20, 10:30] = 1
OTHER = np.zeros((30, 40), np.uint8)
OTHER[18:28, 8:18] = 1


def marked(number: int, *masks: Any) -> Sample:
    answer = "It is " + " and ".join(["[SEG]"] * len(masks)) + "."
    turns = [Turn("user", f"{IMAGE_MARK}\nPlease segment it."), Turn("assistant", answer)]
    return Sample(f"m{number}", turns, [picture(number)], masks=list(masks))


def told(number: int) -> Sample:
    return Sample("t", [Turn("user", IMAGE_MARK + "\nWhat?"), Turn("assistant", "Seven.")], [picture(number)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model that knows three pictures by heart, and its processor."""
    model, processor = tiny_model(tmp_path_factory.mktemp("seg"), heads={"marks": HEAD})
    samples = [marked(1, MASK), told(2), marked(3, OTHER, MASK), marked(4, None)]
    inputs = collate([encode_sample(processor, sample) for sample in samples], pad_token_id=0).inputs
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(60):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), processor


def test_it_marks_what_it_learned_alone_and_among_others_saved_and_opened(trained, tmp_path: Path) -> None:
    model, processor = trained
    pictures = [picture(1), picture(2), picture(3), picture(4)]
    questions = ["Please segment it.", "What?", "Please segment it.", "Please segment it."]
    found = model.segment(pictures, questions=questions, processor=processor, max_new_tokens=24)
    assert [part.text for part in found] == ["It is [SEG].", "Seven.", "It is [SEG] and [SEG].", "It is [SEG]."]
    assert [tuple(part.masks.shape) for part in found] == [(1, 30, 40), (0, 30, 40), (2, 30, 40), (1, 30, 40)]
    for mask, wanted in ((found[0].masks[0], MASK), (found[2].masks[0], OTHER), (found[2].masks[1], MASK)):
        same, either = (mask.numpy() & (wanted == 1)).sum(), (mask.numpy() | (wanted == 1)).sum()
        assert same / either > 0.6
    assert not found[3].masks.any() and found[3].boxes() == [None]  # nothing is there, and it says so
    assert found[0].rle()[0]["size"] == [30, 40] and found[0].polygons()[0]
    assert found[0].overlay(picture(1)).size == (40, 30)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    alone = again.segment(picture(3), "it", max_new_tokens=24)
    assert alone.text == found[2].text and torch.equal(alone.masks, found[2].masks)
    keep_in_head(tmp_path, "marks", threshold=0.9)  # as chosen on validation pictures
    surer = AutoModelForImageTextToText.from_pretrained(tmp_path).segment(picture(3), "it", max_new_tokens=24)
    told_so = again.segment(picture(3), "it", threshold=0.9, max_new_tokens=24)
    assert torch.equal(surer.masks, told_so.masks) and surer.masks.sum() < alone.masks.sum()
    before = (tmp_path / "config.json").read_text()
    for name, values, says in (
        ("mark", {"threshold": 0.5}, "no head 'mark'.*marks"),
        ("marks", {"threshold": 2}, r"heads\.marks\.threshold"),
        ("marks", {"treshold": 0.5}, "threshold"),
    ):
        with pytest.raises(ConfigError, match=says):
            keep_in_head(tmp_path, name, **values)
    assert (tmp_path / "config.json").read_text() == before


def test_a_plan_counts_what_masks_keep_of_a_step(trained) -> None:
    model, processor = trained
    samples = [marked(1, MASK), told(2), marked(3, OTHER, MASK)]
    inputs = collate([encode_sample(processor, sample) for sample in samples], pad_token_id=0).inputs

    def kept(**given: Any) -> int:
        held: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            model(**given, use_cache=False)
        return sum(t.untyped_storage().nbytes() for t in held.values())

    weights = sum(p.numel() * 4 for p in model.heads.parameters())
    found = kept(**inputs) - kept(**{key: value for key, value in inputs.items() if not key.startswith("target_")})
    assert kept_by_heads(model, 3, 4) == pytest.approx(found - weights, rel=0.02)


def test_packed_rows_several_images_and_samples_without_masks_change_no_loss(trained) -> None:
    model, processor = trained
    two = Sample(
        "two",
        [
            Turn("user", f"{IMAGE_MARK}{IMAGE_MARK}\nWhich?"),
            Turn("assistant", "[SEG]"),
            Turn("user", f"{IMAGE_MARK}Now?"),
            Turn("assistant", "[SEG]"),
        ],
        [picture(5), picture(1), picture(3)],
        masks=[MASK, OTHER],
    )
    encoded = [encode_sample(processor, sample) for sample in (marked(1, MASK), told(2), two)]
    padded = collate(encoded, pad_token_id=0).inputs
    left = collate(encoded, pad_token_id=0, padding_side="left").inputs
    packed = collate_packed([encoded], max_length=400, pad_token_id=0).inputs
    alone = [collate([encoded[k]], pad_token_id=0).inputs for k in (0, 2)]
    with torch.no_grad():
        first, second, third = (model(**x, use_cache=False).losses for x in (padded, packed, left))
        one, other = (model(**x).losses for x in alone)
    for name in ("marks/bce", "marks/dice"):
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first[name], third[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first[name], (one[name] + 2 * other[name]) / 3, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("state", ["predict", "self"])
def test_each_convention_reads_its_own_hidden_state(state: str, tmp_path: Path) -> None:
    model, processor = tiny_model(tmp_path, heads={"marks": {**HEAD, "state": state}})
    inputs = collate([encode_sample(processor, marked(1, MASK))], pad_token_id=0).inputs
    place = int((inputs["input_ids"][0] == processor.segments.token_id).nonzero())
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, place] = 9  # the state that predicts the token does not see it; its own does
    with torch.no_grad():
        first, second = model(**inputs).losses["marks/bce"], model(**changed).losses["marks/bce"]
    assert torch.equal(first, second) == (state == "predict")


def test_states_before_a_masks_own_are_those_of_its_answer_alone(tmp_path: Path) -> None:
    model, processor = tiny_model(tmp_path, heads={"marks": {**HEAD, "states": 3}})
    model.eval()
    turns = [Turn("user", f"{IMAGE_MARK}\nWhich?"), Turn("assistant", "[SEG]"), Turn("user", "Now?")]
    short = Sample("s", [*turns, Turn("assistant", "It [SEG]")], [picture(5)], masks=[MASK, OTHER])
    encoded = [encode_sample(processor, sample) for sample in (marked(1, MASK, OTHER), short)]
    padded = collate(encoded, pad_token_id=0).inputs
    left = collate(encoded, pad_token_id=0, padding_side="left").inputs
    packed = collate_packed([encoded], max_length=400, pad_token_id=0).inputs
    read: list[torch.Tensor] = []
    model.heads["marks"].project.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        losses = [model(**x, use_cache=False).losses["marks/bce"] for x in (padded, left, packed)]
    torch.testing.assert_close(torch.stack(losses[1:]), losses[0].expand(2), atol=1e-4, rtol=1e-4)
    for other in read[1:]:
        torch.testing.assert_close(read[0], other, atol=1e-4, rtol=1e-4)
    # Of "[SEG]" one state wrote the answer; "It [SEG]" has more, and a long answer all three.
    there = read[0].unflatten(1, (3, -1)).abs().sum(-1) > 0
    assert there.tolist()[:3] == [[True] * 3, [True] * 3, [True, False, False]] and there[3, :2].all()
    marks = (padded["labels"][0] == processor.segments.token_id).nonzero()[:, 0]
    with torch.no_grad():
        hidden = model.model(**{k: v for k, v in padded.items() if k not in ("labels", "target_masks")})
    wanted = torch.cat([hidden.last_hidden_state[0, marks - back] for back in (1, 2, 3)], 1)
    torch.testing.assert_close(read[0][:2], wanted, atol=1e-5, rtol=1e-5)


def test_masks_are_learned_where_they_are_answered(trained) -> None:
    # On the decoder's grid an edge cannot run through a cell, and the nearest pixel of an even cell lies half a pixel off its middle.
    model, processor = trained
    masks = encode_sample(processor, marked(1, MASK)).masks
    image, head = processor.segments.image, model.heads["marks"]
    assert masks is not None and tuple(masks.shape[1:]) == (image.height, image.width) != head.decoder.size
    logits = torch.randn(2, *head.decoder.size)
    size = (image.height, image.width)
    torch.testing.assert_close(raised(logits, size), processor.segments.restore(logits, size), atol=1e-5, rtol=1e-5)
    assert raised(logits, head.decoder.size) is logits  # as batches of processors saved before have them


def test_a_batch_without_masks_still_reaches_the_head(trained) -> None:
    model, processor = trained
    model.train()
    model.zero_grad()
    model(**collate([encode_sample(processor, told(2))], pad_token_id=0).inputs).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.heads.parameters())
    model.eval()


def test_rows_of_a_dataset_bring_their_masks(trained, tmp_path: Path) -> None:
    _, processor = trained
    picture(1).save(tmp_path / "p.png")
    row = {
        "messages": [{"role": "user", "content": "<image>Mark it."}, {"role": "assistant", "content": "[SEG]"}],
        "images": ["p.png"],
        "masks": [[[10, 5, 29, 5, 29, 19, 10, 19]]],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = open_source(DatasetSpec(name="d", format="messages", path=str(tmp_path / "rows.jsonl"), licence="MIT"))
    masks = encode_sample(processor, source[0]).masks
    assert torch.equal(masks, encode_sample(processor, marked(1, MASK)).masks) and masks.any()


def test_samples_that_do_not_fit_are_named(trained, tmp_path: Path) -> None:
    model, processor = trained
    with pytest.raises(DataError, match=r"sample 'm1'.*answers hold 1 \[SEG\] and the sample 2 masks"):
        encode_sample(processor, Sample("m1", marked(1, MASK).turns, [picture(1)], masks=[MASK, MASK]))
    with pytest.raises(DataError, match=r"sample 'm1', mask 0: the mask is 8 × 9 pixels and its picture 40 × 30"):
        encode_sample(processor, marked(1, np.zeros((9, 8), np.uint8)))
    inputs = collate([encode_sample(processor, marked(1, MASK))], pad_token_id=0).inputs
    with pytest.raises(AlignmentError, match=r"2 masks for 1 \[SEG\]"):
        model(**{**inputs, "target_masks": inputs["target_masks"].repeat(2, 1, 1)})
    plain, reader = tiny_model(tmp_path)
    with pytest.raises(DataError, match="no head of this model learns from them"):
        encode_sample(reader, marked(1, MASK))
    with pytest.raises(ConfigError, match="this model marks nothing"):
        plain.segment(picture(1), "it", processor=processor)
    with pytest.raises(ConfigError, match=r"target_masks: no head of this model learns from it; its heads: none"):
        plain(**inputs)
    with pytest.raises(ConfigError, match="one of the two"):
        model.segment(picture(1), processor=processor)


MISFITS = [
    ({"encoder": "semantics"}, "reads encoder 'semantics', which this model has not, did you mean 'semantic'"),
    ({"decoder": {"type": "sam"}}, "a sam decoder of width 256 reads features of 256; the encoder gives 32"),
    ({"decoder": {"type": "query", "width": 30}}, "divisible by heads"),
    ({"weights": {"dise": 1.0}}, "did you mean 'dice'"),
    ({"weights": {"iou": 1.0}}, "a query decoder does not say how well it does"),
    ({"weights": {}}, "the head would learn nothing"),
    ({"question": "Segment it."}, "no place for what is asked for"),
]


@pytest.mark.parametrize(("changes", "words"), MISFITS)
def test_a_head_that_does_not_fit_is_refused_before_anything_is_built(changes, words, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_model(tmp_path, heads={"marks": {**HEAD, **changes}})


DECODERS = [
    {"type": "offset", "width": 16, "others": 3},
    {"type": "sam_unet", "width": 16, "heads": 2, "mlp_width": 16, "bridges": [4, 4], "mask_channels": 4},
    {"type": "sam", "width": 24, "heads": 2, "mlp_width": 16, "iou_width": 8, "mask_channels": 4},
]


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder["type"])
def test_every_decoder_keeps_the_heads_contract(decoder) -> None:
    info = EncoderInfo(image=ImageSpec(height=16, width=16), grid=(4, 4), width=24)
    case = ({"type": "segmentation", "encoder": "eye", "decoder": decoder}, HeadParts(32, {"eye": info}))
    for check in CHECKS:
        check("segmentation", case)
    # Masks of pictures in any order, several a picture: each is decoded on its own picture.
    torch.manual_seed(0)
    made: Any = DECODERS_BY_TYPE[decoder["type"]](head_config(case[0]).decoder, info).eval()
    prompts, tokens, owners = torch.randn(3, made.config.width), torch.randn(2, 16, 24), torch.tensor([1, 0, 1])
    with torch.no_grad():
        masks = made(prompts, tokens, owners)[0]
        apart = made(prompts[[0, 2]], tokens[1:], torch.tensor([0, 0]))[0]
        alone = made(prompts[1:2], tokens, torch.tensor([0]))[0]
        assert made(prompts[:0], tokens, owners[:0])[0].shape == (0, 16, 16)
    torch.testing.assert_close(masks[[0, 2]], apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masks[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resize", ["squash", "letterbox", "crop"])
def test_masks_of_a_large_picture_are_laid_some_rows_after_others(resize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its probabilities, several times its own size for every mask, are not held all at once."""
    spec = SegmentSpec(
        token="[SEG]", token_id=5, image=ImageSpec(height=16, width=16, resize=resize), size=(16, 16), question="{phrase}"
    )  # fmt: skip
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, seen = laid(spec, "a", logits, (37, 50), 0.6), []
    restored = type(spec).restore
    monkeypatch.setattr(type(spec), "restore", lambda *given: seen.append(given[3]) or restored(*given))
    monkeypatch.setattr("mllm.heads.segmentation.answer._AT_ONCE", 1000)
    parts = laid(spec, "a", logits, (37, 50), 0.6)
    assert seen == [(first, min(first + 6, 37)) for first in range(0, 37, 6)]
    assert torch.equal(parts.masks, whole.masks) and whole.masks.any() and not whole.masks.all()
    torch.testing.assert_close(parts.scores, whole.scores)
    assert laid(spec, "a", logits[:0], (37, 50), 0.6).masks.shape == (0, 37, 50)


def test_tiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="masks are read from one view of the whole picture"):
        tiny_model(tmp_path, heads={"marks": HEAD}, views={"type": "tiles", "grids": [[1, 2], [2, 1]]})


def test_an_evaluation_is_answered_with_the_masks_of_segment(trained: Any) -> None:
    model, processor = trained
    generator = HFGenerator(model, processor, batch_size=2)
    assert generator.gives_masks
    options = {"max_new_tokens": 40, "masks": True}
    question = "Please segment it."
    requests = [
        Request(str(n), [Turn("user", f"{IMAGE_MARK}\n{question}")], [picture(n)], dict(options)) for n in (1, 3, 4)
    ]
    answers = {response.id: response for response in generator.generate(requests)}
    found = model.segment([picture(n) for n in (1, 3, 4)], questions=question, processor=processor, max_new_tokens=40)
    assert [len(one) for one in found] == [1, 2, 1]
    for request, one in zip(requests, found):
        assert answers[request.id].error is None
        told = json.loads(answers[request.id].text)
        masks = [decode_rle(entry) for entry in told["masks"]]
        assert told["text"] == one.text.strip()
        assert all((np.asarray(a) == b.numpy()).mean() > 0.999 for a, b in zip(masks, one.masks, strict=True))
    two = Request("x", [Turn("user", IMAGE_MARK * 2 + "both")], [picture(1), picture(3)], options)
    (refused,) = generator.generate([two])
    assert refused.error is not None and "one question about one picture" in refused.error
