"""Does a router keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mllm.routers import ROUTERS
from mllm.routers.base import Router
from mllm.routers.build import build_router, router_config
from mllm.testing.running import run_checks
from mllm.types import Routing

Case = tuple[dict[str, Any], int, int]


def _build(case: Case, *, seed: int = 0) -> Router:
    torch.manual_seed(seed)
    return build_router(*case).eval()


def _inputs(case: Case, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, width, generator=generator) for width in case[1:])  # type: ignore[return-value]


def _check_weights(router: Router, routing: Routing, batch: int, allowed: torch.Tensor | None = None) -> None:
    config = router.config
    assert routing.experts == tuple(config.experts), f"experts are {routing.experts}, the config says {config.experts}"
    shape = (batch, len(config.experts))
    assert tuple(routing.weights.shape) == shape, f"weights have shape {tuple(routing.weights.shape)}, expected {shape}"
    weights = routing.weights.detach()
    assert torch.isfinite(weights).all() and (weights >= 0).all(), f"weights are not all finite and ≥ 0: {weights}"
    sums = weights.sum(-1)
    chosen = (weights > 0).sum(-1)
    assert ((sums - 1).abs() < 1e-5)[chosen > 0].all(), f"weights of chosen experts do not sum to 1: {sums.tolist()}"
    assert (chosen <= config.top_k).all(), f"more than top_k = {config.top_k} experts chosen: {chosen.tolist()}"
    if allowed is not None:
        assert not weights[~allowed].any(), "an expert that is not allowed has a weight"


def check_weights(name: str, case: Case) -> None:
    """Weights sum to 1 over at most k experts, with and without a question, in training and evaluation."""
    router = _build(case)
    summary, text = _inputs(case, 5)
    for training in (True, False):
        router.train(training)
        _check_weights(router, router(summary, text), 5)
        _check_weights(router, router(summary), 5)


def check_allowed(name: str, case: Case) -> None:
    """Experts that are not allowed get no weight; an image with none allowed gets a row of zeros, and no NaN."""
    router = _build(case)
    summary, text = _inputs(case, 4)
    allowed = torch.ones(4, len(router.config.experts), dtype=torch.bool)
    allowed[0] = False
    allowed[1, 0] = False
    allowed[2, 1:] = False
    for training in (True, False):
        routing = router.train(training)(summary, text, allowed)
        _check_weights(router, routing, 4, allowed)
        for key, loss in routing.losses.items():
            assert torch.isfinite(loss), f"loss {key} is not finite when an image has no allowed expert"


def check_empty_batch(name: str, case: Case) -> None:
    """No images: no rows, finite losses, and parameters with zero gradients."""
    router = _build(case).train()
    summary, text = _inputs(case, 0)
    routing = router(summary, text)
    _check_weights(router, routing, 0)
    total = routing.weights.sum() + sum(routing.losses.values())
    assert torch.isfinite(total), "an empty batch gives a loss that is not finite"
    if list(router.parameters()):
        total.backward()
        wrong = [key for key, p in router.named_parameters() if p.grad is None or p.grad.any()]
        assert not wrong, f"an empty batch leaves these without a zero gradient: {wrong}"


def check_meta_build(name: str, case: Case) -> None:
    """Building on the meta device allocates nothing; emptied and reset, the router works."""
    with torch.device("meta"):
        router = build_router(*case)
    real = [key for key, tensor in router.state_dict(keep_vars=True).items() if tensor.device.type != "meta"]
    assert not real, f"built on the meta device, these tensors are real: {real}"
    router = router.to_empty(device="cpu")
    for parameter in router.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    router.reset_parameters()
    summary, text = _inputs(case, 3)
    _check_weights(router, router.eval()(summary, text), 3)


def check_gradients(name: str, case: Case) -> None:
    """What the weights do reaches every parameter; routing losses are finite scalars."""
    router = _build(case).train()
    summary, text = _inputs(case, 6)
    routing = router(summary, text)
    for key, loss in routing.losses.items():
        assert loss.dim() == 0 and torch.isfinite(loss), f"loss {key} is not a finite scalar: {loss}"
    if not list(router.parameters()):
        return
    (routing.weights * torch.randn_like(routing.weights)).sum().backward()
    missing = [key for key, p in router.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing, f"the weights' gradient does not reach {missing}"


def check_save_and_load(name: str, case: Case) -> None:
    """Parameters and config carry the whole router."""
    first, second = _build(case, seed=0), _build(case, seed=1)
    second.load_state_dict(first.state_dict(), strict=True)
    summary, text = _inputs(case, 5)
    same = torch.allclose(first(summary, text).weights, second(summary, text).weights, rtol=1e-5, atol=1e-6)
    assert same, "saved and loaded, the weights differ"
    assert router_config(first.config.model_dump(mode="json")) == first.config, "the config does not survive JSON"


def check_bfloat16(name: str, case: Case) -> None:
    """A bfloat16 router takes bfloat16 summaries and decides in fp32: weights still sum to 1 to five digits."""
    router = _build(case).to(torch.bfloat16)
    summary, text = (value.to(torch.bfloat16) for value in _inputs(case, 5))
    routing = router(summary, text)
    assert routing.weights.dtype == torch.float32, f"weights are {routing.weights.dtype}, expected float32"
    _check_weights(router, routing, 5)


def check_batch_invariance(name: str, case: Case) -> None:
    """An image is routed the same alone and among others."""
    router = _build(case)
    summary, text = _inputs(case, 4)
    together = router(summary, text).weights
    for image in range(4):
        alone = router(summary[image : image + 1], text[image : image + 1]).weights
        error = float((alone - together[image : image + 1]).abs().max())
        assert error < 1e-5, f"image {image} is routed differently alone and in a batch (by {error:.1e})"


CHECKS: tuple[Callable[[str, Case], None], ...] = (
    check_weights,
    check_allowed,
    check_empty_batch,
    check_meta_build,
    check_gradients,
    check_save_and_load,
    check_bfloat16,
    check_batch_invariance,
)


def check_router(
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    summary_width: int | None = None,
    text_width: int | None = None,
) -> list[str]:
    """Run every check on a registered router; returns the checks' names.

    config: keys to set beside the class's `Router.tiny` example. Raises `AssertionError` naming the check and what
    broke.
    """
    example, summary, text = ROUTERS.get(name).tiny()
    case = ({**example, **(config or {}), "type": name}, summary_width or summary, text_width or text)
    return run_checks(CHECKS, name, case)
