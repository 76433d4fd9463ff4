"""Does a model that looks at tiles train, answer and come back from disk like one that looks once?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm.data.collate import collate, collate_packed
from mllm.errors import AlignmentError, ConfigError
from mllm.models.build import build_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.processing.processor import MllmProcessor
from mllm.types import IMAGE_MARK, Turn
from tests.helpers import TINY_CLIP, picture, samples_of_unlike_sizes, tiny_model, tiny_spec

TILES = {"type": "tiles", "grids": [[1, 2], [2, 1], [2, 2]]}
ROUTED = {
    "encoders": {"base": TINY_CLIP, "expert": TINY_CLIP},
    "router": {"type": "gate", "experts": ["expert"], "top_k": 1},
}
"""width × height of each sample's pictures"""


@pytest.fixture(scope="module", params=["plain", "routed"])
def tiled(request: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    return tiny_model(tmp_path_factory.mktemp("tiled"), views=TILES, **(ROUTED if request.param == "routed" else {}))


@torch.no_grad()
def losses_alone(model: Any, encoded: list[Any]) -> list[float]:
    return [float(model(**collate([sample], pad_token_id=0).inputs).loss) for sample in encoded]


def test_samples_give_the_same_loss_alone_padded_and_packed(tiled: tuple[Any, Any]) -> None:
    model, processor = tiled
    encoded = [encode_sample(processor, sample) for sample in samples_of_unlike_sizes()]
    assert [sample.num_images for sample in encoded] == [1, 0, 2, 1]
    counts = torch.tensor([sample.num_supervised for sample in encoded], dtype=torch.float32)
    wanted = float((torch.tensor(losses_alone(model, encoded)) * counts).sum() / counts.sum())
    padded = collate(encoded, pad_token_id=0)
    assert padded.inputs["image_sizes"].tolist() == [[30, 60], [50, 20], [40, 40], [3, 300]]
    packed = collate_packed([encoded[:3], encoded[3:]], max_length=sum(map(len, encoded[:3])), pad_token_id=0)
    with torch.no_grad():
        assert abs(float(model(**padded.inputs).loss) - wanted) < 1e-5
        assert abs(float(model(**padded.inputs, skip_logits=True).loss) - wanted) < 1e-5
        assert abs(float(model(**packed.inputs, skip_logits=True, use_cache=False).loss) - wanted) < 1e-5


def test_every_part_learns_from_tiles_and_a_text_batch_touches_the_same_parts(tiled: tuple[Any, Any]) -> None:
    model, processor = tiled
    encoded = [encode_sample(processor, sample) for sample in samples_of_unlike_sizes()]
    touched = []
    model.train()
    for batch in (encoded, [encoded[1]]):
        model.zero_grad()
        model(**collate(batch, pad_token_id=0).inputs).loss.backward()
        touched.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    model.eval()
    assert "model.multi_modal_projector.newline" in touched[0]
    assert touched[0] == touched[1], "ranks with and without pictures would reduce different gradients"


def test_a_text_that_is_cut_loses_whole_pictures(tiled: tuple[Any, Any]) -> None:
    _, processor = tiled
    long = samples_of_unlike_sizes()[2]
    long.turns = [
        Turn("user", IMAGE_MARK),
        Turn("assistant", "first"),
        Turn("user", IMAGE_MARK),
        Turn("assistant", "second"),
    ]
    whole = encode_sample(processor, long)
    first, second = processor.image_layouts(long.images)
    second_start = whole.input_ids.tolist().index(processor.image_token_id, len(whole) - second.num_tokens - 40)
    cut = encode_sample(processor, long, max_length=second_start + 3)
    assert cut.truncated and cut.num_images == 1 and len(cut.pixels["pixel_values"]) == first.num_views
    assert int((cut.input_ids == processor.image_token_id).sum()) == first.num_tokens
    assert cut.extras["image_sizes"].tolist() == [[50, 20]]


def test_batches_and_beams_answer_like_single_prompts(tiled: tuple[Any, Any]) -> None:
    model, processor = tiled
    texts = [f"{'<image>' * len(sample.images)} {'which ' * k}" for k, sample in enumerate(samples_of_unlike_sizes())]
    images = [sample.images for sample in samples_of_unlike_sizes()]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 2):
        batch = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        together = model.generate(**batch, num_beams=beams, **options)[:, batch["input_ids"].shape[1] :]
        for row, (text, pictures) in enumerate(zip(texts, images)):
            single = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
            alone = model.generate(**single, num_beams=beams, **options)[:, single["input_ids"].shape[1] :]
            assert alone[0].tolist() == together[row].tolist(), (row, beams)


def test_it_comes_back_from_disk_and_says_what_is_missing(tiled: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiled
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reread = (
        MllmForConditionalGeneration.from_pretrained(tmp_path).eval(),
        MllmProcessor.from_pretrained(tmp_path),
    )
    assert reread.layout_key == processor.layout_key and again.config.views == model.config.views
    inputs = reread(text=["<image> q"], images=[picture(1, size=(90, 30))], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
        with pytest.raises(AlignmentError, match=r"image_sizes.*got none"):
            model(**{key: value for key, value in inputs.items() if key != "image_sizes"})
        with pytest.raises(AlignmentError, match="1 images have 5 views"):
            model(**{**inputs, "image_sizes": torch.tensor([[56, 56]])})


def test_a_checkpoint_from_before_there_were_views_opens_unchanged(tmp_path: Path) -> None:
    model, processor = tiny_model(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stripped = 0
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        if not (tmp_path / name).is_file():
            continue
        data = json.loads((tmp_path / name).read_text())
        for part in (data, data.get("image_processor", {})):
            stripped += part.pop("views", "absent") != "absent"
            part.get("layout", {}).pop("in_place", None)
        (tmp_path / name).write_text(json.dumps(data))
    assert stripped, "this test takes out what later versions wrote"
    again, reread = (
        MllmForConditionalGeneration.from_pretrained(tmp_path).eval(),
        MllmProcessor.from_pretrained(tmp_path),
    )
    inputs, before = (p(text=["<image> q"], images=[picture(1)], return_tensors="pt") for p in (reread, processor))
    assert set(inputs) == set(before) and torch.equal(inputs["input_ids"], before["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**before).logits, atol=1e-5, rtol=1e-5)


def test_what_takes_whole_pictures_only_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.views: a language_model router asks with whole pictures"):
        build_config(
            tiny_spec(
                str(tmp_path), views=TILES, **{**ROUTED, "router": {"type": "language_model", "experts": ["expert"]}}
            )
        )
    with pytest.raises(ConfigError, match=r"model\.views\.grids"):
        build_config(tiny_spec(str(tmp_path), views={"type": "tiles", "grids": "2x2"}))
