"""Do encoders of unlike times meet on one time axis, as MERV has it, and does a clip's encoder read what transformers' reads?"""

from __future__ import annotations

import pytest
import torch
from transformers import VivitConfig, VivitModel

from mllm.connectors import CONNECTORS
from mllm.connectors.build import build_connector
from mllm.data.collate import collate
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.vivit import VivitEncoder
from mllm.errors import ConfigError
from mllm.models.build import build_config
from mllm.processing.chat import encode_sample
from mllm.testing.connectors import sample_features
from mllm.testing.encoders import build_example
from mllm.types import Block, VisualLayout
from tests.helpers import TINY_CLIP, picture, tiny_model, tiny_spec
from tests.unit.models.test_fewer_frames import film
from tests.unit.models.test_video import by_call, sample

CLIPS = {**VivitEncoder.tiny(), "image_size": 16}


@pytest.fixture(scope="module")
def encoder():
    return build_example(encoder_config(CLIPS, where="x"))


@torch.no_grad()
def test_a_whole_clip_gives_the_tokens_of_transformers(encoder):
    known = {key: value for key, value in CLIPS["architecture"].items() if key != "model_type"}
    reference = VivitModel(VivitConfig(**known), add_pooling_layer=False).eval()
    reference.load_state_dict(encoder.model.state_dict())
    frames = torch.randn(6, 3, 16, 16)
    found = encoder(frames, scene_ids=torch.tensor([3, 3, 3, 3, 1, 1])).tokens
    whole = reference(pixel_values=frames[None, :4]).last_hidden_state[0, 1:].unflatten(0, (2, 16))
    torch.testing.assert_close(found[:4], whole.repeat_interleave(2, 0), atol=1e-5, rtol=1e-4)
    short = reference(pixel_values=frames[None, [4, 4, 5, 5]]).last_hidden_state[0, 1:].unflatten(0, (2, 16))
    torch.testing.assert_close(found[4:], short, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_frame_between_two_tubelets_is_given_both_and_a_picture_all(encoder):
    frames = torch.randn(3, 3, 16, 16)
    found = encoder(frames, scene_ids=torch.zeros(3, dtype=torch.long)).tokens
    whole = encoder.model(pixel_values=frames[None, [0, 0, 1, 2]]).last_hidden_state[0, 1:].unflatten(0, (2, 16))
    torch.testing.assert_close(found, whole[[0, 1, 1]], atol=1e-5, rtol=1e-4)
    alone = encoder(frames[:1]).tokens
    still = encoder.model(pixel_values=frames[None, [0] * 4]).last_hidden_state[0, 1:].unflatten(0, (2, 16))
    torch.testing.assert_close(alone[0], still.mean(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"its clips have 4 frames, and a video has 5; give it fewer"):
        encoder(torch.randn(5, 3, 16, 16), scene_ids=torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architecture": TINY_CLIP["architecture"]}, "'clip_vision_model' reads no clips"),
        ({"image_size": (16, 32)}, "is not square"),
        ({"architecture": {**CLIPS["architecture"], "num_frames": 5}}, "does not divide 5 frames"),
    ],
)
def test_what_is_no_clip_encoder_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        build_encoder(encoder_config({**CLIPS, **change}, where="x"))


@torch.no_grad()
def test_two_frames_become_one_set_by_the_published_pooling():
    """The authors' pooling over 3-D maps; weights of the encoders from the mean over the whole video."""
    spec, encoders, width = CONNECTORS.get("merv").tiny()
    connector = build_connector({**spec, "frames": 2}, encoders, width).eval()
    features = sample_features(type(connector), connector.config, encoders, 6)
    block = Block(4, (1, 2, 2))
    film_ = VisualLayout((block, Block(4, (1, 2, 2), view=2)), num_views=4, frames=4)
    still = VisualLayout((block,), num_views=2)
    tokens = connector(features, None, None, [film_, still])
    volumes = []
    for name, found in features.items():
        maps = found.tokens.transpose(1, 2).unflatten(2, found.grid)  # 6, D, rows, cols
        halves = [
            torch.nn.functional.adaptive_avg_pool3d(maps[a:b].transpose(0, 1), (n, 2, 2))
            for a, b, n in ((0, 4, 2), (4, 6, 1))
        ]
        volumes.append([connector.poolers[name].projector(half.flatten(1).T) for half in halves])
    for visual, place in ((0, slice(0, 8)), (1, slice(8, 12))):
        mixed, _ = connector.mixture(torch.stack([volume[visual] for volume in volumes])[None])
        torch.testing.assert_close(tokens[place], mixed[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="pooling attentive reads each frame by itself; frames: 2 needs average"):
        build_connector({**spec, "frames": 2, "pooling": "attentive", "num_heads": 2}, encoders, width)


def test_videos_longer_than_a_clip_are_refused_before_anything_is_built(tmp_path):
    encoders = {"language": dict(TINY_CLIP), "temporal": CLIPS}
    with pytest.raises(
        ConfigError,
        match=r"model.encoders.temporal: its clips have 4 frames, and a video has up to 6; add model.video.fewer: {temporal: 4}",
    ):
        build_config(
            tiny_spec(str(tmp_path), video={"frames": 6}, encoders=encoders, connector={"type": "merv", "grid": [2, 2]})
        )
    build_config(
        tiny_spec(
            str(tmp_path),
            video={"frames": 6, "fewer": {"temporal": 4}},
            encoders=encoders,
            connector={"type": "merv", "grid": [2, 2]},
        )
    )


def test_a_model_of_three_encoders_with_times_of_their_own_trains_and_answers(tmp_path):
    encoders = {"language": dict(TINY_CLIP), "temporal": CLIPS, "spatial": {**TINY_CLIP, "layers": [-1]}}
    video = {"frames": 4, "fewer": {"language": 2, "spatial": 2}}
    merv = {"type": "merv", "frames": 2, "grid": [2, 2], "hidden": 16}
    model, processor = tiny_model(tmp_path, video=video, encoders=encoders, connector=merv)
    batch = by_call(processor, ["<image>?", "<image>? <image>"], images=[[film()], [picture(2), film(3)]])
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == (2 + 1 + 2) * 4
    assert [len(batch[key]) for key in processor.pixel_keys.values()] == [2 + 2 + 2, 4 + 2 + 4, 2 + 2 + 2]
    samples = [encode_sample(processor, one) for one in (sample(film()), sample(picture(2), film(3)))]
    loss = model.train()(**collate(samples, pad_token_id=0).inputs).loss
    loss.backward()
    assert all(e.parameters().__next__().grad is not None for e in model.model.vision_tower.encoders.values())
    model.eval()
    with torch.no_grad():
        apart = [model(**collate([one], pad_token_id=0).inputs).loss * one.num_supervised for one in samples]
        whole = collate(samples, pad_token_id=0)
        torch.testing.assert_close(
            model(**whole.inputs).loss * whole.num_supervised, torch.stack(apart).sum(), atol=1e-3, rtol=1e-4
        )
    answers = model.generate(**batch, max_new_tokens=4, do_sample=False)
    alone = by_call(processor, "<image>? <image>", images=[[picture(2), film(3)]])
    own = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
    assert own.tolist() == answers[1, batch["input_ids"].shape[1] :][: len(own)].tolist()
