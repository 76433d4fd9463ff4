"""Does every registered visual tokenizer keep the contract?"""

from __future__ import annotations

import math

import pytest
import torch

from mllm.errors import CheckpointError, ConfigError
from mllm.types import VisualCodes
from mllm.visual_tokenizers import VISUAL_TOKENIZERS
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

NAMES = sorted(VISUAL_TOKENIZERS)


@pytest.fixture(params=NAMES)
def tokenizer(request):
    torch.manual_seed(0)
    return build_tokenizer(TINY[request.param]).eval()


def pixels(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def first(codes: VisualCodes, index: slice) -> VisualCodes:
    return VisualCodes({k: v[index] for k, v in codes.codes.items()}, codes.grid, codes.scales)


def test_every_registered_tokenizer_is_tested():
    assert set(NAMES) == set(TINY) and len(NAMES) >= 4


def test_codes_have_the_shapes_that_are_announced(tokenizer):
    codes = tokenizer.encode(pixels())
    assert set(codes.codes) == set(tokenizer.codebooks)
    assert codes.grid == tokenizer.grid and codes.scales == tokenizer.scales
    for name, (size, depth) in tokenizer.codebooks.items():
        ids = codes.codes[name]
        assert ids.shape == (2, tokenizer.num_positions[name], depth) and ids.dtype == torch.int64
        assert int(ids.min()) >= 0 and int(ids.max()) < size
        vectors = tokenizer.embed(codes)[name]
        rows, columns = tokenizer.grids[name]
        assert vectors.shape == (2, rows * columns, tokenizer.embed_dims[name])
        assert tokenizer.code_vectors(name, ids).shape[:3] == ids.shape
    assert tokenizer.tokens_per_image == sum(ids[0].numel() for ids in codes.codes.values())
    bits = sum(codes.codes[k][0].numel() * math.log2(s) for k, (s, _) in tokenizer.codebooks.items())
    assert tokenizer.bits_per_image == pytest.approx(bits)


def test_decoding_the_codes_is_the_forward_reconstruction(tokenizer):
    with torch.no_grad():
        out = tokenizer(pixels())
        again = tokenizer.decode(tokenizer.encode(pixels()))
    assert out.reconstruction.shape == (2, 3, 16, 16)
    assert torch.allclose(out.reconstruction, again, atol=1e-5)
    for name, ids in out.codes.codes.items():
        assert torch.equal(ids, tokenizer.encode(pixels()).codes[name])


def test_an_image_does_not_depend_on_its_batch(tokenizer):
    with torch.no_grad():
        whole, alone = tokenizer.encode(pixels()), tokenizer.encode(pixels()[1:])
        assert all(torch.equal(whole.codes[k][1:], alone.codes[k]) for k in whole.codes)
        assert torch.allclose(tokenizer.decode(whole)[1:], tokenizer.decode(alone), atol=1e-5)


def test_an_empty_batch_is_legal(tokenizer):
    codes = tokenizer.encode(pixels(0))
    assert tokenizer.decode(codes).shape == (0, 3, 16, 16)


def test_every_learning_parameter_gets_a_gradient(tokenizer):
    tokenizer.train()
    out = tokenizer(pixels(4))
    total = out.reconstruction.square().mean() + sum(out.losses.values())
    total = total + sum(feature.square().mean() for feature in out.features.values())
    total.backward()
    missing = [n for n, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert tokenizer.last_layer().grad is not None
    assert all(value.isfinite() for value in (*out.losses.values(), *out.usage.values()))


def test_it_builds_on_meta_without_memory(tokenizer):
    with torch.device("meta"):
        empty = build_tokenizer(tokenizer.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert set(empty.state_dict()) == set(tokenizer.state_dict())


def test_meta_build_with_loaded_weights_and_restored_buffers_is_the_same(tokenizer):
    with torch.device("meta"):
        empty = build_tokenizer(tokenizer.config)
    empty.load_state_dict(tokenizer.state_dict(), assign=True)
    empty.restore_buffers()
    empty.eval()
    assert not [n for n, b in empty.named_buffers() if b.is_meta]
    with torch.no_grad():
        have, want = (t.decode(t.encode(pixels())) for t in (empty, tokenizer))
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = VisualTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer) and again.config == tokenizer.config and not again.training
    with torch.no_grad():
        have, want = (t.decode(t.encode(pixels())) for t in (again, tokenizer))
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_bad_input_is_refused_by_name(tokenizer):
    codes = tokenizer.encode(pixels(1))
    name = next(iter(codes.codes))
    size = tokenizer.codebooks[name][0]
    for bad in (size, -1):
        ids = codes.codes[name].clone()
        ids[0, 0, 0] = bad
        with pytest.raises(ConfigError, match=f"'{name}': id {bad} is out of range"):
            tokenizer.decode(VisualCodes({**codes.codes, name: ids}, codes.grid, codes.scales))
    with pytest.raises(ConfigError, match="decodes a grid of"):
        tokenizer.decode(VisualCodes(codes.codes, (3, 5), codes.scales))
    with pytest.raises(ConfigError, match="must be"):
        tokenizer.decode(VisualCodes({**codes.codes, name: codes.codes[name][:, :-1]}, codes.grid, codes.scales))
    with pytest.raises(ConfigError, match="has codebooks"):
        tokenizer.decode(VisualCodes({"other": codes.codes[name]}, codes.grid, codes.scales))
    with pytest.raises(ConfigError, match="takes images"):
        tokenizer.encode(pixels(1, 24))


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        VisualTokenizer.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    tokenizer.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        VisualTokenizer.from_pretrained(tmp_path)


def test_a_bfloat16_tokenizer_works_and_searches_in_fp32(tokenizer):
    codes = tokenizer.encode(pixels())
    with torch.no_grad():
        expected = tokenizer.decode(codes)
        half = tokenizer.to(torch.bfloat16)
        made = half.decode(codes)
        out = half(pixels())
    assert made.dtype == torch.bfloat16 == out.reconstruction.dtype
    assert torch.cosine_similarity(made.float().flatten(), expected.flatten(), dim=0) > 0.99
    assert all(vectors.dtype == torch.float32 for vectors in half.embed(codes).values())


def test_it_trains_under_autocast(tokenizer):
    tokenizer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tokenizer(pixels())
        total = out.reconstruction.float().square().mean() + sum(out.losses.values())
    total.backward()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters() if p.grad is not None)
    assert all(loss.dtype == torch.float32 for name, loss in out.losses.items() if "/" in name)
