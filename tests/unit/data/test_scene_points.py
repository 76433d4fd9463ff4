"""Does a video get a file of points that what reads such files takes?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllm.data.scene_points import PointWriter, write_points
from mllm.encoders.pi3 import Pi3Encoder
from mllm.encoders.vggt import VggtEncoder
from mllm.encoders.vggt_points import PointReader
from mllm.errors import ConfigError, DataError
from mllm.processing.frames import VideoSpec
from mllm.processing.videos import frames_of
from mllm.types import Video
from tests.unit.encoders.views import stirred
from tests.videos import write_clip

SMALL = {**VggtEncoder.tiny(), "depth": 4, "layers": [1, 2, 3, 4], "patch_embed": "conv", "keep_prefix": False}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A small VGGT's config with weights in a file."""
    folder, donor = tmp_path_factory.mktemp("vggt"), PointReader(stirred(SMALL))
    with torch.no_grad():  # all random weights put every pixel in one place: spread them
        donor.head.scratch.output_conv2[2].weight.mul_(30)
    state = {f"aggregator.{k}": v for k, v in donor.encoder.model.state_dict().items()}
    state |= {f"point_head.{k}": v for k, v in donor.head.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return {**SMALL, "weights": {"source": str(folder)}}


def test_points_lie_beside_the_video_and_choose_its_frames(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    clip = write_clip(tmp_path / "room.mp4", 20)  # 128 × 48 pixels
    writer = PointWriter(spec, frames=6, size=32, side=8)
    ((video, target, count),) = write_points(writer, [clip])
    assert (video, target.name, count) == (clip, "room.mp4.points.npz", 6)
    with np.load(target) as told:
        assert told["frames"].tolist() == [0, 3, 7, 11, 15, 19]
        assert told["points"].shape == (6, 6, 8, 3) and told["confidence"].shape == (6, 6, 8)
        assert np.isfinite(told["points"]).all() and told["points"].std() > 0 and told["confidence"].min() >= 1
    seen = frames_of(Video(str(clip)), VideoSpec(frames=3, which="space_aware", candidates=6), where="room")
    assert 1 <= len(seen.chosen.numbers) <= 3 and set(seen.chosen.numbers) <= {0, 3, 7, 11, 15, 19}
    kept = target.stat().st_mtime_ns
    assert list(write_points(writer, [clip])) == [(clip, target, None)] and target.stat().st_mtime_ns == kept
    assert next(iter(write_points(writer, [clip], force=True)))[2] == 6 and target.stat().st_mtime_ns > kept
    assert [path.name for path in tmp_path.glob("*.npz")] == ["room.mp4.points.npz"], "nothing half written is left"


def test_videos_of_unlike_shapes_share_their_weights(spec, tmp_path):
    for name, shape in (("wide", (2, 12, 24, 3)), ("high", (3, 24, 12, 3))):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    writer = PointWriter(spec, frames=8, size=24, side=None)
    found = list(write_points(writer, [tmp_path / "wide.npy", tmp_path / "high.npy"]))
    assert [count for _, _, count in found] == [2, 3]
    shapes = [np.load(target)["points"].shape for _, target, _ in found]
    assert shapes == [(2, 12, 24, 3), (3, 24, 12, 3)]
    one, other = writer._readers.values()
    assert one.head is other.head
    assert next(one.encoder.parameters()).data_ptr() == next(other.encoder.parameters()).data_ptr()


def test_what_cannot_be_done_is_told(spec, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"broken\.mp4"):
        list(write_points(PointWriter(spec, size=32), [tmp_path / "broken.mp4"]))
    assert not list(tmp_path.glob("*.npz"))
    clip = write_clip(tmp_path / "clip.mp4", 3)
    with pytest.raises(ConfigError, match="pi3 has no such head"):
        list(write_points(PointWriter({**Pi3Encoder.tiny(), "layers": [-1]}, size=32), [clip]))
