"""Is a model compiled for few shapes, however many there are?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mllm.encoders import ENCODERS
from mllm.encoders.backbones.vssd import VssdEncoder
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.models.compilation import WholeEncoder, best_whole, compile_layers, compile_tokenizer, repeated_layers
from mllm.testing.encoders import build_example, resolve_example, sample_pixels
from mllm.types import VisionFeatures
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.tokenflow import TokenFlow
from tests.helpers import tiny_model


def test_batches_of_many_sizes_need_few_graphs_and_change_nothing(tmp_path, monkeypatch):
    """Pictures differ in number from batch to batch, and rows in length without packing: one graph for each would reach
    torch's limit of eight."""
    model, _ = tiny_model(tmp_path)
    sizes = [(2 + k, 8 * (2 + k)) for k in range(10)]
    pixels = {"semantic": torch.randn(12, 3, 28, 28), "detail": torch.randn(12, 3, 32, 32)}
    ids = torch.randint(5, 200, (2, 96), generator=torch.Generator().manual_seed(0))

    def run(images: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = model.model.encode_images({name: value[:images] for name, value in pixels.items()})[0]
        return tokens, model(input_ids=ids[:, :length], use_cache=False).logits

    with torch.no_grad():
        wanted = [run(*size) for size in sizes]
    compile_module = nn.Module.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compile_module(self, backend=backend, **given))
    torch._dynamo.reset()
    assert compile_layers(model, fixed_length=False) == 2 + 2 + 2  # the third CLIP block is not built
    with torch.no_grad():
        for size, (tokens, logits) in zip(sizes, wanted, strict=True):
            found = run(*size)
            assert (found[0] - tokens).abs().max() < 1e-5 and (found[1] - logits).abs().max() < 1e-5
    torch._dynamo.reset()
    # Three kinds of layers, each for the first size and for any; transformers may break a layer in two graphs.
    assert 3 <= len(graphs) <= 14, len(graphs)


def test_the_blocks_of_nested_stages_are_compiled_not_the_lists_that_hold_them():
    """A list of lists is never called, so compiling its rows would do nothing."""
    spec = {**VssdEncoder.tiny(), "depths": [1, 2, 3, 2]}
    found = repeated_layers(build_encoder(encoder_config(spec, where="e")))
    blocks = [layer for layer in found if type(layer).__name__ == "Block"]
    assert len(blocks) == len(found) == 7, "convolutions with their norms are no layers"
    assert not any(isinstance(layer, nn.ModuleList | nn.ModuleDict) for layer in found)


@pytest.mark.parametrize("depths", [(1, 1, 2, 3), pytest.param((2, 2, 2, 3), marks=pytest.mark.nightly)], ids=str)
@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)
def test_a_pyramids_blocks_are_compiled_in_all_their_widths_with_and_without_gradients(monkeypatch, depths):
    """One code in several widths needs more graphs than torch allows by itself; the rest would run uncompiled."""
    spec = {**VssdEncoder.tiny(), "depths": list(depths)}
    encoder = build_encoder(encoder_config(spec, where="e")).eval()
    assert not best_whole(encoder)
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compile_module(self, backend="eager", **given))
    tower = nn.Module()
    tower.vision_tower = nn.Module()
    tower.vision_tower.encoders = nn.ModuleDict({"e": encoder})
    torch._dynamo.reset()
    compile_layers(tower, language_model=False)
    for count in (2, 3, 1):
        pixels = sample_pixels(encoder.config, count)
        with torch.no_grad():
            encoder.eval()(pixels)
        encoder.train()(pixels).tokens.sum().backward()
    torch._dynamo.reset()


class Convolutions(nn.Module):
    """A convolution network in small: no two layers alike, running statistics, features in a dataclass."""

    def __init__(self, breaks: bool = False):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)
        self.breaks = breaks

    def forward(self, pixels: torch.Tensor, *, return_attention: bool = False) -> VisionFeatures:
        maps = self.second(torch.relu(self.norm(self.first(pixels.to(self.first.weight.dtype)))))
        if self.breaks and float(maps.sum()) > 1e9:
            maps = maps * 0
        return VisionFeatures(maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3]))


def _learned(encoder: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Features, and all gradients of a loss of them."""
    encoder.zero_grad()
    tokens = encoder(pixels).tokens
    tokens.square().mean().backward()
    return [tokens.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)]


@pytest.fixture
def with_backend(monkeypatch):
    """Compile by this backend, counting graphs."""
    graphs = []
    compile_module = nn.Module.compile

    def use(name):
        plain = torch._dynamo.lookup_backend(name)

        def backend(graph, inputs):
            graphs.append(graph)
            return plain(graph, inputs)

        monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compile_module(self, backend=backend, **given))
        torch._dynamo.reset()
        return graphs

    yield use
    torch._dynamo.reset()


@pytest.mark.parametrize("varies", [False, True])
def test_a_whole_encoder_learns_the_same_in_few_graphs_whatever_the_number_of_pictures(with_backend, varies):
    torch.manual_seed(0)
    plain = Convolutions()
    whole, told = copy.deepcopy(plain), []
    names = list(whole.state_dict())
    graphs = with_backend("aot_eager")
    WholeEncoder("e", whole, varies=varies, tell=told.append)
    for count in (4, 2, 5, 3, 6, 7, 0):
        pixels = torch.randn(count, 3, 8, 8)
        if not count:
            pixels = pixels.to(torch.float32)
            assert whole.eval()(pixels).tokens.shape == (0, 16, 5)
            continue
        for found, wanted in zip(_learned(whole, pixels), _learned(plain, pixels), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(graphs) == (1 if varies else 2) and not told
    for name, value in plain.state_dict().items():  # running statistics too
        torch.testing.assert_close(whole.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert list(whole.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(whole.eval()(pixels := torch.randn(3, 3, 8, 8)).tokens, plain.eval()(pixels).tokens)
    made = len(graphs)
    copy.deepcopy(whole)(pixels)
    assert len(graphs) == made, "a copy runs as it was written"


def test_an_encoder_that_breaks_a_graph_runs_as_before_and_says_so_once(with_backend):
    torch.manual_seed(0)
    encoder, told = Convolutions(breaks=True), []
    pixels = torch.randn(2, 3, 8, 8)
    wanted = _learned(copy.deepcopy(encoder), pixels)
    graphs = with_backend("eager")
    WholeEncoder("objects", encoder, varies=False, tell=told.append)
    for _ in range(2):
        for found, value in zip(_learned(encoder, pixels), wanted, strict=True):
            torch.testing.assert_close(found, value)
    assert not graphs and len(told) == 1
    assert told[0].startswith("encoder objects cannot be compiled as a whole (") and told[0].endswith("slower")


def test_an_encoder_that_is_asked_for_more_than_features_runs_as_before_and_says_so_once(with_backend):
    encoder, told = Convolutions(), []
    graphs = with_backend("eager")
    WholeEncoder("objects", encoder, varies=False, tell=told.append)
    encoder(torch.randn(2, 3, 8, 8), return_attention=False)
    assert len(graphs) == 1 and not told
    for _ in range(2):
        encoder(torch.randn(2, 3, 8, 8), return_attention=True)
    assert told == [
        "encoder objects is called with return_attention and is not compiled as a whole; it runs uncompiled, slower"
    ]


CHARTS = [
    {
        "type": "timm",
        "architecture": "tf_efficientnet_lite0",
        "image_size": 32,
        "layers": [-1, -2, -3],
        "final_norm": False,
    },
    {"type": "ppocr", "image_size": 32},
]


@pytest.mark.parametrize("spec", CHARTS, ids=["objects", "text"])
def test_the_encoders_of_real_charts_are_one_graph_each(with_backend, spec):
    """By its blocks one had ten graphs, and of the other, which has none, nothing was compiled."""
    torch.manual_seed(0)
    encoder, told = build_encoder(encoder_config(spec, where="e")).train(), []
    assert best_whole(encoder)
    plain = copy.deepcopy(encoder)
    graphs = with_backend("eager")
    WholeEncoder("e", encoder, varies=True, tell=told.append)
    for count in (2, 3):
        pixels = torch.randn(count, 3, 32, 32)
        for found, wanted in zip(_learned(encoder, pixels), _learned(plain, pixels), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and not told


def test_blocks_that_are_alike_are_compiled_one_by_one(tmp_path):
    model, _ = tiny_model(tmp_path)
    assert not any(best_whole(encoder) for encoder in model.model.vision_tower.encoders.values())


def test_a_compiled_tokenizer_writes_and_reads_the_same_codes_and_keeps_its_names(monkeypatch):
    plain = build_tokenizer(TokenFlow.tiny()).eval()
    compiled = build_tokenizer(TokenFlow.tiny()).eval()
    compiled.load_state_dict(plain.state_dict())
    compile_module, graphs = nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: compile_module(self, backend=backend, **given))
    torch._dynamo.reset()
    assert compile_tokenizer(compiled) == 2  # the encoder's and the decoder's convolutions; the student has one layer
    for number in (2, 3):
        pixels = torch.rand(number, 3, 16, 16) * 2 - 1
        codes = plain.encode(pixels)
        assert torch.equal(compiled.encode(pixels).codes["shared"], codes.codes["shared"])
        with torch.no_grad():
            assert (compiled.decode(codes) - plain.decode(codes)).abs().max() < 1e-5
    assert 2 <= len(graphs) <= 6, "each network runs compiled, for the first number of images and for any"
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch._dynamo.reset()


@torch._dynamo.config.patch(recompile_limit=2)
def test_code_that_runs_uncompiled_after_too_many_shapes_is_told():
    from mllm.models.compilation import tell_uncompiled

    told: list[str] = []
    tell_uncompiled(lambda line: told.append("an earlier stage's"))
    tell_uncompiled(told.append)
    torch._dynamo.reset()

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 + 1

    layer = Layer()
    layer.compile(backend="eager", dynamic=False)
    for rows in (2, 3, 4, 5):
        layer(torch.zeros(rows, 4))
    torch._dynamo.reset()
    assert len(told) == 1 and "more shapes than torch compiles it for (2) and runs uncompiled" in told[0]
    tell_uncompiled(print)


@pytest.mark.parametrize("name", [*ENCODERS])
def test_no_encoders_repeated_layers_are_such_that_torch_compiles_nothing_of_them(name):
    """`nn.Module.compile` on a bare `nn.Sequential` finds no code of its own to compile, and says nothing."""
    config = resolve_example(name)
    with torch.device("meta"):
        found = repeated_layers(build_encoder(config))
    assert not [layer for layer in found if type(layer).__module__ == "torch.nn.modules.container"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*ENCODERS])
@torch._dynamo.config.patch(recompile_limit=64)  # a pyramid's blocks are one code at many sizes, a graph each
def test_every_encoders_repeated_layers_compile_without_a_break(name):
    encoder = build_example(resolve_example(name))
    pixels = sample_pixels(encoder.config, 2)
    with torch.no_grad():
        wanted = encoder(pixels).tokens
        torch._dynamo.reset()
        for layer in repeated_layers(encoder):
            layer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(encoder(pixels).tokens, wanted, rtol=1e-5, atol=1e-5)
