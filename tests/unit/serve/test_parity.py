"""Does the comparison find what differs, and only that?"""

from __future__ import annotations

import pytest
import torch

from mllm.processing.frames import VideoSpec
from mllm.serve import parity, traces
from mllm.types import IMAGE_MARK, Video
from tests.helpers import TINY_CLIP, TINY_LLM, tiny_model

VIEWS = {
    "width": 16,
    "num_heads": 2,
    "depth": 2,
    "patch_size": 7,
    "image_size": 28,
    "dinov2_width": 16,
    "dinov2_depth": 1,
}
VIEWS |= {"dinov2_heads": 2, "dinov2_image_size": 28}


def trace(**changes) -> parity.Trace:
    values = {
        "prompt_ids": [1, 2, 3],
        "token_ids": [5, 6],
        "logprobs": [{5: -0.1, 7: -2.0}, {6: -0.2, 8: -3.0}],
        "prompt": "a",
        "pixels": "hash",
        **changes,
    }
    return parity.Trace(**values)


CASE = parity.Case("case", [], [])


@pytest.mark.parametrize(
    ("changes", "first", "note"),
    [
        ({}, None, None),
        ({"prompt": None, "pixels": None}, None, None),
        ({"token_ids": [5, 9]}, 1, None),
        ({"token_ids": [5]}, None, "2 against 1 tokens"),
        ({"prompt_ids": [1, 2, 4]}, None, "prompt ids from position 2 (3 against 3)"),
        ({"prompt_ids": [1, 2]}, None, "prompt ids from position 2 (3 against 2)"),
        ({"pixels": "other"}, None, "pixels"),
        ({"prompt": "b"}, None, "rendered prompt"),
    ],
)
def test_every_kind_of_difference_is_found(changes, first, note):
    (found,) = parity.compare([CASE], [trace()], [trace(**changes)], path="p")
    assert found.first == first
    assert found.notes == ([note] if note else [])
    assert found.same == (first is None and note is None)


def test_the_gap_counts_common_tokens_up_to_the_first_difference():
    other = trace(token_ids=[9, 6], logprobs=[{5: -0.4, 9: -0.1}, {6: -9.0}])
    (found,) = parity.compare([CASE], [trace()], [other], path="p")
    assert found.gap == pytest.approx(0.3)


def test_standard_cases_cover_zero_to_five_pictures_text_alone_and_typed_placeholders():
    cases = parity.standard_cases(24, experts=["a", "b"])
    assert {len(case.images) for case in cases} == set(range(6))
    for case in cases:
        assert sum(turn.content.count(IMAGE_MARK) for turn in case.turns) == len(case.images)
    assert any("<image>" in case.turns[0].content for case in cases)
    assert any(len(case.turns) == 3 for case in cases)
    assert len({str(case.experts) for case in cases}) >= 4
    again = parity.standard_cases(24, experts=["a", "b"])
    assert [c.turns for c in again] == [c.turns for c in cases]


@torch.no_grad()
def test_trainer_forward_and_generate_agree_on_a_tiny_model_and_a_changed_model_is_caught(tmp_path):
    model, processor = tiny_model(tmp_path)
    cases = parity.standard_cases(4, max_images=2)
    reference = parity.trace_generate(model, processor, cases, num_tokens=4)
    forward = parity.trace_forward(model, processor, cases, reference)
    differences = parity.compare(cases, reference, forward, path="forward")
    assert all(d.same and d.gap < 1e-4 for d in differences)
    assert min(parity.check_encoders_matter(model, processor, cases[1]).values()) > 1e-4
    model.lm_head.weight.mul_(-1.0)
    changed = parity.compare(cases, reference, parity.trace_generate(model, processor, cases, num_tokens=4), path="x")
    assert not any(d.same for d in changed)


def test_pixels_are_told_apart_where_an_encoder_sees_fewer_views_than_its_neighbour():
    tiles, whole = torch.arange(24.0).view(4, 1, 2, 3), torch.ones(1, 1, 2, 2)
    seen = traces.hash_pixels({"detail": whole, "semantic": tiles})
    assert seen == traces.hash_pixels({"semantic": tiles.clone(), "detail": whole.clone()})
    changed = tiles.clone()
    changed[3] += 1
    assert seen != traces.hash_pixels({"semantic": changed, "detail": whole})
    assert seen != traces.hash_pixels({"semantic": tiles, "detail": whole.view(1, 1, 1, 4)})


@torch.no_grad()
@pytest.mark.parametrize("which", ["space_aware", "points"])
def test_clips_and_scenes_of_a_model_with_a_geometry_encoder(which, tmp_path):
    """Each encoder moves a logit, and so does that frames are seen together; forward and generate agree on all visuals."""
    geometry: dict = {"type": "mapanything", **VIEWS}
    if which == "points":
        geometry = {"type": "points", "width": 16, "patch_size": 7, "image_size": 28}
    language_model = {"config": {**TINY_LLM, "max_position_embeddings": 4096}, "tokenizer": str(tmp_path)}
    chosen = {"which": which, "candidates": 8} if which == "space_aware" else {}
    model, processor = tiny_model(
        tmp_path,
        encoders={"semantic": dict(TINY_CLIP), "geometry": geometry},
        video={"frames": 4, "stamp": "{seconds:.1f}s: ", **chosen},
        language_model=language_model,
    )
    for part in (model, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    found, moved = parity.run_parity(str(tmp_path / "checkpoint"), num_cases=6, num_tokens=3, vllm=False)
    assert len(found) == 6 and all(one.same for one in found)
    alone = set() if which == "points" else {f"geometry{parity.ALONE}"}
    assert moved.keys() == {"semantic", "geometry"} | alone and min(moved.values()) > 1e-4
    cases = parity.standard_cases(6, video=VideoSpec(**model.config.video), points="refuse" if not alone else None)
    visuals = [visual for case in cases for visual in case.images]
    assert any(isinstance(v, Video) and isinstance(v.source, list) for v in visuals), "pictures of a scene"
    assert all(isinstance(v, Video) and v.points for v in visuals) == (which == "points")
