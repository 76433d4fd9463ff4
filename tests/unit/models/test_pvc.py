"""Does a frame see those before it and none after it, does a picture become so many frames, and does such a model learn and answer?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from mllm.data.collate import collate, collate_packed
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError, UnavailableError
from mllm.models.build import build_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.serve.vllm.refusals import refuse_unserved
from mllm.timed import relative_times
from mllm.types import IMAGE_MARK, Sample, Turn, Video
from tests.helpers import TINY_CLIP, picture, tiny_model, tiny_spec
from tests.videos import painted

FRAMES: dict[str, Any] = {**TINY_CLIP, "type": "progressive", "temporal_layers": 2, "time_width": 16}
PVC: dict[str, Any] = {
    "encoders": {"frames": FRAMES},
    "connector": {"type": "pvc", "factor": 2, "repeats": 3, "time_width": 16},
    "video": {"frames": 4},
}


def stir(*modules: Any) -> None:
    """Values for what starts at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.02)
                )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> tuple[Any, Any]:
    model, processor = tiny_model(tmp_path_factory.mktemp("pvc"), **PVC)
    stir(model.model.vision_tower.encoders["frames"].temporal, model.model.multi_modal_projector.norm)
    return model, processor


def film(*numbers: int) -> Video:
    return Video([Image.fromarray(painted(number)) for number in numbers], fps=1)


def sample(*visuals: Any) -> Sample:
    marks = "".join(IMAGE_MARK + "\n" for _ in visuals)
    return Sample("s", [Turn("user", f"{marks}What is shown?"), Turn("assistant", "seven")], list(visuals))


def by_call(processor: Any, text: Any, **inputs: Any) -> Any:
    return processor(text=text, return_tensors="pt", padding=True, add_special_tokens=False, **inputs)


@torch.no_grad()
def test_a_frame_sees_those_before_it_and_starts_as_the_vit_alone() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config(FRAMES, where="e")).eval()
    plain = build_encoder(encoder_config(TINY_CLIP, where="e")).eval()
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if not k.startswith("temporal.")})
    pixels, scenes = torch.randn(6, 3, 28, 28), torch.tensor([0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(encoder(pixels, scene_ids=scenes).tokens, plain(pixels).tokens, atol=1e-6, rtol=1e-5)
    stir(encoder.temporal)
    found = encoder(pixels, scene_ids=scenes).tokens
    for changed, same, moved in [(2, [0, 1, 3, 4, 5], [2]), (0, [3, 4, 5], [0, 1, 2]), (4, [0, 1, 2, 3], [4, 5])]:
        other = pixels.clone()
        other[changed] = torch.randn(3, 28, 28)
        again = encoder(other, scene_ids=scenes).tokens
        torch.testing.assert_close(again[same], found[same], atol=1e-5, rtol=1e-4)
        assert all(not torch.allclose(again[k], found[k], atol=1e-3) for k in moved)
    for rows in ([0, 1, 2], [3], [4, 5]):
        alone = encoder(pixels[rows], scene_ids=torch.zeros(len(rows), dtype=torch.long)).tokens
        torch.testing.assert_close(alone, found[rows], atol=1e-5, rtol=1e-4)
    still = encoder(pixels[:1].expand(3, -1, -1, -1), scene_ids=torch.zeros(3, dtype=torch.long)).tokens
    assert not torch.allclose(still[0], still[1], atol=1e-4), "the time tells equal frames apart"
    assert relative_times([3, 1, 2]).tolist() == [0.0, 0.5, 1.0, 0.0, 0.0, 1.0] and not len(relative_times([]))


@torch.no_grad()
def test_a_picture_is_so_many_equal_frames(parts: Any) -> None:
    model, processor = parts
    inputs = by_call(processor, "<image> and <image>", images=[[picture(1), film(0, 4, 8, 12)]])
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 3 * 4 + 4 * 4
    assert [len(inputs[key]) for key in processor.pixel_keys.values()] == [3 + 4]
    still, moving = model.get_image_features(**{k: inputs[k] for k in ("pixel_values", "video_times")}).pooler_output
    assert (len(still), len(moving)) == (12, 16) and not torch.allclose(still[:4], still[4:8], atol=1e-3)
    as_film = by_call(processor, "<image>", images=[[Video([picture(1)] * 3, fps=1)]])
    same = model.get_image_features(**{k: as_film[k] for k in ("pixel_values", "video_times")}).pooler_output[0]
    torch.testing.assert_close(same, still, atol=1e-5, rtol=1e-4)


def test_samples_are_learned_from_as_if_alone(parts: Any) -> None:
    model, processor = parts
    samples = [encode_sample(processor, s) for s in (sample(film(0, 9, 3)), sample(), sample(picture(2), film(7, 8)))]
    padded = collate(samples, pad_token_id=0)
    packed = collate_packed([samples], max_length=sum(map(len, samples)) + 3, pad_token_id=0)
    own = {n: p for n, p in model.named_parameters() if ".temporal." in n or "projector" in n}

    def gradients(inputs: Any, count: int) -> tuple[Any, dict[str, Any]]:
        model.zero_grad()
        loss = model(**inputs, use_cache=False).loss * count
        model(**collate([samples[2]], pad_token_id=0).inputs)  # another pass between
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in own.items()}

    model.train()
    try:
        each = [gradients(collate([one], pad_token_id=0).inputs, one.num_supervised) for one in samples]
        count = sum(one.num_supervised for one in samples)
        sums = {n: torch.stack([found[n] for _, found in each]).sum(0) for n in own}
        assert all(value.any() for value in sums.values())
        for inputs, again in ((padded.inputs, False), (packed.inputs, False), (packed.inputs, True)):
            if again:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            loss, found = gradients(inputs, count)
            torch.testing.assert_close(loss, sum(one for one, _ in each), atol=1e-4, rtol=1e-4)
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, sums[name], atol=1e-3, rtol=2e-3, msg=name)
        model.gradient_checkpointing_disable()
    finally:
        model.eval()


@torch.no_grad()
def test_answers_and_files(parts: Any, tmp_path: Any) -> None:
    model, processor = parts
    prompts = [
        ("<image>\nWhat?", [film(1, 2, 3, 4)]),
        ("Words alone here.", []),
        ("<image> <image>!", [picture(1), film(9, 8)]),
    ]
    inputs = by_call(processor, [text for text, _ in prompts], images=[visuals for _, visuals in prompts])
    start = inputs["input_ids"].shape[1]
    answers = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(answers, model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False))
    for number, (text, visuals) in enumerate(prompts):
        alone = by_call(processor, text, **({"images": [visuals]} if visuals else {}))
        answer = model.generate(**alone, max_new_tokens=5, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert answer.tolist() == answers[number, start:].tolist()
    model.save_pretrained(tmp_path)
    opened = MllmForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(opened(**inputs).logits, model(**inputs).logits, atol=1e-6, rtol=0)
    with pytest.raises(UnavailableError, match=r"shows a picture 3 times \(connector pvc\).*mllm chat"):
        refuse_unserved(model.config)
    for changes, told in [
        ({"video": None}, r"shows pictures as videos that are seen once; add model\.video"),
        ({"views": {"type": "tiles"}}, r"leave model\.views \(tiles\) out"),
        ({"encoders": {"frames": {**FRAMES, "temporal_layers": 9}}}, "temporal_layers: 9 of 2 blocks that run"),
    ]:
        with pytest.raises(ConfigError, match=told):
            build_config(tiny_spec(str(tmp_path), **{**PVC, **changes}))
