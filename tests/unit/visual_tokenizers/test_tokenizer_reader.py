"""Does a language model read the same through pixels and through codes that were computed before?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import AlignmentError, CheckpointError, ConfigError, DataError
from mllm.processing.codes import read_codes
from mllm.testing.encoders import check_encoder
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.features import code_features
from mllm.visual_tokenizers.images import ImageSource
from mllm.visual_tokenizers.sequence import code_blocks, pack_codes, single_vectors, unpack_codes
from mllm.visual_tokenizers.storage import encode_images
from tests.helpers import TINY_CLIP, tiny_model
from tests.unit.visual_tokenizers.tokenizer_configs import RESIDUAL, TINY

SIMVQ = {
    "type": "vq",
    "image_size": 16,
    "encoder": {"channels": 8, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 4},
    "z_channels": 8,
    "quantizer": {"type": "vq", "size": 4, "parts": {"pixel": 2}, "codebook": {"learn": "frozen_linear"}},
}


def reader(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = encoder_config({"type": "visual_tokenizer", "tokenizer": TINY[name], **changes}, where="encoder")
    return build_encoder(config).eval()


def pixels(number: int = 3) -> torch.Tensor:
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", TINY)
def test_codes_in_place_of_pixels_give_the_same_features(name: str) -> None:
    encoder = reader(name)
    with torch.no_grad():
        packed = pack_codes(encoder.tokenizer, encoder.tokenizer.encode(pixels()))
        assert packed.shape == (3, encoder.num_codes) and packed.dtype == torch.int64
        from_pixels, from_codes = encoder(pixels()), encoder(packed)
        expected = code_features(encoder.tokenizer, encoder.tokenizer.encode(pixels()))
    assert from_pixels.grid == from_codes.grid
    for other in (from_codes, expected):
        torch.testing.assert_close(from_pixels.tokens, other.tokens, rtol=1e-5, atol=1e-6)
    learned = encoder(pixels())  # with gradients: the same values
    assert torch.allclose(learned.tokens, from_pixels.tokens, atol=1e-6)
    learned.tokens.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("name", TINY)
def test_packing_keeps_every_code_in_its_place(name: str) -> None:
    tokenizer = build_tokenizer(TINY[name]).eval()
    codes = tokenizer.encode(pixels())
    packed = pack_codes(tokenizer, codes)
    again = unpack_codes(tokenizer, packed)
    assert all(torch.equal(again.codes[book], ids) for book, ids in codes.codes.items())
    blocks = code_blocks(tokenizer)
    assert [b.start for b in blocks[1:]] == [b.start + b.number for b in blocks[:-1]]
    assert blocks[-1].start + blocks[-1].number == tokenizer.tokens_per_image
    for block in (blocks[0], blocks[-1]):
        ids = packed[:, block.start : block.start + block.number]
        depths = codes.codes[block.book]
        full = tokenizer.code_vectors(block.book, depths)[:, :, block.depth]
        own = full if tokenizer.scales is None else full[:, block.start : block.start + block.number]
        torch.testing.assert_close(single_vectors(tokenizer, block, ids), own, rtol=1e-5, atol=1e-6)


def test_parts_of_the_features_are_named() -> None:
    widths = {part: reader("tokenflow", features=part).config.info.width for part in ("semantic", "pixel", "both")}
    assert widths == {"semantic": 8, "pixel": 4, "both": 12}
    with torch.no_grad():
        both, semantic, pixel = (
            reader("dualtoken", features=part)(pixels()).tokens for part in ("both", "semantic", "pixel")
        )
    torch.testing.assert_close(both, torch.cat([pixel, semantic], -1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"features: vq has no semantic part; it has pixel"):
        reader("vq", features="semantic")


@pytest.mark.parametrize("name", ["dualtoken", "illume", "tokenflow"])
def test_the_encoder_contract_holds_for_tokenizers_with_two_codebooks(name: str) -> None:
    checks = {"check_description", "check_meta_build", "check_save_and_load", "check_empty_batch", "check_layer_groups"}
    import mllm.testing.encoders as contract

    config = contract.resolve_example({"type": "visual_tokenizer", "tokenizer": TINY[name]})
    for check in contract.CHECKS:
        if check.__name__ in checks:
            check(config)


def test_the_encoder_contract_holds_with_another_quantizer() -> None:
    assert check_encoder({"type": "visual_tokenizer", "tokenizer": SIMVQ})


def test_bad_codes_are_refused() -> None:
    encoder = reader("vq")
    with pytest.raises(ConfigError, match="id 32 is out of range 0 to 31"):
        encoder(torch.full((1, 16), 32))
    with pytest.raises(AlignmentError, match=r"has 16 codes, got \(15,\)"):
        encoder(torch.zeros(1, 15, dtype=torch.int64))


def test_a_saved_tokenizer_is_read_by_folder_alone(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TINY["illume"]).eval()
    tokenizer.save_pretrained(tmp_path / "t")
    source = {"source": str(tmp_path / "t")}
    config = encoder_config({"type": "visual_tokenizer", "weights": source}, where="encoder")
    encoder = build_encoder(config)
    encoder.load_pretrained()
    with torch.no_grad():
        wanted = code_features(tokenizer, tokenizer.encode(pixels())).tokens
        torch.testing.assert_close(encoder.eval()(pixels()).tokens, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="holds no saved visual tokenizer"):
        encoder_config({"type": "visual_tokenizer", "weights": {"source": str(tmp_path)}}, where="encoder")
    other = build_encoder(
        encoder_config({"type": "visual_tokenizer", "tokenizer": TINY["vq"], "weights": source}, where="encoder")
    )
    with pytest.raises(CheckpointError, match="another config"):
        other.load_pretrained()


class Pictures(ImageSource):
    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 3

    def batch(self, indices: Any) -> torch.Tensor:
        return ((pixels() + 1) * 127.5).round().to(torch.uint8)[list(indices)]


def test_stored_codes_stand_for_pictures_in_the_processor(tmp_path: Path) -> None:
    tokenizer = build_tokenizer({**TINY["vq"], "quantizer": RESIDUAL}).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encode_images(tokenizer, Pictures(), tmp_path / "codes", shard_size=2)
    weights = {"source": str(tmp_path / "tokenizer")}
    encoders = {"codes": {"type": "visual_tokenizer", "weights": weights}}
    model, processor = tiny_model(tmp_path, encoders=encoders, connector={"type": "mlp"})
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in Pictures().batch(range(3))]
    references = [f"{tmp_path}/codes/codes.json#{k}" for k in range(3)]
    from_pictures = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    from_codes = processor.image_processor(references, return_tensors="pt")["pixel_values"]
    assert from_codes.shape == (3, 32)
    with torch.no_grad():
        seen, read = (model.get_image_features(v).pooler_output for v in (from_pictures, from_codes))
    torch.testing.assert_close(seen, read, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="3 images; there is no number 3"):
        read_codes(f"{tmp_path}/codes/codes.json#3", where="image")
    with pytest.raises(DataError, match="one batch takes one kind"):
        processor.image_processor([pictures[0], references[0]])
    processor.image_processor.code_source = "another"
    with pytest.raises(DataError, match="codes of another tokenizer"):
        processor.image_processor(references)


def test_beside_a_continuous_encoder_it_is_one_of_the_connectors_inputs(tmp_path: Path) -> None:
    encoders = {"clip": dict(TINY_CLIP), "codes": {"type": "visual_tokenizer", "tokenizer": TINY["dualtoken"]}}
    model, processor = tiny_model(tmp_path, encoders=encoders, connector={"type": "channel_concat"})
    images = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    values = processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(**values).pooler_output
    assert features.shape == (2, 16, 64) and not torch.equal(features[0], features[1])
    with pytest.raises(DataError, match="encoder 'clip' needs pixels"):
        processor.image_processor([torch.zeros(64, dtype=torch.int64)])
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    again = type(model).from_pretrained(saved)
    with torch.no_grad():
        torch.testing.assert_close(again.get_image_features(**values).pooler_output, features, rtol=1e-5, atol=1e-6)


def test_a_tokenizer_keeps_its_config_through_sorted_json() -> None:
    import json

    tokenizer = build_tokenizer(TINY["tokenflow"])
    plain = json.loads(json.dumps(tokenizer.config.model_dump(mode="json"), sort_keys=True))
    again = build_tokenizer(plain)
    assert isinstance(again, VisualTokenizer) and again.part_dims == tokenizer.part_dims == {"semantic": 8, "pixel": 4}
    assert list(again.part_dims) == ["semantic", "pixel"]
