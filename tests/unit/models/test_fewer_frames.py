"""Is each encoder given the frames of a video that the model's own section says, in training, answers and beside pictures?"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mllm.data.collate import collate, collate_packed
from mllm.errors import ConfigError
from mllm.models.build import build_config
from mllm.processing.chat import encode_sample
from mllm.train.prepare import attention_inputs
from mllm.types import Video
from tests.helpers import TINY_CLIP, picture, tiny_model, tiny_spec
from tests.unit.models.test_video import TINY_VGGT, by_call, frames_at, sample

EVERY = {"frames": 6, "fewer": {"detail": 3}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), video=EVERY)


def film(count=21, **more):
    """Each frame is as bright as its number says: an encoder's crop keeps that."""
    return Video([Image.new("RGB", (40, 30), (10 * number,) * 3) for number in range(count)], fps=10, **more)


def seen(processor, batch):
    """Encoder → numbers of the frames that it is given."""
    found = {}
    for name, key in processor.pixel_keys.items():
        spec = processor.image_processor.specs[name]
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
        levels = (batch[key] * std + mean).mul(255).mean((1, 2, 3))
        found[name] = [round(level / 10) for level in levels.tolist()]
    return found


@pytest.mark.parametrize(
    ("clip", "semantic", "detail"),
    [
        (film(), [0, 4, 8, 12, 16, 20], [0, 8, 16]),
        (film(play="reversed"), [20, 16, 12, 8, 4, 0], [20, 12, 4]),
        (film(play="frozen"), [12] * 6, [12] * 3),
        (film(frames=(3, 1, 5, 7)), [3, 1, 5, 7], [3, 1, 5]),
        (film(3), [0, 1, 2], [0, 1, 2]),
        (film(1), [0], [0]),
    ],
    ids=["whole", "reversed", "frozen", "chosen", "short", "one"],
)
def test_each_encoder_is_given_its_own_frames(parts, clip, semantic, detail):
    _, processor = parts
    batch = by_call(processor, "<video>?", videos=clip)
    assert seen(processor, batch) == {"semantic": semantic, "detail": detail}
    encoded = encode_sample(processor, sample(clip))
    assert all(torch.equal(encoded.pixels[key], batch[key]) for key in processor.pixel_keys.values())
    keys = processor.pixel_keys
    assert encoded.num_views == {keys["semantic"]: len(semantic), keys["detail"]: len(detail)}
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 16 * len(semantic), "no token less"


def held(batch, key, places):
    return {**batch, key: batch[key][places]}


@pytest.mark.parametrize(
    "connector",
    [
        {"type": "channel_concat"},
        {"type": "merv", "grid": [2, 2], "hidden": 16},
        {"type": "gated_fusion", "width": 16, "frames": 2},
        {"type": "spatial_mllm"},
    ],
    ids=lambda connector: connector["type"],
)
def test_between_its_frames_an_encoder_holds_what_it_saw(tmp_path, connector):
    """As a model that gives it the held frame again: pictures in the batch stay as they are."""
    encoders = {"semantic": dict(TINY_CLIP), "detail": {**TINY_CLIP, "layers": [-1]}}
    same = {"encoders": encoders, "connector": connector}
    model, processor = tiny_model(tmp_path, video=EVERY, **same)
    whole, reader = tiny_model(tmp_path, video={"frames": 6}, **same)
    whole.load_state_dict(model.state_dict())
    asked = {"text": "<image> and <video>?", "images": picture(1), "videos": film()}
    few, all_ = by_call(processor, **asked), by_call(reader, **asked)
    assert torch.equal(few["input_ids"], all_["input_ids"])
    shown = reader.rules.view.shown
    places = [*range(shown), *(shown + k - k % 2 for k in range(6))]
    key = reader.pixel_keys["detail"]
    with torch.no_grad():
        torch.testing.assert_close(model(**few).logits, whole(**held(all_, key, places)).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(model(**few).logits, whole(**all_).logits, atol=1e-4)


def test_padded_packed_and_generated_alike(parts):
    model, processor = parts
    samples = [encode_sample(processor, one) for one in (sample(film()), sample(picture(2), film(2)), sample(film(9)))]
    room = sum(map(len, samples)) + 5
    padded = collate(samples, pad_token_id=0)
    packed = collate_packed([samples], max_length=room, pad_token_id=0)
    assert len(padded.inputs["pixel_values"]) == 6 + 1 + 2 + 6
    with torch.no_grad():
        apart = [model(**collate([s], pad_token_id=0).inputs).loss * s.num_supervised for s in samples]
        for batch in (padded, packed):
            torch.testing.assert_close(
                model(**attention_inputs(batch, "sdpa")).loss * batch.num_supervised,
                torch.stack(apart).sum(),
                atol=1e-3,
                rtol=1e-4,
            )
    prompts = by_call(processor, ["<image>?", "<image>? <image>"], images=[[film()], [picture(2), film(4)]])
    options = {"max_new_tokens": 5, "do_sample": False}
    answers = model.generate(**prompts, **options)
    alone = by_call(processor, "<image>? <image>", images=[[picture(2), film(4)]])
    own = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
    assert own.tolist() == answers[1, prompts["input_ids"].shape[1] :][: len(own)].tolist()
    assert len(model.generate(**prompts, **options, num_beams=2)) == 2


def test_a_geometry_encoder_joins_the_frames_that_it_is_given(tmp_path):
    encoders = {"semantic": dict(TINY_CLIP), "geometry": dict(TINY_VGGT)}
    video = {"frames": 5, "fewer": {"geometry": 2}}
    model, processor = tiny_model(tmp_path, video=video, encoders=encoders, connector={"type": "spatial_mllm"})
    batch = by_call(processor, "<video>?", videos=Video(frames_at(0, 1, 2, 3, 4), fps=1))
    assert [len(batch[key]) for key in processor.pixel_keys.values()] == [6, 2], "five frames in three groups"
    model.train()(**collate([encode_sample(processor, sample(film()))], pad_token_id=0).inputs).loss.backward()
    model.eval()
    ran = model.model.vision_tower.num_encoded
    ran.clear()
    with torch.no_grad():
        model(**batch)
    assert dict(ran) == {"semantic": 6, "geometry": 2}


@pytest.mark.parametrize(
    ("video", "told"),
    [
        ({"frames": 6, "fewer": {"details": 2}}, "'details' is no encoder of this model; it has semantic, detail"),
        ({"frames": 6, "fewer": {"detail": 6}}, "fewer.detail: 6 is not between 1 and 5"),
        ({"fps": 1, "max_frames": 4, "fewer": {"detail": 0}}, "fewer.detail: 0 is not between 1 and 3"),
        ({"frames": 6, "fewer": {"detail": 2, "semantic": 3}}, "every encoder is given fewer frames than there are"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, video, told):
    with pytest.raises(ConfigError, match=told):
        build_config(tiny_spec(str(tmp_path), video=video))
