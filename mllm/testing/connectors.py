"""Does a connector keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.connectors import CONNECTORS
from mllm.connectors.base import Connector, ConnectorConfig
from mllm.connectors.build import build_connector, connector_config
from mllm.testing.running import run_checks
from mllm.types import EncoderInfo, Routing, VisionFeatures

Case = tuple[dict[str, Any], dict[str, EncoderInfo], int]


def sample_features(
    connector: type[Connector],
    config: ConnectorConfig,
    encoders: Mapping[str, EncoderInfo],
    batch: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, VisionFeatures]:
    """Random features of ``batch`` images, with attention maps where the connector reads them. Image k of a larger
    batch is image k of a smaller one."""
    heads = connector.attention_from(config, encoders)
    features = {}
    for index, (name, info) in enumerate(encoders.items()):
        count, prefix = info.grid[0] * info.grid[1], info.num_prefix_tokens
        rows, maps = [], []
        for image in range(batch):
            generator = torch.Generator().manual_seed(seed * 10_007 + image * 101 + index)
            rows.append(torch.randn(count, info.width, generator=generator))
            if name in heads:
                maps.append(torch.randn(heads[name], prefix + count, prefix + count, generator=generator).softmax(-1))
        tokens = torch.stack(rows) if rows else torch.zeros(0, count, info.width)
        attention = None
        if name in heads:
            size = (0, heads[name], prefix + count, prefix + count)
            attention = (torch.stack(maps) if maps else torch.zeros(size)).to(dtype)
        features[name] = VisionFeatures(tokens.to(dtype), info.grid, attention=attention)
    return features


def sample_routing(experts: tuple[str, ...], batch: int) -> Routing:
    """Image k uses expert k modulo E + 1; every last one in a row uses none."""
    weights = torch.zeros(batch, len(experts) + 1)
    if batch:
        weights[torch.arange(batch), torch.arange(batch) % (len(experts) + 1)] = 1.0
    return Routing(experts, weights[:, : len(experts)])


def _build(case: Case, *, seed: int = 0, stirred: bool = True) -> Connector:
    """A connector of the case in evaluation mode; stirred: parameters that start at zero are given values."""
    torch.manual_seed(seed)
    connector = build_connector(*case).eval()
    if stirred:
        for parameter in connector.parameters():
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.1)
    return connector


def _run(connector: Connector, batch: int, *, text: bool = True, **options: Any) -> Tensor:
    features = sample_features(type(connector), connector.config, connector.encoders, batch, **options)
    if not text:
        return connector.view_tokens(features)
    summary = torch.randn(batch, connector.width, generator=torch.Generator().manual_seed(3))
    return connector.view_tokens(features, None, summary.to(options.get("dtype", torch.float32)))


def check_shapes(name: str, case: Case) -> None:
    """The output has the layout's number of tokens; grid and separators add up to it."""
    connector = _build(case)
    layout = type(connector).layout(connector.config, connector.encoders)
    rows, cols = layout.grid
    total = layout.leading + rows * cols + rows * layout.row_separators
    assert layout.num_tokens == total, f"layout says {layout.num_tokens} tokens, its grid and separators make {total}"
    for text in (True, False):
        got = tuple(_run(connector, 2, text=text).shape)
        want = (2, layout.num_tokens, connector.width * (1 + layout.levels) + layout.beside)
        assert got == want, f"forward gives shape {got}, layout says {want}"
    assert type(connector).layout(connector.config, connector.encoders) == layout, "layout changes from call to call"
    features = sample_features(type(connector), connector.config, connector.encoders, 2)
    assert _same(connector(features), connector.view_tokens(features).flatten(0, 1)), (
        "seen once as a whole, images are not their views' tokens one after another"
    )


def check_meta_build(name: str, case: Case) -> None:
    """Building on the meta device allocates nothing; emptied and reset, the module works and is finite."""
    with torch.device("meta"):
        connector = build_connector(*case)
    real = [key for key, tensor in connector.state_dict(keep_vars=True).items() if tensor.device.type != "meta"]
    assert not real, f"built on the meta device, these tensors are real: {real}"
    lost = sorted(key for key, _ in connector.named_buffers() if key not in connector.state_dict())
    assert not lost, f"buffers that no file holds are lost in a meta build: {lost}; compute them in forward"
    connector = connector.to_empty(device="cpu")
    for parameter in connector.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    connector.reset_parameters()
    left = [key for key, parameter in connector.named_parameters() if not torch.isfinite(parameter).all()]
    assert not left, f"reset_parameters leaves these without a value: {left}"
    assert torch.isfinite(_run(connector.eval(), 2)).all(), "forward after a meta build and reset is not finite"


def check_gradients(name: str, case: Case) -> None:
    """Every parameter and every encoder's features get a gradient; none is missing."""
    connector = _build(case)
    features = sample_features(type(connector), connector.config, connector.encoders, 2)
    for feature in features.values():
        feature.tokens.requires_grad_()
    output = connector.view_tokens(features, None, torch.randn(2, connector.width))
    (output * torch.randn_like(output)).sum().backward()
    missing = [key for key, parameter in connector.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    cut = [key for key, feature in features.items() if feature.tokens.grad is None or not feature.tokens.grad.any()]
    assert not cut, f"no gradient reaches the features of {cut}"


def check_empty_batch(name: str, case: Case) -> None:
    """No images: an empty result and zero gradients, not missing ones."""
    connector = _build(case)
    layout = type(connector).layout(connector.config, connector.encoders)
    output = _run(connector, 0)
    want = (0, layout.num_tokens, connector.width * (1 + layout.levels) + layout.beside)
    assert tuple(output.shape) == want, f"an empty batch gives shape {tuple(output.shape)}, expected {want}"
    output.sum().backward()
    missing = [key for key, p in connector.named_parameters() if p.grad is None]
    assert not missing, f"an empty batch leaves these without a (zero) gradient: {missing}"
    wrong = [key for key, p in connector.named_parameters() if p.grad is not None and p.grad.any()]
    assert not wrong, f"an empty batch gives these a gradient: {wrong}"


def check_save_and_load(name: str, case: Case) -> None:
    """A connector built again and loaded from a file gives the same output; the config survives as JSON."""
    from safetensors.torch import load_file, save_file

    first, second = _build(case, seed=0), _build(case, seed=1)
    want = _run(first, 2)
    assert not _same(_run(second, 2), want), "the seed changes nothing: are the parameters initialised at all?"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "connector.safetensors"
        save_file({key: value.contiguous() for key, value in first.state_dict().items()}, path)
        second.load_state_dict(load_file(path), strict=True)
    assert _same(_run(second, 2), want), "saved and loaded, the output differs"
    again = connector_config(first.config.model_dump(mode="json"))
    assert again == first.config, "the config does not survive JSON"


def _same(have: Tensor, want: Tensor) -> bool:
    """Equal but for rounding: a processor may sum in another order where a matrix lies elsewhere in memory."""
    return torch.allclose(have, want, rtol=1e-5, atol=1e-6)


def check_bfloat16(name: str, case: Case) -> None:
    """In bfloat16 the output is bfloat16, finite and close to fp32."""
    connector = _build(case)
    want = _run(connector, 2)
    got = _run(connector.to(torch.bfloat16), 2, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16, f"bfloat16 in, {got.dtype} out"
    assert torch.isfinite(got).all(), "bfloat16 gives values that are not finite"
    error = float((got.float() - want).detach().norm() / want.detach().norm().clamp_min(1e-6))
    assert error < 0.05, f"bfloat16 is {error:.1%} away from fp32 (relative norm); compute sensitive parts in fp32"


def check_batch_invariance(name: str, case: Case) -> None:
    """An image gives the same tokens alone and among others."""
    connector = _build(case)
    features = sample_features(type(connector), connector.config, connector.encoders, 3)
    text = torch.randn(3, connector.width, generator=torch.Generator().manual_seed(5))
    routings: list[Routing | None] = [None]
    if connector.uses_routing and len(connector.encoders) > 1:
        routings.append(sample_routing(tuple(list(connector.encoders)[1:]), 3))
    for routing in routings:
        together = connector.view_tokens(features, routing, text)
        for image in range(3):
            part = slice(image, image + 1)
            alone = {
                key: VisionFeatures(
                    f.tokens[part], f.grid, attention=None if f.attention is None else f.attention[part]
                )
                for key, f in features.items()
            }
            route = None if routing is None else Routing(routing.experts, routing.weights[part])
            error = float((connector.view_tokens(alone, route, text[part]) - together[part]).abs().max())
            assert error < 1e-5, f"image {image} differs by {error:.1e} alone and in a batch (routing: {route})"


def check_routing(name: str, case: Case) -> None:
    """An absent expert's features do not matter, a present one's do, and a missing entry means zeros."""
    connector = _build(case)
    if not connector.uses_routing or len(connector.encoders) < 2:
        return
    experts = tuple(list(connector.encoders)[1:])
    features = sample_features(type(connector), connector.config, connector.encoders, 2)
    other = sample_features(type(connector), connector.config, connector.encoders, 2, seed=1)
    text = torch.randn(2, connector.width, generator=torch.Generator().manual_seed(5))
    for chosen in [(), *[(expert,) for expert in experts]]:
        weights = torch.tensor([[float(expert in chosen) for expert in experts]] * 2)
        want = connector.view_tokens(features, Routing(experts, weights), text)
        assert torch.isfinite(want).all(), f"routing to {chosen or 'no expert'} gives values that are not finite"
        absent = [expert for expert in experts if expert not in chosen]
        changed = {**features, **{expert: other[expert] for expert in absent}}
        assert _same(connector.view_tokens(changed, Routing(experts, weights), text), want), (
            f"routed to {chosen or 'no expert'}, the features of absent experts {absent} change the output"
        )
        without = {key: value for key, value in features.items() if key not in absent}
        assert _same(connector.view_tokens(without, Routing(experts, weights), text), want), (
            f"routed to {chosen or 'no expert'}, leaving out the features of {absent} changes the output"
        )
        for expert in chosen:
            moved = connector.view_tokens({**features, expert: other[expert]}, Routing(experts, weights), text)
            assert not _same(moved, want), f"routed to {expert!r}, its features do not change the output"


def check_gate_gradient(name: str, case: Case) -> None:
    """The loss reaches the routing weights of chosen experts, so a gate can learn; every parameter still gets a
    gradient."""
    connector = _build(case)
    if not connector.uses_routing or len(connector.encoders) < 2:
        return
    experts = tuple(list(connector.encoders)[1:])
    weights = sample_routing(experts, 2).weights.requires_grad_()
    features = sample_features(type(connector), connector.config, connector.encoders, 2)
    output = connector.view_tokens(features, Routing(experts, weights), torch.randn(2, connector.width))
    (output * torch.randn_like(output)).sum().backward()
    assert weights.grad is not None and weights.grad[0, 0] != 0, "no gradient reaches the weight of a chosen expert"
    assert torch.isfinite(weights.grad).all(), "the routing weights' gradient is not finite"
    missing = [key for key, parameter in connector.named_parameters() if parameter.grad is None]
    assert not missing, f"with experts switched off, no (zero) gradient reaches {missing}; ranks would disagree"


def check_zero_init(name: str, case: Case) -> None:
    """With ``zero_init_output`` every visual token (row separators aside) is zero at the start, and learns."""
    config, encoders, width = case
    connector = _build(({**config, "zero_init_output": True}, encoders, width), stirred=False)
    layout = type(connector).layout(connector.config, connector.encoders)
    tokens = _run(connector, 2)
    if layout.row_separators:
        tokens = tokens.unflatten(1, (layout.grid[0], layout.grid[1] + 1))[:, :, :-1]
    assert not tokens.detach().any(), "zero_init_output: the visual tokens are not zero"
    (tokens * torch.randn_like(tokens)).sum().backward()
    layers = connector.output_layers()
    assert layers and all(p.grad is not None and p.grad.any() for layer in layers for p in layer.parameters()), (
        "zero_init_output: the last layer gets no gradient"
    )


def check_feature_norm(name: str, case: Case) -> None:
    """With ``feature_norm`` the scale of an encoder's features does not matter, and every norm learns, an absent expert's too."""
    config, encoders, width = case
    connector = _build(({**config, "feature_norm": "layer_norm"}, encoders, width))
    features = sample_features(type(connector), connector.config, connector.encoders, 2)
    scaled = {key: replace(found, tokens=found.tokens * 64) for key, found in features.items()}
    summary = torch.randn(2, connector.width)
    tokens = connector(features, None, summary)
    error = float((connector(scaled, None, summary) - tokens).detach().abs().max())
    assert error < 1e-2 * float(tokens.detach().abs().max()), (
        f"feature_norm: features 64 times as large change the tokens by {error:.2g}"
    )
    if connector.uses_routing and len(encoders) > 1:
        absent = list(encoders)[-1]
        features.pop(absent)
        tokens = connector(features, Routing((absent,), torch.zeros(2, 1)), summary)
    (tokens * torch.randn_like(tokens)).sum().backward()
    missing = [key for key, parameter in connector.feature_norms.named_parameters() if parameter.grad is None]
    assert not missing, f"feature_norm: no gradient reaches {missing}"


CHECKS: tuple[Callable[[str, Case], None], ...] = (
    check_shapes,
    check_meta_build,
    check_gradients,
    check_empty_batch,
    check_save_and_load,
    check_bfloat16,
    check_batch_invariance,
    check_routing,
    check_gate_gradient,
    check_zero_init,
    check_feature_norm,
)


def check_connector(
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    encoders: Mapping[str, EncoderInfo] | None = None,
    width: int | None = None,
) -> list[str]:
    """Run every check on a registered connector; returns the checks' names.

    config: keys to set beside the class's `Connector.tiny` example; encoders, width: instead of the example's. Raises
    `AssertionError` naming the check and what broke, `UnknownName`, or `ConfigError` when the config does not fit.
    """
    example, infos, language_width = CONNECTORS.get(name).tiny()
    case = ({**example, **(config or {}), "type": name}, dict(encoders or infos), width or language_width)
    return run_checks(CHECKS, name, case)
