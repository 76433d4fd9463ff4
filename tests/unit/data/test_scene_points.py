"""Does a video get a file of points that what reads such files takes?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm.data.scene_points import PointWriter, write_points
from mllm.encoders.pi3 import Pi3Encoder
from mllm.encoders.points import PointsEncoder
from mllm.encoders.view_points import READERS
from mllm.errors import ConfigError, DataError
from mllm.processing.depth_maps import read_poses
from mllm.processing.frames import VideoSpec
from mllm.processing.scene_points import frame_points
from mllm.processing.videos import frames_of
from mllm.types import ImageSpec, Video
from tests.unit.encoders.test_view_points import SMALL, save_whole
from tests.unit.encoders.views import stirred
from tests.videos import write_clip


@pytest.fixture(scope="module", params=SMALL)
def spec(request, tmp_path_factory):
    """A small encoder's config with weights in a file."""
    folder, donor = tmp_path_factory.mktemp(request.param), READERS[request.param](stirred(SMALL[request.param]))
    save_whole(request.param, donor, folder)
    return {**SMALL[request.param], "weights": {"source": str(folder)}}


def test_points_lie_beside_the_video_and_choose_its_frames(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    clip = write_clip(tmp_path / "room.mp4", 20)  # 128 × 48 pixels
    writer = PointWriter(spec, frames=6, size=32, side=8)
    ((video, target, count),) = write_points(writer, [clip])
    assert (video, target.name, count) == (clip, "room.mp4.points.npz", 6)
    with np.load(target) as told:
        assert told["frames"].tolist() == [0, 3, 7, 11, 15, 19]
        assert told["points"].shape == (6, 6, 8, 3) and told["confidence"].shape == (6, 6, 8)
        known = np.isfinite(told["points"])
        assert known.any() if spec["type"] == "mapanything" else known.all()  # which says what lies nowhere
        assert told["points"][known].std() > 0 and told["confidence"].min() > 0
    seen = frames_of(Video(str(clip)), VideoSpec(frames=3, which="space_aware", candidates=6), where="room")
    assert 1 <= len(seen.chosen.numbers) <= 3 and set(seen.chosen.numbers) <= {0, 3, 7, 11, 15, 19}
    kept = target.stat().st_mtime_ns
    assert list(write_points(writer, [clip])) == [(clip, target, None)] and target.stat().st_mtime_ns == kept
    assert next(iter(write_points(writer, [clip], force=True)))[2] == 6 and target.stat().st_mtime_ns > kept
    assert [path.name for path in tmp_path.glob("*.npz")] == ["room.mp4.points.npz"], "nothing half written is left"


def test_cameras_and_depth_are_what_rows_take(spec, tmp_path, monkeypatch):
    """Laid into space by poses and depth as a row gives them, an encoder of points is given what the file of points says."""
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path / "cache"))
    np.save(tmp_path / "room.npy", np.random.default_rng(0).integers(0, 256, (5, 24, 36, 3), dtype=np.uint8))
    if spec["type"] == "vggt":
        with pytest.raises(ConfigError, match="vggt that is here tells points alone"):
            PointWriter(spec, cameras=True)
        return
    donor = READERS[spec["type"]](stirred(SMALL[spec["type"]]))
    exact = spec["type"] == "depth_anything_3"  # the others tell points that no one lens explains
    if exact:
        torch.nn.init.constant_(donor.head["cam_dec"].fc_fov[0].bias, 1.0)  # a lens, where drawn weights have none
    save_whole(spec["type"], donor, tmp_path)
    writer = PointWriter({**spec, "weights": {"source": str(tmp_path)}}, frames=3, size=36, side=None, cameras=True)
    ((video, _, _),) = write_points(writer, [tmp_path / "room.npy"])
    assert sorted(path.name for path in tmp_path.glob("room.npy.*")) == [
        f"room.npy.{n}" for n in ("depth.npy", "points.npz", "poses.json")
    ]
    poses, view = read_poses(f"{video}.poses.json", where="x")
    assert np.isfinite(poses).all((1, 2)).tolist() == [True, False, True, False, True] and view is not None
    depth = np.load(f"{video}.depth.npy")
    assert depth.shape == (5, 24, 36) and np.isnan(depth[1]).all()
    with np.load(f"{video}.points.npz") as told:
        points = told["points"]
    image = ImageSpec(height=24, width=36, points="refuse")
    entry = {"poses": f"{video}.poses.json", "depths": f"{video}.depth.npy"}
    laid = frame_points(Video(str(video), points=entry), [0, 2, 4], 5, image, where="x").permute(0, 2, 3, 1).numpy()
    own = np.einsum(
        "sij,srcj->srci", np.linalg.inv(poses[[0, 2, 4], :, :3]), points - poses[[0, 2, 4], None, None, :, 3]
    )
    known = (own[..., 2] > 0) & np.isfinite(laid).all(-1)
    assert known.any() and np.isfinite(laid).all(-1).sum() == (own[..., 2] > 0).sum()
    if exact:
        np.testing.assert_allclose(
            laid[known], points[known], rtol=0, atol=0.1
        )  # one field of view for views that differ a little


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
    with pytest.raises(ConfigError, match="type points has no head that tells points"):
        PointWriter(PointsEncoder.tiny())
    with pytest.raises(ConfigError, match="by_rays: type pi3 tells no rays"):
        PointWriter(Pi3Encoder.tiny(), by_rays=True)


def test_cameras_from_rays_lay_the_points_elsewhere(tmp_path):
    kind = "depth_anything_3"
    donor = READERS[kind](stirred(SMALL[kind]))
    save_whole(kind, donor, tmp_path)
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).integers(0, 256, (3, 12, 24, 3), dtype=np.uint8))
    found = []
    for by_rays in (False, True):
        writer = PointWriter({**SMALL[kind], "weights": {"source": str(tmp_path)}}, size=24, side=None, by_rays=by_rays)
        with np.load(writer.write(tmp_path / "clip.npy", where="clip")[0]) as told:
            found.append(told["points"])
    assert np.isfinite(found[1]).all() and found[0].shape == found[1].shape
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_presets_read_the_layers_and_sizes_that_were_published():
    expected = {
        "vggt-1b": ([5, 12, 18, 24], (392, 518)),
        "da3-base": ([6, 8, 10, 12], (378, 504)),
        "da3-large": ([12, 16, 20, 24], (378, 504)),
        "da3-giant": ([20, 28, 34, 40], (378, 504)),
        "pi3": ([18], (392, 518)),
        "mapanything": ([0, 8, 12, 16], (392, 518)),
        "mapanything-apache-v1": ([0, 12, 18, 24], (392, 518)),
    }
    for name, (layers, size) in expected.items():
        writer = PointWriter(name, chunk=8)
        assert writer._spec["layers"] == layers and writer._size((480, 640)) == size
        assert writer._spec.get("reference", "first") == "first", "parts of a scene share their reference"
