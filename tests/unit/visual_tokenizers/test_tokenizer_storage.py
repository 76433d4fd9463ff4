"""Do stored codes come back, and do codes feed a connector?"""

from __future__ import annotations

import pytest
import torch

from mllm.errors import CheckpointError, DataError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.features import code_features, feature_info
from mllm.visual_tokenizers.images import load_images, to_pixels
from mllm.visual_tokenizers.recipe import ImagesSpec
from mllm.visual_tokenizers.storage import StoredCodes, encode_images
from tests.helpers import picture
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

IMAGES = ImagesSpec(type="digits_and_charts", options={"charts": 44, "digits": False})


@pytest.mark.parametrize("name", ["tokenflow", "illume"])
def test_codes_round_trip_through_shards_and_go_on_after_an_interruption(tmp_path, name):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TINY[name]).eval()
    images = load_images(IMAGES, 16, "train")
    assert encode_images(tokenizer, images, tmp_path, batch_size=8, shard_size=10, rank=0, ranks=2) == 3
    with pytest.raises(CheckpointError, match=r"shards \[1, 3\] of 5"):
        StoredCodes(tmp_path)
    assert encode_images(tokenizer, images, tmp_path, batch_size=8, shard_size=10) == 2
    assert encode_images(tokenizer, images, tmp_path, batch_size=8, shard_size=10) == 0
    stored = StoredCodes(tmp_path, tokenizer)
    assert len(stored) == 44
    for position in (0, 9, 10, 43):
        direct = tokenizer.encode(to_pixels(images.batch([position])))
        again = stored[position]
        assert again.grid == direct.grid and again.scales == direct.scales
        assert all(torch.equal(again.codes[key], direct.codes[key]) for key in direct.codes)
        tokenizer.decode(again)


def test_codes_of_another_tokenizer_are_refused(tmp_path):
    images = load_images(IMAGES, 16, "train")
    encode_images(build_tokenizer(TINY["vq"]), images, tmp_path)
    other = build_tokenizer(TINY["vq"])
    with pytest.raises(DataError, match="tokenizer differ"):
        encode_images(other, images, tmp_path)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        StoredCodes(tmp_path, other)
    with pytest.raises(CheckpointError, match="holds no stored codes"):
        StoredCodes(tmp_path / "none")


def test_codes_of_pictures_that_were_replaced_or_reordered_are_never_kept(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        picture(number, size=(20, 20)).save(pictures / f"{number}.png")
    spec = ImagesSpec(type="folder", options={"path": str(pictures), "held_out": 1})
    tokenizer = build_tokenizer(TINY["vq"]).eval()
    images = load_images(spec, 16, "train")
    assert encode_images(tokenizer, images, tmp_path / "codes", shard_size=2) == 3
    assert encode_images(tokenizer, load_images(spec, 16, "train"), tmp_path / "codes", shard_size=2) == 0
    first, second = images.files[0], images.files[1]
    kept = first.read_bytes()
    picture(9, size=(20, 20)).save(first)
    with pytest.raises(
        DataError, match=rf"codes of 1 images are of other pictures, the first image 0 \({first}\).*replaced"
    ):
        encode_images(tokenizer, load_images(spec, 16, "train"), tmp_path / "codes", shard_size=2)
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(DataError, match=r"codes of 2 images are of other pictures.*is now at another place"):
        encode_images(tokenizer, load_images(spec, 16, "train"), tmp_path / "codes", shard_size=2)


@pytest.mark.parametrize("name", sorted(TINY))
def test_codes_are_an_encoders_features_to_a_connector(name):
    tokenizer = build_tokenizer(TINY[name]).eval()
    codes = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    info, features = feature_info(tokenizer), code_features(tokenizer, codes)
    assert features.tokens.shape == (2, info.grid[0] * info.grid[1], info.width)
    assert features.grid == info.grid
    from mllm.connectors import CONNECTORS

    cls = CONNECTORS.get("mlp")
    connector = cls(cls.Config(type="mlp"), {"codes": info}, 20)
    assert connector.view_tokens({"codes": features}).shape == (2, info.grid[0] * info.grid[1], 20)


def test_a_coarser_codebook_is_repeated_over_its_cells():
    tokenizer = build_tokenizer(TINY["illume"]).eval()
    codes = tokenizer.encode(torch.rand(1, 3, 16, 16))
    tokens = code_features(tokenizer, codes).tokens[0].view(4, 4, 16)
    semantic = tokenizer.embed(codes)["semantic"][0].view(2, 2, 8)
    assert torch.equal(tokens[..., :8], semantic.repeat_interleave(2, 0).repeat_interleave(2, 1))
    empty = VisualCodes({k: v[:0] for k, v in codes.codes.items()}, codes.grid)
    assert code_features(tokenizer, empty).tokens.shape == (0, 16, 16)
