"""Does a model see in one row of pixels a visual, as TRL's trainers carry it, what it sees in its processor's own output?"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoProcessor

from mllm.errors import DataError
from mllm.processing.template import parts_of
from mllm.train.stages.preference.one_pixel_tensor import OnePixelTensor, _digits, _numbers, read_video
from mllm.train.stages.preference.stage import PreferenceOptions, as_row
from mllm.types import IMAGE_MARK, Sample, Turn, Video, scene
from tests.helpers import picture, tiny_model

KINDS = {
    "frames": ({"video": {"frames": 4, "fewer": {"detail": 2}, "stamp": "{seconds:.1f} "}}, True),
    "pairs": ({"video": {"frames": 5}, "connector": {"type": "spatial_mllm"}}, True),
    "one encoder": ({"video": {"fps": 2}, "encoders": None}, True),
    "tiles": ({"views": {"type": "tiles", "grids": [[1, 2], [2, 1]], "thumbnail_only": ["detail"]}}, False),
}


def film(count, **more):
    return Video([picture(number) for number in range(count)], fps=10, **more)


@pytest.mark.parametrize(("changes", "videos"), KINDS.values(), ids=list(KINDS))
def test_one_row_a_visual_is_what_the_processor_gives(tmp_path, changes, videos):
    """Batches cut in two between samples, as TRL cuts them, and rows read before (videos are decoded there, once)."""
    from tests.helpers import TINY_CLIP

    changes = {key: {"semantic": dict(TINY_CLIP)} if value is None else value for key, value in changes.items()}
    model, processor = tiny_model(tmp_path, **changes)
    prompts = ["<image>?", "words alone", "<image> or <image>?", "<image>"]
    shown = [[film(9)], [], [picture(5, size=(60, 20)), scene([picture(7), picture(8)], [0, 1.5])], [film(2)]]
    if not videos:
        shown = [[picture(3, size=(90, 30))], [], [picture(5, size=(20, 60)), picture(6)], [picture(9, size=(61, 59))]]
    options = {"text": prompts, "return_tensors": "pt", "padding": True}
    plain = processor(images=shown, **options)
    with torch.no_grad():
        wanted = model(**plain).logits
    read = [[read_video(v, processor, "x") if isinstance(v, Video) else v for v in visuals] for visuals in shown]
    with OnePixelTensor(model, processor) as joined:
        for images in (shown, copy.deepcopy(read)):
            found = joined.processor(images=images, **options)
            assert set(found) == {"input_ids", "attention_mask", "pixel_values"}
            assert torch.equal(found["input_ids"], plain["input_ids"]) and len(found["pixel_values"]) == 4
            with torch.no_grad():
                torch.testing.assert_close(model(**found).logits, wanted, rtol=0, atol=0)
                for rows, visuals in ((slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 4))):
                    part = {k: v[visuals if k == "pixel_values" else rows] for k, v in found.items()}
                    torch.testing.assert_close(model(**part).logits, wanted[rows], rtol=1e-4, atol=1e-5)
        written = model.generate(**found, max_new_tokens=4, do_sample=False)
        joined.processor.save_pretrained(tmp_path / "saved")
    assert torch.equal(written, model.generate(**plain, max_new_tokens=4, do_sample=False))
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is type(processor) and set(again(images=shown, **options)) == set(plain)


def test_numbers_travel_as_digits_that_bfloat16_holds():
    told = torch.tensor([[0, -1, 127, 128], [14_400_000, 268_435_455, -1, 999]])
    assert torch.equal(_numbers(_digits(told).to(torch.bfloat16)), told)


def test_a_row_whose_video_cannot_be_read_is_named(tmp_path):
    _, processor = tiny_model(tmp_path, video={"frames": 4})
    options = PreferenceOptions(rewards=["x:y"])
    turns = [Turn("user", f"{IMAGE_MARK}How far?"), Turn("assistant", "2.5")]
    row = as_row(
        Sample("7", turns, [film(9)], "rooms", {"question_type": "object_abs_distance"}), "grpo", options, processor
    )
    assert row["prompt"][0]["content"] == parts_of(turns[0].content, IMAGE_MARK) and row["target"] == "2.5"
    assert row["images"][0].chosen.numbers == (0, 2, 5, 8) and row["images"][0].pixels["semantic"].shape[0] == 4
    with pytest.raises(DataError, match=r"sample '8' of rooms, image 0: no-such.mp4|no-such.mp4"):
        as_row(Sample("8", turns, [Video("no-such.mp4")], "rooms", {}), "grpo", options, processor)
