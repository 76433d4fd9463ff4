"""Does an encoder keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.config import to_plain, validate
from mllm.encoders import ENCODERS
from mllm.encoders.base import EncoderConfig, VisionEncoder
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError
from mllm.testing.running import run_checks
from mllm.types import VisionFeatures

#: Largest difference, relative to the largest feature, of the same weights in other memory: a processor may choose
#: another order of summing by where a matrix lies.
ROUNDING = 1e-5


def resolve_example(spec: str | Mapping[str, Any] | EncoderConfig) -> EncoderConfig:
    """A resolved config: of a registered type's `VisionEncoder.tiny`, of a shipped entry, or of a config."""
    if isinstance(spec, EncoderConfig):
        return spec if spec.info is not None else ENCODERS.get(spec.type).resolve(spec)
    named = isinstance(spec, str) and spec in ENCODERS
    return encoder_config(ENCODERS.get(str(spec)).tiny() if named else spec, where="encoder")


def sample_pixels(config: EncoderConfig, batch: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random pixels ``(batch, 3, H, W)``; image k of a larger batch is image k of a smaller one."""
    assert config.info is not None
    size = (config.info.image.channels, config.info.image.height, config.info.image.width)
    images = [torch.randn(size, generator=torch.Generator().manual_seed(1009 * seed + k)) for k in range(batch)]
    return (torch.stack(images) if images else torch.zeros(0, *size)).to(dtype)


def build_example(config: EncoderConfig, *, seed: int = 0) -> VisionEncoder:
    """An encoder with random weights in evaluation mode; noise on every parameter, so that none is at a neutral
    value."""
    torch.manual_seed(seed)
    encoder = build_encoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return encoder


@torch.no_grad()
def _features(encoder: VisionEncoder, pixels: Tensor) -> VisionFeatures:
    return encoder(pixels)


def _differ(have: VisionFeatures, want: VisionFeatures) -> float:
    """Largest difference, relative to the largest value."""
    scale = max(float(want.tokens.abs().max()), 1e-6)
    return float((have.tokens.float() - want.tokens.float()).abs().max()) / scale


def check_description(config: EncoderConfig) -> None:
    """`describe` tells what `forward` gives: grid, N = rows × columns, width, prefix tokens."""
    info = ENCODERS.get(config.type).describe(config)
    features = _features(build_example(config), sample_pixels(config, 2))
    want = (2, info.num_tokens, info.width)
    have = tuple(features.tokens.shape)
    assert have == want, f"tokens are {have}, but describe promises {want} (grid {info.grid})"
    assert tuple(features.grid) == tuple(info.grid), f"forward's grid is {features.grid}, describe's {info.grid}"
    assert torch.isfinite(features.tokens).all(), "features are not finite"
    prefix = None if features.prefix is None else tuple(features.prefix.shape)
    promised = (2, info.num_prefix_tokens, info.width) if info.num_prefix_tokens else None
    assert prefix == promised, f"prefix is {prefix}, but describe promises {promised}"


def check_self_sufficient_config(config: EncoderConfig) -> None:
    """A resolved config survives JSON, and resolving it again changes nothing."""
    cls = ENCODERS.get(config.type)
    again = validate(cls.Config, to_plain(config), where="config")
    assert again == config, "the config changes when it is written as JSON and read back"
    assert cls.resolve(again).info == config.info, "resolving a resolved config gives other sizes"


def check_meta_build(config: EncoderConfig) -> None:
    """Built on the meta device, filled from a state dict and with buffers restored, an encoder is the encoder built
    for real."""
    real = build_example(config)
    with torch.device("meta"):
        late = build_encoder(config)
    assert all(p.is_meta for p in late.parameters()), "some parameters are real when built on the meta device"
    late = late.to_empty(device="cpu").eval()
    for buffer in late.buffers():
        buffer.zero_()
    late.load_state_dict(real.state_dict())
    late.restore_buffers()
    pixels = sample_pixels(config, 2)
    error = _differ(_features(late, pixels), _features(real, pixels))
    assert error <= ROUNDING, f"after a meta build and restore_buffers features differ by {error:.1e}; a buffer is lost"


def check_empty_batch(config: EncoderConfig) -> None:
    """No images give no features, in the right shape and type."""
    info = config.info
    assert info is not None
    features = _features(build_example(config), sample_pixels(config, 0))
    want = (0, info.num_tokens, info.width)
    assert tuple(features.tokens.shape) == want, f"an empty batch gives {tuple(features.tokens.shape)}, expected {want}"


def check_save_and_load(config: EncoderConfig) -> None:
    """A state dict through safetensors makes another encoder give the same features."""
    from safetensors.torch import load_file, save_file

    one, other = build_example(config, seed=0), build_example(config, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.safetensors"
        save_file({key: value.contiguous() for key, value in one.state_dict().items()}, path)
        other.load_state_dict(load_file(path))
    pixels = sample_pixels(config, 2)
    error = _differ(_features(other, pixels), _features(one, pixels))
    assert error <= ROUNDING, f"features differ by {error:.1e} after saving and loading"


def check_bfloat16(config: EncoderConfig) -> None:
    """In bf16 the features are bf16 and point where the fp32 ones do."""
    encoder, pixels = build_example(config), sample_pixels(config, 2)
    want = _features(encoder, pixels).tokens
    have = _features(encoder.to(torch.bfloat16), pixels.to(torch.bfloat16)).tokens
    assert have.dtype == torch.bfloat16, f"a bf16 encoder gives {have.dtype}"
    cosine = float(torch.cosine_similarity(have.float().flatten(), want.flatten(), dim=0))
    assert cosine > 0.99, f"bf16 features have cosine {cosine:.4f} with the fp32 ones"


def check_gradients(config: EncoderConfig) -> None:
    """The loss reaches every layer group; recomputing activations gives the same gradients."""
    encoder = build_example(config)
    pixels = sample_pixels(config, 2).requires_grad_()
    weights = torch.randn(encoder(pixels).tokens.shape, generator=torch.Generator().manual_seed(7))

    def gradients() -> dict[str, Tensor]:
        encoder.zero_grad()
        features = encoder(pixels)
        loss = (features.tokens * weights).sum()
        (loss if features.prefix is None else loss + features.prefix.sum()).backward()
        return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

    for module in encoder.modules():  # dropout is off, but checkpointing runs in training mode only
        module.training = not isinstance(module, torch.nn.Dropout | torch.nn.modules.batchnorm._BatchNorm)
    plain = gradients()
    assert pixels.grad is not None and pixels.grad.any(), "no gradient reaches the pixels"
    assert all(torch.isfinite(g).all() for g in plain.values()), "gradients are not finite"
    for group, prefixes in encoder.layer_groups():
        reached = any(g.any() for name, g in plain.items() if name.startswith(tuple(prefixes)))
        assert reached, f"no gradient reaches layer group {group}"
    try:
        encoder.set_gradient_checkpointing(True)
    except ConfigError:
        return
    again = gradients()
    assert again.keys() == plain.keys(), "with gradient checkpointing other parameters get gradients"
    worst = max(
        (float((again[k] - plain[k]).abs().max() / plain[k].abs().max().clamp_min(1e-6)) for k in plain), default=0.0
    )
    assert worst < 1e-4, f"with gradient checkpointing gradients differ by {worst:.1e}"


def check_batch_invariance(config: EncoderConfig) -> None:
    """An image's features do not depend on the other images of the batch."""
    encoder, pixels = build_example(config), sample_pixels(config, 3)
    together = _features(encoder, pixels)
    for k in range(3):
        error = _differ(
            _features(encoder, pixels[k : k + 1]), VisionFeatures(together.tokens[k : k + 1], together.grid)
        )
        assert error < 1e-4, f"image {k} differs by {error:.1e} alone and in a batch"


def check_raster_order(config: EncoderConfig) -> None:
    """Token (row, column) looks at its own place: seen through the embeddings' gradient, the pixels under a corner
    token matter to that token most."""
    encoder = build_example(config)
    pixels = sample_pixels(config, 1).requires_grad_()
    features = encoder(pixels)
    (rows, cols), info = features.grid, ENCODERS.get(config.type).describe(config)
    if rows < 2 or cols < 2:
        return
    height, width = pixels.shape[2] // rows, pixels.shape[3] // cols
    for row, col in ((0, cols - 1), (rows - 1, 0)):
        (gradient,) = torch.autograd.grad(
            features.tokens[0, info.leading + row * (cols + info.row_ends) + col].square().sum(),
            pixels,
            retain_graph=True,
        )
        energy = gradient[0, :, : rows * height, : cols * width].square().sum(0)
        energy = energy.reshape(rows, height, cols, width).sum((1, 3))
        assert energy[row, col] > energy[col % rows, row % cols], (
            f"token ({row}, {col}) of the {rows} x {cols} grid depends less on its own pixels than on those of the "
            "transposed place; tokens must lie in raster order"
        )


def check_image_size(config: EncoderConfig) -> None:
    """Pixels of another size are refused with both sizes in the message."""
    encoder, pixels = build_example(config), sample_pixels(config, 1)
    try:
        encoder(pixels[..., :-1])
    except ConfigError as error:
        assert str(pixels.shape[-1]) in str(error), f"the message does not say which size is expected: {error}"
        return
    raise AssertionError("pixels of another size are accepted silently")


def check_layer_groups(config: EncoderConfig) -> None:
    """Every parameter is in exactly one layer group."""
    encoder = build_example(config)
    groups = encoder.layer_groups()
    names = [name for name, _ in groups]
    assert len(set(names)) == len(names), f"layer groups repeat: {names}"
    for name, _ in encoder.named_parameters():
        homes = [group for group, prefixes in groups if name.startswith(tuple(prefixes))]
        assert len(homes) == 1, f"parameter {name} is in {len(homes)} layer groups {homes}"


CHECKS: tuple[Callable[[EncoderConfig], None], ...] = (
    check_description,
    check_self_sufficient_config,
    check_meta_build,
    check_empty_batch,
    check_save_and_load,
    check_bfloat16,
    check_gradients,
    check_batch_invariance,
    check_raster_order,
    check_image_size,
    check_layer_groups,
)


def check_encoder(spec: str | Mapping[str, Any] | EncoderConfig) -> list[str]:
    """Run every check on an encoder; returns the checks' names.

    spec: a registered type (its `VisionEncoder.tiny` config is used), a shipped entry, or a config. Raises
    `AssertionError` naming the check and what broke, `UnknownName`, or `ConfigError`.
    """
    config = resolve_example(spec)
    return run_checks(CHECKS, config)
