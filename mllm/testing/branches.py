"""Does a conditioning branch keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm.testing.running import run_checks
from mllm.visual_tokenizers import VISUAL_TOKENIZERS
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.diffusion.branches import CONDITIONING_BRANCHES
from mllm.visual_tokenizers.diffusion.branches.base import Seen
from mllm.visual_tokenizers.diffusion.calls import called
from mllm.visual_tokenizers.diffusion.conditioning import Conditions
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder


def build_example(config: Mapping[str, Any]) -> DiffusionDecoder:
    """A decoder of the config beside a tiny tokenizer of 16-pixel pictures; the same weights every time."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(VISUAL_TOKENIZERS.get("illume").tiny()).eval()
    return DiffusionDecoder(config, tokenizer).eval()


def moved(decoder: DiffusionDecoder) -> DiffusionDecoder:
    """Every parameter of the branches away from where it started."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.branches.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder


def example(decoder: DiffusionDecoder, batch: int = 2) -> tuple[Tensor, Tensor, Conditions]:
    """What is denoised, times, and conditions, with a hidden corner in every picture."""
    noise = torch.Generator().manual_seed(2)
    random = lambda *shape: torch.randn(*shape, generator=noise)  # noqa: E731
    grids, dims = decoder.tokenizer.grids, decoder.tokenizer.embed_dims
    vectors = {name: random(batch, grids[name][0] * grids[name][1], dim) for name, dim in dims.items()}
    kept = random(batch, 1 + decoder.channels, *decoder.size)
    kept[:, 0] = 0
    kept[:, 0, : decoder.side // 2, : decoder.side // 2] = 1
    shown: dict[str, Any] = {"kept": kept if "source" in decoder.config.conditions else None}
    if "reconstruction" in decoder.config.conditions:
        shown["reconstruction"] = random(batch, 3, 16, 16)
    noisy = random(batch, decoder.channels, *decoder.size)
    return noisy, torch.linspace(100, 900, batch), decoder.conditions(vectors, **shown)


def _alone(decoder: DiffusionDecoder, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
    """What the network tells without branches."""
    inputs = conditions.beside(noisy, kept=decoder.shows("source"))
    return called(decoder.network, decoder.config, inputs, times, conditions.tokens).sample


@torch.no_grad()
def check_neutral_start(config: Mapping[str, Any]) -> None:
    """Before it is trained a branch changes nothing, to the bit."""
    decoder = build_example(config)
    case = example(decoder)
    assert torch.equal(decoder.denoise(*case), _alone(decoder, *case)), "an untrained branch changes what is told"


@torch.no_grad()
def check_it_speaks(config: Mapping[str, Any]) -> None:
    """Trained, it changes what the network tells, and what it tells depends on its condition."""
    decoder = moved(build_example(config))
    noisy, times, conditions = example(decoder)
    told = decoder.denoise(noisy, times, conditions)
    assert not torch.allclose(told, _alone(decoder, noisy, times, conditions), atol=1e-4), "it adds nothing"
    kept = None if conditions.kept is None else torch.cat([conditions.kept[:, :1], -conditions.kept[:, 1:]], 1)
    other = Conditions(conditions.channels, conditions.tokens, kept, {n: -v for n, v in conditions.apart.items()})
    assert not torch.allclose(told, decoder.denoise(noisy, times, other), atol=1e-5), "it does not see its condition"


@torch.no_grad()
def check_scale(config: Mapping[str, Any]) -> None:
    """At half its scale a branch adds half of everything."""
    whole = moved(build_example(config))
    half = build_example(config)
    half.load_state_dict(whole.state_dict())
    for branch in half.branches.values():
        branch.config = branch.config.model_copy(update={"scale": 0.5 * branch.config.scale})  # type: ignore[union-attr]
    noisy, times, conditions = example(whole)
    inputs = conditions.beside(noisy, kept=whole.shows("source"))

    def call(network: nn.Module, seen: Tensor, **more: Any) -> Any:
        return called(network, whole.config, seen, times, conditions.tokens, **more)

    hidden = None if conditions.kept is None else conditions.kept[:, :1]
    for name in whole.branches:
        first, second = whole.branches[name], half.branches[name]
        seen = Seen(inputs, conditions.seen(first.config.sees), hidden, conditions.tokens, call)  # type: ignore[union-attr]
        for full, part in zip(first(seen), second(seen), strict=True):
            assert (full is None) == (part is None), f"{name}: other places at another scale"
            if full is not None and part is not None:
                assert torch.allclose(full, 2 * part, rtol=1e-4, atol=1e-6), f"{name}: half the scale is not half"


@torch.no_grad()
def check_batch_invariance(config: Mapping[str, Any]) -> None:
    """What is told of a picture does not depend on the others of the batch."""
    decoder = moved(build_example(config))
    noisy, times, conditions = example(decoder)
    pick = lambda value: None if value is None else value[1:]  # noqa: E731
    apart = {name: value[1:] for name, value in conditions.apart.items()}
    alone = Conditions(pick(conditions.channels), pick(conditions.tokens), pick(conditions.kept), apart)
    together = decoder.denoise(noisy, times, conditions)[1:]
    assert torch.allclose(together, decoder.denoise(noisy[1:], times[1:], alone), rtol=1e-4, atol=1e-5), (
        "alone, a picture is told otherwise"
    )


def check_own_memory(config: Mapping[str, Any]) -> None:
    """No parameter of a branch is the trunk's, which would change with it."""
    decoder = build_example(config)
    trunk = {p.untyped_storage().data_ptr() for p in decoder.network.parameters()}
    shared = [n for n, p in decoder.branches.named_parameters() if p.untyped_storage().data_ptr() in trunk]
    assert not shared, f"{shared[:3]} share memory with the network"


def check_gradients(config: Mapping[str, Any]) -> None:
    """With the network frozen, every parameter of a branch gets a gradient."""
    decoder = moved(build_example(config)).train()
    decoder.network.requires_grad_(False)
    decoder.denoise(*example(decoder)).square().mean().backward()
    missing = [name for name, p in decoder.branches.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient reaches {missing[:5]}"


def check_meta_build(config: Mapping[str, Any]) -> None:
    """Built on the meta device it holds no numbers."""
    with torch.device("meta"):
        tokenizer = build_tokenizer(VISUAL_TOKENIZERS.get("illume").tiny())
        decoder = DiffusionDecoder(config, tokenizer)
    real = [name for name, p in decoder.branches.named_parameters() if not p.is_meta]
    assert not real, f"{real[:5]} are not on meta"


@torch.no_grad()
def check_save_and_load(config: Mapping[str, Any]) -> None:
    """A saved decoder opens with its branches and tells the same."""
    decoder = moved(build_example(config))
    case = example(decoder)
    with tempfile.TemporaryDirectory() as folder:
        decoder.save_pretrained(folder)
        opened = DiffusionDecoder.from_pretrained(folder)
    assert opened.config == decoder.config, "the config is another one"
    assert torch.allclose(opened.denoise(*case), decoder.denoise(*case), rtol=1e-5, atol=1e-6), "it tells otherwise"


CHECKS = (
    check_neutral_start,
    check_it_speaks,
    check_scale,
    check_batch_invariance,
    check_own_memory,
    check_gradients,
    check_meta_build,
    check_save_and_load,
)


def check_branch(name: str) -> list[str]:
    """Run every check on the branch registered under ``name``, in the decoder of its `ConditioningBranch.tiny`; returns the checks' names.
    Raises `AssertionError` naming the check and what broke, or `UnknownName`."""
    return run_checks(CHECKS, CONDITIONING_BRANCHES.get(name).tiny())
