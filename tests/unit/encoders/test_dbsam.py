"""Does DB-SAM's exchange read what sampled maps would hold without ever writing them, and SAM attend for a few pictures at once?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mllm.encoders.backbones import dbsam, samtrunk
from mllm.encoders.backbones.dbsam import DbSamConfig, DeformableLayer
from mllm.testing.encoders import build_example, resolve_example, sample_pixels


class Written(TorchDispatchMode):
    """The largest tensor that an operation makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, made.numel())
        return made


def exchange(width: int = 48, heads: int = 3) -> DeformableLayer:
    torch.manual_seed(3)
    layer = DeformableLayer(DbSamConfig(type="dbsam", width=width, num_heads=heads), levels=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
        layer.offsets.weight.mul_(2)  # some places are outside
    return layer


def sampled(layer: DeformableLayer, x: torch.Tensor) -> torch.Tensor:
    """Deformable DETR's formula (arXiv 2010.04159): places as shares of the map, a sampled map for every head and level."""
    levels, rows, cols = x.shape[1:4]
    flat = x.flatten(1, 3)
    heads, points = layer.heads, layer.points
    shares = layer.shares(flat).unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, (levels, points))
    offsets = layer.offsets(flat).unflatten(-1, (heads, levels, points, 2))
    values = layer.values(flat).unflatten(1, (levels, rows, cols)).unflatten(-1, (heads, -1))
    y, x_ = ((torch.arange(n) + 0.5) / n for n in (rows, cols))
    centres = torch.stack(torch.meshgrid(x_, y, indexing="xy"), -1).flatten(0, 1).repeat(levels, 1)
    places = 2 * (centres[:, None, None, None] + offsets / torch.tensor([cols, rows])) - 1
    heard = []
    for head in range(heads):
        found = 0
        for level in range(levels):
            maps = values[:, level, :, :, head].permute(0, 3, 1, 2)
            seen = F.grid_sample(maps, places[:, :, head, level], mode="bilinear", align_corners=False)
            found = found + (seen * shares[:, None, :, head, level]).sum(-1)
        heard.append(found.transpose(1, 2))
    return layer.out(torch.cat(heard, -1)).view_as(x)


def answers(layer, looks, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    found = looks(x)
    found.sin().sum().backward()
    return [found.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_the_exchange_is_deformable_attention_with_its_gradients(at_once, monkeypatch):
    monkeypatch.setattr(dbsam, "_LOOKS", at_once)
    layer = exchange()
    x = torch.randn(2, 3, 5, 7, 48)
    for ours, wanted in zip(answers(layer, layer.look, x), answers(layer, lambda x: sampled(layer, x), x), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_exchange_writes_no_sampled_maps(monkeypatch):
    """What it writes does not grow with the width of a head, and with the number of pictures only by what they are themselves."""
    monkeypatch.setattr(dbsam, "_LOOKS", 1)
    layer = exchange(width=384)
    for pictures in (1, 4):
        x = torch.randn(pictures, 3, 6, 6, 384)
        with Written() as written:
            layer.look(x)
        cells = 4 * layer.points * layer.heads * layer.levels * x[0, ..., 0].numel()
        assert written.largest <= max(cells, x.numel())
        assert written.largest < layer.points * x.numel() / 3, (
            "the sampled maps of one level are as large as all the points' values"
        )


@torch.no_grad()
def test_sams_global_attention_writes_its_summands_for_a_few_pictures(monkeypatch):
    encoder = build_example(resolve_example("dbsam"))
    pixels = sample_pixels(encoder.config, 3)
    wanted = encoder(pixels).tokens
    layer = encoder.model.vit.layers[1]
    assert layer.window_size == 0
    x = torch.randn(3, 16, 16, 32)
    pairs = 2 * 256**2
    for at_once, pictures in ((pairs, 1), (2 * pairs, 2), (3 * pairs, 3)):
        monkeypatch.setattr(samtrunk, "_PAIRS", at_once)
        with Written() as written:
            samtrunk.see(layer, x)
        assert pictures * pairs <= written.largest < (pictures + 1) * pairs
        torch.testing.assert_close(encoder(pixels).tokens, wanted, rtol=1e-5, atol=1e-5)
