"""Does a mask in a question say what is marked in the picture behind it, in any batch, packed, saved, and refused where it does not fit?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mllm.data.collate import collate, collate_packed
from mllm.errors import AlignmentError, ConfigError, DataError
from mllm.heads.base import HeadParts
from mllm.heads.build import head_config
from mllm.heads.segmentation.in_context import on_grid
from mllm.models.chat import ChatSession
from mllm.processing.chat import encode_sample
from mllm.types import IMAGE_MARK, EncoderInfo, ImageSpec, Sample, Turn
from tests.helpers import picture, tiny_model

HEAD: dict[str, Any] = {
    "type": "segmentation",
    "encoder": "semantic",
    "decoder": {"type": "query", "width": 32, "depth": 1, "heads": 2},
    "examples": {"queries": 3, "heads": 2, "mlp_width": 32},
}
LEFT, RIGHT = np.zeros((30, 40), np.uint8), np.zeros((30, 40), np.uint8)
LEFT[5:25, 2:16], RIGHT[5:25, 24:38] = 1, 1
ASKED = f"{IMAGE_MARK} [EX]\n{IMAGE_MARK}\nPlease segment the same."


def shown(number: int, example: Any, wanted: Any) -> Sample:
    """The same picture twice: what is wanted in the second is what is marked in the first."""
    turns = [Turn("user", ASKED), Turn("assistant", "It is [SEG].")]
    return Sample(f"s{number}", turns, [picture(number), picture(number)], masks=[example, wanted])


def asked(number: int, wanted: Any) -> Sample:
    turns = [Turn("user", f"{IMAGE_MARK}\nPlease segment it."), Turn("assistant", "It is [SEG].")]
    return Sample(f"a{number}", turns, [picture(number)], masks=[wanted])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model that was shown either half of two pictures."""
    model, processor = tiny_model(tmp_path_factory.mktemp("examples"), heads={"marks": HEAD})
    samples = [shown(n, side, side) for n in (1, 2) for side in (LEFT, RIGHT)]
    inputs = collate([encode_sample(processor, one) for one in samples], pad_token_id=0).inputs
    assert inputs["target_examples"].shape == inputs["target_masks"].shape
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(100):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), processor


def overlap(mask: torch.Tensor, wanted: np.ndarray) -> float:
    found = mask.numpy()
    return float((found & (wanted == 1)).sum() / max((found | (wanted == 1)).sum(), 1))


def test_the_mask_in_the_question_decides_what_is_marked(trained: Any, tmp_path: Path) -> None:
    model, processor = trained
    pictures, sides = [picture(1), picture(1), picture(2)], [LEFT, RIGHT, LEFT]
    pairs = [(one, side) for one, side in zip(pictures, sides)]
    found = model.segment(pictures, example=pairs, processor=processor, max_new_tokens=16)
    assert [part.text for part in found] == ["It is [SEG]."] * 3
    for part, side in zip(found, sides):
        other = RIGHT if side is LEFT else LEFT
        assert overlap(part.masks[0], side) > 0.6 > 0.3 > overlap(part.masks[0], other)
    alone = model.segment(picture(1), example=(picture(1), RIGHT), processor=processor, max_new_tokens=16)
    assert overlap(alone.masks[0], RIGHT) > 0.6
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, own = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    same = again.eval().segment(picture(1), example=(picture(1), RIGHT), processor=own, max_new_tokens=16)
    assert torch.equal(same.masks, alone.masks)


def test_packed_rows_and_samples_without_an_example_change_no_loss(trained: Any) -> None:
    model, processor = trained
    samples = [shown(1, LEFT, RIGHT), asked(2, LEFT), shown(2, RIGHT, RIGHT)]
    encoded = [encode_sample(processor, one) for one in samples]
    assert encoded[1].examples is None and encoded[0].examples is not None
    padded = collate(encoded, pad_token_id=0).inputs
    packed = collate_packed([encoded], max_length=400, pad_token_id=0).inputs
    with torch.no_grad():
        first, second = (model(**inputs, use_cache=False).losses for inputs in (padded, packed))
        each = [model(**collate([one], pad_token_id=0).inputs).losses for one in encoded]
    for name in ("marks/bce", "marks/dice"):
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first[name], sum(one[name] for one in each) / 3, atol=1e-4, rtol=1e-4)


def test_an_example_belongs_to_its_own_conversation(trained: Any) -> None:
    from mllm.heads.base import Step

    model, processor = trained
    encoded = [encode_sample(processor, one) for one in (shown(1, LEFT, RIGHT), asked(2, LEFT), shown(2, RIGHT, LEFT))]
    packed = collate_packed([encoded], max_length=sum(len(one) for one in encoded), pad_token_id=0).inputs
    step = Step(packed["input_ids"], packed["labels"], position_ids=packed["position_ids"])
    laid = model.heads["marks"].lay(model, step, {k: packed[k] for k in ("target_masks", "target_examples")})
    assert laid.examples.which.tolist() == [0, -1, 1]
    assert laid.examples.owners.tolist() == [0, 3] and laid.owners.tolist() == [1, 2, 4]


def test_cells_of_a_mask() -> None:
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, :4, :4] = 1
    masks[1, 0, 0] = 1  # less than half of a cell: what it touches
    masks[2] = 255  # does not count
    cells = on_grid(masks, (2, 2))
    assert cells.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_what_does_not_fit_is_named(trained: Any, tmp_path: Path) -> None:
    model, processor = trained
    with pytest.raises(ConfigError, match="give one for all, or one each"):
        model.segment([picture(1)], example=[(picture(1), LEFT)] * 2, processor=processor)
    with pytest.raises(ConfigError, match=r"example 0 is ndarray; give \(picture, mask\)"):
        model.segment(picture(1), example=LEFT, processor=processor)
    with pytest.raises(DataError, match="example 0: the mask is 5 × 5 pixels and its picture 40 × 30"):
        model.segment(picture(1), example=(picture(1), np.ones((5, 5))), processor=processor)
    for mask, told in ((0 * LEFT, "example 0: its mask marks nothing"), (255 * LEFT, "holds 255, .* and no 1")):
        with pytest.raises(DataError, match=told):
            model.segment(picture(1), example=(picture(1), mask), processor=processor)
    with pytest.raises(ConfigError, match="threshold: 50 is no probability"):
        model.segment(picture(1), example=(picture(1), LEFT), processor=processor, threshold=50)
    with pytest.raises(DataError, match=r"holds \[EX\], which stands for the mask of an example, and gives none"):
        model.segment(picture(1), "what [EX] marks", processor=processor)
    with pytest.raises(DataError, match=r"holds \[EX\]"):
        ChatSession(model, processor).ask("[EX] What is here?")
    short = shown(1, LEFT, RIGHT)
    short.masks = []
    with pytest.raises(DataError, match=r"the questions hold 1 \[EX\] and the sample 0 masks in all"):
        encode_sample(processor, short)
    early = Sample(
        "e", [Turn("user", f"[EX] {IMAGE_MARK}"), Turn("assistant", "[SEG]")], [picture(1)], masks=[LEFT] * 2
    )
    with pytest.raises(DataError, match=r"\[EX\] stands before any picture"):
        encode_sample(processor, early)
    inputs = collate([encode_sample(processor, shown(1, LEFT, RIGHT))], pad_token_id=0).inputs
    with pytest.raises(AlignmentError, match=r"2 example masks for 1 \[EX\]"):
        model(**{**inputs, "target_examples": inputs["target_examples"].repeat(2, 1, 1)})
    plain = {name: value for name, value in HEAD.items() if name != "examples"}
    other, own = tiny_model(tmp_path, heads={"marks": plain})
    with pytest.raises(ConfigError, match="was not trained with examples"):
        other.segment(picture(1), example=(picture(1), LEFT), processor=own)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"decoder": {"type": "offset", "width": 32}}, "a offset decoder takes one prompt a mask; use query or sam"),
        ({"examples": {"heads": 5}}, "examples.heads: 5 do not divide decoder.width"),
        ({"examples": {"token": "[SEG]"}}, "stands for the masks of answers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        head_config({**HEAD, **changes}, where="model.heads.marks")


def test_sams_decoder_takes_the_examples_prompts() -> None:
    from mllm.heads.segmentation.head import SegmentationHead
    from mllm.heads.segmentation.in_context import Examples
    from mllm.types import VisionFeatures

    decoder = {"type": "sam", "width": 32, "layers": 1, "heads": 2, "mlp_width": 32}
    config: Any = head_config({**HEAD, "decoder": decoder, "encoder": "eye"}, where="x")
    info = EncoderInfo(image=ImageSpec(height=32, width=32), grid=(4, 4), width=32)
    torch.manual_seed(0)
    head = SegmentationHead(config, HeadParts(24, {"eye": info})).eval()
    features, hidden = VisionFeatures(torch.randn(4, 16, 32), (4, 4)), torch.randn(2, 3, 24)
    places, owners = torch.tensor([[0, 1], [1, 2]]), torch.tensor([1, 3])
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[:, :16] = 1
    both = Examples(masks, torch.tensor([0, 2]), torch.tensor([0, 1]))
    one = Examples(masks[1:], torch.tensor([2]), torch.tensor([-1, 0]))
    with torch.no_grad():
        first, _ = head.predict(hidden, places, owners, features, both)
        second, scores = head.predict(hidden, places, owners, features, one)
        none, _ = head.predict(hidden, places, owners, features)
    assert first.shape == (2, 16, 16) and scores is not None and scores.shape == (2,)
    torch.testing.assert_close(second[1], first[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second[0], none[0], rtol=1e-4, atol=1e-5)
    assert (first[0] - none[0]).abs().max() > 1e-3
