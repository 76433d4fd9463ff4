"""Does a visual tokenizer keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.errors import CheckpointError, ConfigError
from mllm.testing.running import run_checks
from mllm.types import VisualCodes
from mllm.visual_tokenizers import VISUAL_TOKENIZERS
from mllm.visual_tokenizers.base import WEIGHTS_FILE, VisualTokenizer, build_tokenizer


def build_example(config: Mapping[str, Any]) -> VisualTokenizer:
    """A tokenizer of the config in evaluation mode; the same weights every time."""
    torch.manual_seed(0)
    return build_tokenizer(config).eval()


def sample_pixels(tokenizer: VisualTokenizer, batch: int = 2) -> Tensor:
    """Random pixels in [-1, 1]."""
    size = (batch, 3, tokenizer.image.height, tokenizer.image.width)
    return torch.rand(size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def _close(have: Tensor, want: Tensor) -> bool:
    """Equal up to rounding: on some processors products depend on where in memory the weights lie."""
    return torch.allclose(have, want, rtol=1e-5, atol=1e-6)


def check_codes(config: Mapping[str, Any]) -> None:
    """Codes and vectors have the shapes that are announced."""
    tokenizer = build_example(config)
    codes = tokenizer.encode(sample_pixels(tokenizer))
    assert set(codes.codes) == set(tokenizer.codebooks), (
        f"codes of {set(codes.codes)}, announced {set(tokenizer.codebooks)}"
    )
    assert codes.grid == tokenizer.grid and codes.scales == tokenizer.scales, (
        "grid or scales differ from those announced"
    )
    for name, (size, depth) in tokenizer.codebooks.items():
        ids, want = codes.codes[name], (2, tokenizer.num_positions[name], depth)
        assert ids.shape == want and ids.dtype == torch.int64, (
            f"{name}: ids are {tuple(ids.shape)} {ids.dtype}, expected {want} int64"
        )
        assert int(ids.min()) >= 0 and int(ids.max()) < size, f"{name}: ids outside 0 to {size - 1}"
        rows, columns = tokenizer.grids[name]
        have, want = tuple(tokenizer.embed(codes)[name].shape), (2, rows * columns, tokenizer.embed_dims[name])
        assert have == want, f"{name}: embed gives {have}, expected {want}"
        assert tokenizer.code_vectors(name, ids).shape[:3] == ids.shape, (
            f"{name}: code_vectors does not follow the ids' shape"
        )
    total = sum(ids[0].numel() for ids in codes.codes.values())
    assert tokenizer.tokens_per_image == total, (
        f"tokens_per_image is {tokenizer.tokens_per_image}, an image has {total} codes"
    )
    bits = sum(codes.codes[k][0].numel() * math.log2(s) for k, (s, _) in tokenizer.codebooks.items())
    assert math.isclose(tokenizer.bits_per_image, bits), (
        f"bits_per_image is {tokenizer.bits_per_image}, expected {bits}"
    )


@torch.no_grad()
def check_reconstruction(config: Mapping[str, Any]) -> None:
    """Decoding the codes is the reconstruction of `forward`, and its codes are those of `encode`."""
    tokenizer = build_example(config)
    pixels = sample_pixels(tokenizer)
    out, codes = tokenizer(pixels), tokenizer.encode(pixels)
    assert out.reconstruction.shape == pixels.shape, f"the reconstruction is {tuple(out.reconstruction.shape)}"
    assert torch.allclose(out.reconstruction, tokenizer.decode(codes), atol=1e-5), (
        "decode(encode) is not forward's reconstruction"
    )
    for name, ids in out.codes.codes.items():
        assert torch.equal(ids, codes.codes[name]), f"forward and encode give other codes of {name}"


@torch.no_grad()
def check_batch_invariance(config: Mapping[str, Any]) -> None:
    """An image's codes and reconstruction do not depend on the other images of the batch."""
    tokenizer = build_example(config)
    pixels = sample_pixels(tokenizer)
    whole, alone = tokenizer.encode(pixels), tokenizer.encode(pixels[1:])
    assert all(torch.equal(whole.codes[k][1:], alone.codes[k]) for k in whole.codes), "alone, an image has other codes"
    assert torch.allclose(tokenizer.decode(whole)[1:], tokenizer.decode(alone), atol=1e-5), (
        "alone, an image decodes otherwise"
    )


@torch.no_grad()
def check_empty_batch(config: Mapping[str, Any]) -> None:
    """No images give no pictures."""
    tokenizer = build_example(config)
    pixels = sample_pixels(tokenizer, 0)
    shape = tokenizer.decode(tokenizer.encode(pixels)).shape
    assert shape == pixels.shape, f"an empty batch decodes to {tuple(shape)}"


def check_gradients(config: Mapping[str, Any]) -> None:
    """The losses and the reconstruction reach every parameter that learns."""
    tokenizer = build_example(config).train()
    out = tokenizer(sample_pixels(tokenizer, 4))
    total = out.reconstruction.square().mean() + sum(out.losses.values())
    (total + sum(feature.square().mean() for feature in out.features.values())).backward()
    missing = [n for n, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    assert tokenizer.last_layer().grad is not None, (
        "no gradient reaches last_layer(), which weighs the adversarial loss"
    )
    assert all(value.isfinite() for value in (*out.losses.values(), *out.usage.values())), (
        "losses or usage are not finite"
    )


def check_meta_build(config: Mapping[str, Any]) -> None:
    """Built on the meta device and filled with weights and buffers, a tokenizer is the one built for real."""
    real = build_example(config)
    with torch.device("meta"):
        empty = build_tokenizer(real.config)
    assert {p.device.type for p in empty.parameters()} <= {"meta"}, (
        "some parameters are real when built on the meta device"
    )
    assert set(empty.state_dict()) == set(real.state_dict()), "built on the meta device, it has other weights"
    empty.load_state_dict(real.state_dict(), assign=True)
    empty.restore_buffers()
    empty.eval()
    lost = [n for n, b in empty.named_buffers() if b.is_meta]
    assert not lost, f"restore_buffers leaves {lost} without values"
    pixels = sample_pixels(real)
    with torch.no_grad():
        same = _close(empty.decode(empty.encode(pixels)), real.decode(real.encode(pixels)))
    assert same, "after a meta build pictures come back otherwise"


def check_save_and_load(config: Mapping[str, Any]) -> None:
    """Saved and loaded it is the same; with a weight missing it is refused."""
    from safetensors.torch import load_file, save_file

    tokenizer = build_example(config)
    pixels = sample_pixels(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = VisualTokenizer.from_pretrained(folder)
        assert type(again) is type(tokenizer) and again.config == tokenizer.config, "the config does not survive saving"
        assert not again.training, "a loaded tokenizer is in training mode"
        with torch.no_grad():
            same = _close(again.decode(again.encode(pixels)), tokenizer.decode(tokenizer.encode(pixels)))
        assert same, "saved and loaded, pictures come back otherwise"
        path = str(Path(folder) / WEIGHTS_FILE)
        tensors = load_file(path)
        tensors.pop(next(iter(tensors)))
        save_file(tensors, path)
        try:
            VisualTokenizer.from_pretrained(folder)
        except CheckpointError:
            return
    raise AssertionError("a file that lacks a weight is accepted silently")


def check_bad_input(config: Mapping[str, Any]) -> None:
    """Ids out of range, other grids, lengths, codebooks and sizes are refused with what was wrong."""
    tokenizer = build_example(config)
    codes = tokenizer.encode(sample_pixels(tokenizer, 1))
    name = next(iter(codes.codes))
    size = tokenizer.codebooks[name][0]
    for bad in (size, -1):
        ids = codes.codes[name].clone()
        ids[0, 0, 0] = bad
        broken = VisualCodes({**codes.codes, name: ids}, codes.grid, codes.scales)
        _refused(lambda broken=broken: tokenizer.decode(broken), f"'{name}': id {bad} is out of range")
    short = {**codes.codes, name: codes.codes[name][:, :-1]}
    _refused(lambda: tokenizer.decode(VisualCodes(codes.codes, (3, 5), codes.scales)), "decodes a grid of")
    _refused(lambda: tokenizer.decode(VisualCodes(short, codes.grid, codes.scales)), "must be")
    _refused(
        lambda: tokenizer.decode(VisualCodes({"other": codes.codes[name]}, codes.grid, codes.scales)), "has codebooks"
    )
    _refused(lambda: tokenizer.encode(sample_pixels(tokenizer, 1)[..., :-1]), "takes images")


def _refused(run: Callable[[], Any], words: str) -> None:
    try:
        run()
    except ConfigError as error:
        assert words in str(error), f"the message does not say {words!r}: {error}"
        return
    raise AssertionError(f"input that should be refused ({words}) is accepted silently")


@torch.no_grad()
def check_bfloat16(config: Mapping[str, Any]) -> None:
    """In bf16 pictures are bf16 and point where the fp32 ones do; code vectors stay fp32, as the search needs."""
    tokenizer = build_example(config)
    pixels = sample_pixels(tokenizer)
    codes = tokenizer.encode(pixels)
    expected = tokenizer.decode(codes)
    half = tokenizer.to(torch.bfloat16)
    made, out = half.decode(codes), half(pixels)
    assert made.dtype == torch.bfloat16 == out.reconstruction.dtype, f"a bf16 tokenizer gives {made.dtype}"
    cosine = float(torch.cosine_similarity(made.float().flatten(), expected.flatten(), dim=0))
    assert cosine > 0.99, f"bf16 pictures have cosine {cosine:.4f} with the fp32 ones"
    assert all(vectors.dtype == torch.float32 for vectors in half.embed(codes).values()), "code vectors are not fp32"


def check_autocast(config: Mapping[str, Any]) -> None:
    """It trains under autocast: finite gradients, losses of the codebooks in fp32."""
    tokenizer = build_example(config).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tokenizer(sample_pixels(tokenizer))
        total = out.reconstruction.float().square().mean() + sum(out.losses.values())
    total.backward()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters() if p.grad is not None), (
        "gradients are not finite"
    )
    low = [name for name, loss in out.losses.items() if "/" in name and loss.dtype != torch.float32]
    assert not low, f"losses {low} are not fp32 under autocast"


CHECKS: tuple[Callable[[Mapping[str, Any]], None], ...] = (
    check_codes,
    check_reconstruction,
    check_batch_invariance,
    check_empty_batch,
    check_gradients,
    check_meta_build,
    check_save_and_load,
    check_bad_input,
    check_bfloat16,
    check_autocast,
)


def check_visual_tokenizer(name: str) -> list[str]:
    """Run every check on the tokenizer registered under ``name``, built from its `VisualTokenizer.tiny` config; returns the
    checks' names. Raises `AssertionError` naming the check and what broke, or `UnknownName`."""
    config = VISUAL_TOKENIZERS.get(name).tiny()
    return run_checks(CHECKS, config)
