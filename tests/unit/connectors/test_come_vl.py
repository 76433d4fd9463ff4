"""Does the connector of two encoders' layers compute what CoME-VL does, by a reference of its own written step by step?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm.connectors import CONNECTORS
from mllm.connectors.build import build_connector, connector_config
from mllm.connectors.come_vl import OrthogonalLinear
from mllm.errors import ConfigError
from mllm.types import EncoderInfo, ImageSpec, VisionFeatures

IMAGE = ImageSpec(height=48, width=48)
ENCODERS = {
    "siglip": EncoderInfo(image=IMAGE, grid=(8, 8), width=3 * 16),
    "dino": EncoderInfo(image=IMAGE, grid=(6, 10), width=2 * 12),
}
SPEC: dict[str, Any] = {
    "type": "come_vl",
    "layers": {"siglip": 3, "dino": 2},
    "pool_heads": 2,
    "num_heads": 2,
    "dropout": 0.0,
}
WIDTH = 28


def made(**changes: Any) -> Any:
    torch.manual_seed(0)
    connector = build_connector({**SPEC, **changes}, ENCODERS, WIDTH).eval()
    with torch.no_grad():
        for name, parameter in connector.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if "skew" in name else 0.2)
        connector.gate.fill_(0.7)
    return connector


def features(seed: int = 0) -> dict[str, VisionFeatures]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: VisionFeatures(torch.randn(2, info.grid[0] * info.grid[1], info.width, generator=generator), info.grid)
        for name, info in ENCODERS.items()
    }


def mixed(part: Any, tokens: Tensor, count: int) -> Tensor:
    """softmax-weighted sum of Orth1(LN(z_k)), then Orth2(LN(·))."""
    shares, total = part.logits.softmax(0), 0
    for share, layer in zip(shares, tokens.chunk(count, dim=-1), strict=True):
        total = total + share * F.linear(part.norm(layer), part.each.weight)
    return F.linear(part.norm(total), part.joined.weight)


def pooled(part: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Window by window: the mean of 2 × 2 tokens asks them, in heads."""
    maps, rows = tokens.unflatten(1, grid), []
    for row in range(0, grid[0], 2):
        for column in range(0, grid[1], 2):
            window = maps[:, row : row + 2, column : column + 2].flatten(1, 2)
            q, k, v = part.query(window.mean(1, keepdim=True)), part.key(window), part.value(window)
            heads = []
            for a, b, c in zip(*(x.chunk(part.num_heads, dim=-1) for x in (q, k, v)), strict=True):
                heads.append((a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) @ c)
            rows.append(part.out(torch.cat(heads, dim=-1)))
    return torch.cat(rows, dim=1)


def turned(x: Tensor, place: tuple[float, float], frequencies: Tensor) -> Tensor:
    """One token's head ``(B, d)``: pairs of neighbours turned by half π times coordinate times frequency, the first ones left."""
    x = x.clone()
    start = x.shape[-1] - 4 * frequencies.shape[1]
    for axis in range(2):
        for number, frequency in enumerate(frequencies[axis]):
            angle = 0.5 * math.pi * place[axis] * frequency
            at = start + 2 * (axis * frequencies.shape[1] + number)
            a, b = x[:, at].clone(), x[:, at + 1].clone()
            x[:, at], x[:, at + 1] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return x


def across(part: Any, one: Tensor, other: Tensor, grids: Any, reach: float | None) -> Tensor:
    cells = [
        [(r / (rows - 1), c / (columns - 1)) for r in range(rows) for c in range(columns)] for rows, columns in grids
    ]
    q, k, v = part.query(one), part.key(other), part.value(other)
    heads = []
    for a, b, c in zip(*(x.chunk(part.num_heads, dim=-1) for x in (q, k, v)), strict=True):
        a = torch.stack([turned(a[:, n], place, part.frequencies) for n, place in enumerate(cells[0])], 1)
        b = torch.stack([turned(b[:, n], place, part.frequencies) for n, place in enumerate(cells[1])], 1)
        logits = a @ b.mT / math.sqrt(a.shape[-1])
        if reach is not None:
            far = torch.tensor([[math.dist(here, there) > reach for there in cells[1]] for here in cells[0]])
            logits = logits.masked_fill(far, -1e30)
        heads.append(logits.softmax(-1) @ c)
    return part.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("reach", [0.3, None])
@torch.no_grad()
def test_it_equals_the_steps_of_the_paper(reach: float | None) -> None:
    connector, given = made(reach=reach), features()
    tokens = {}
    for name, info in ENCODERS.items():
        found = mixed(connector.mixes[name], given[name].tokens, SPEC["layers"][name])
        if name == "dino":
            mlp = connector.mlp
            value, gate = mlp.inner(mlp.norm(found)).chunk(2, dim=-1)
            found = found + mlp.out(value * F.gelu(gate))
        found = connector.inputs[name](pooled(connector.pools[name], found, info.grid))
        tokens[name] = connector.norms[name](found)
    seen = across(connector.attention, tokens["siglip"], tokens["dino"], [(4, 4), (3, 5)], reach)
    wanted = tokens["siglip"] + math.tanh(0.7) * seen
    have = connector(given).unflatten(0, (2, -1))
    assert have.shape == (2, connector.layout(connector.config, ENCODERS).num_tokens, WIDTH) == (2, 16, WIDTH)
    torch.testing.assert_close(have, wanted, atol=1e-5, rtol=1e-5)
    other = {**given, "dino": features(1)["dino"]}
    assert (connector(other) - have.flatten(0, 1)).abs().max() > 1e-2, (
        "the second encoder must matter for this test to mean anything"
    )


@torch.no_grad()
def test_at_the_start_the_second_encoder_adds_nothing_and_the_gate_learns() -> None:
    connector = build_connector(SPEC, ENCODERS, WIDTH).eval()
    given, other = features(), {**features(), "dino": features(1)["dino"]}
    assert torch.equal(connector(given), connector(other))
    with torch.enable_grad():
        connector(given).square().sum().backward()
    assert float(connector.gate.grad.abs()) > 0


def test_maps_stay_orthogonal_as_torchs_own_do() -> None:
    torch.manual_seed(0)
    own, theirs = OrthogonalLinear(6), nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        own.skew.normal_()
        nn.init.eye_(theirs.weight)
    nn.utils.parametrizations.orthogonal(theirs, orthogonal_map="matrix_exp")
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(own.skew)  # type: ignore[union-attr]
    torch.testing.assert_close(own.weight, theirs.weight, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own.weight @ own.weight.T, torch.eye(6), atol=1e-5, rtol=0)
    x = torch.randn(4, 6)
    torch.testing.assert_close(own(x).norm(dim=-1), x.norm(dim=-1))
    own.to(torch.bfloat16)
    assert own(x.bfloat16()).dtype is torch.bfloat16


MISFITS = [
    ({"layers": {"siglip": 5}}, WIDTH, "siglip.*gives 48 channels, which are not 5 layers of one width"),
    ({"layers": {"sigclip": 2}}, WIDTH, "did you mean 'siglip'"),
    ({"pool": 4}, WIDTH, r"dino.*grid 6×10, which pool 4 does not divide"),
    ({"pool_heads": 5}, WIDTH, "pool_heads: 5 do not divide the width 16"),
    ({}, 30, "num_heads: 2 heads of even width, 6 or more, do not divide the language model's 30"),
]


@pytest.mark.parametrize(("changes", "width", "message"), MISFITS)
def test_what_does_not_fit_is_said(changes: dict[str, Any], width: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_connector({**SPEC, **changes}, ENCODERS, width)
    with pytest.raises(ConfigError, match="mixes two encoders, and the model has 1"):
        CONNECTORS.get("come_vl").layout(connector_config(SPEC), {"siglip": ENCODERS["siglip"]})
