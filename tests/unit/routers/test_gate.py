"""Does the gate choose, weigh, learn and balance by the numbers?"""

from __future__ import annotations

import math

import pytest
import torch

from mllm.errors import AlignmentError
from mllm.routers.build import build_router
from mllm.routers.gate import masked_softmax, routing_loss
from mllm.routers.losses import LOSSES, batch_entropy, entropy, instance_entropy, load_balance, z_loss
from mllm.types import Routing


def gate(experts: int = 3, **options):
    torch.manual_seed(0)
    names = [f"e{i}" for i in range(experts)]
    return build_router({"type": "gate", "experts": names, "hidden": 8, **options}, 6, 8)


def with_logits(router, logits: list[list[float]]):
    router.logits = lambda summary, text=None: torch.tensor(logits)
    return router.eval()


def test_weights_are_the_k_largest_probabilities_scaled_to_sum_one():
    router = with_logits(gate(top_k=2), [[math.log(5.0), math.log(3.0), math.log(2.0)]])
    weights = router(torch.zeros(1, 6)).weights
    torch.testing.assert_close(weights, torch.tensor([[5 / 8, 3 / 8, 0.0]]))


def test_the_threshold_acts_in_evaluation_only_and_may_leave_no_expert():
    logits = [[math.log(6.0), math.log(3.0), math.log(1.0)], [0.0, 0.0, 0.0]]
    router = with_logits(gate(top_k=2, threshold=0.4), logits)
    torch.testing.assert_close(router(torch.zeros(2, 6)).weights, torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    router.train()
    assert (router(torch.zeros(2, 6)).weights > 0).sum(-1).tolist() == [2, 2]


def test_temperature_sharpens_and_noise_moves_in_training_only():
    cold, warm = gate(temperature=0.1), gate(temperature=1.0)
    summary, text = torch.randn(4, 6), torch.randn(4, 8)
    torch.testing.assert_close(cold.logits(summary, text), warm.logits(summary, text) * 10)
    noisy = gate(top_k=3, noise=5.0)
    assert torch.equal(noisy.eval()(summary, text).weights, noisy(summary, text).weights)
    noisy.train()
    assert not torch.equal(noisy(summary, text).weights, noisy(summary, text).weights)


def test_top_1_gives_weight_exactly_one_and_still_a_gradient():
    router = gate(top_k=1).train()
    routing = router(torch.randn(5, 6), torch.randn(5, 8))
    assert set(routing.weights.flatten().tolist()) == {0.0, 1.0}
    (routing.weights * torch.randn(5, 3)).sum().backward()
    assert router.mlp[-1].weight.grad.abs().sum() > 0
    plain = gate(top_k=1, straight_through=False).train()
    routing = plain(torch.randn(5, 6), torch.randn(5, 8))
    (routing.weights * torch.randn(5, 3)).sum().backward()
    assert plain.mlp[-1].weight.grad.abs().max() < 1e-6  # why straight_through is the default for top_k: 1


def test_straight_through_has_the_gradient_of_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    router = gate(top_k=1)
    router.select(masked_softmax(logits, torch.ones(1, 3, dtype=torch.bool))).sum().backward()
    p = logits.detach().softmax(-1)[0]
    torch.testing.assert_close(logits.grad[0], p[0] * (torch.tensor([1.0, 0.0, 0.0]) - p))


def test_what_is_not_allowed_is_not_chosen_and_the_rest_share():
    router = with_logits(gate(top_k=2), [[3.0, 1.0, 1.0]] * 3)
    allowed = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    weights = router(torch.zeros(3, 6), allowed=allowed).weights
    torch.testing.assert_close(weights, torch.tensor([[0, 0.5, 0.5], [0, 0, 1.0], [0, 0, 0]]))
    with pytest.raises(AlignmentError, match=r"allowed has shape \(1, 3\), expected \(images, experts\) = \(3, 3\)"):
        router(torch.zeros(3, 6), allowed=allowed[:1])


def test_the_gate_looks_at_what_it_is_told_to():
    summaries, texts = torch.randn(2, 1, 6), torch.randn(2, 1, 8)

    def differs(router) -> tuple[bool, bool]:
        first = router.logits(summaries[0], texts[0])
        return (
            not torch.equal(router.logits(summaries[1], texts[0]), first),
            not torch.equal(router.logits(summaries[0], texts[1]), first),
        )

    assert differs(gate(inputs="both")) == (True, True)
    assert differs(gate(inputs="image")) == (True, False)
    assert differs(gate(inputs="text")) == (False, True)
    with pytest.raises(AlignmentError, match="no question was given"):
        gate(inputs="text")(summaries[0])
    with pytest.raises(AlignmentError, match=r"image summary has shape \(1, 5\), expected \(1, 6\)"):
        gate()(torch.zeros(1, 5))


# losses


OPEN = torch.ones(4, 2, dtype=torch.bool)


def one_hot(*experts: int) -> torch.Tensor:
    return torch.eye(2)[list(experts)]


def test_load_balance_is_one_at_balance_and_e_at_collapse():
    even, collapsed = one_hot(0, 1, 0, 1), one_hot(0, 0, 0, 0)
    assert load_balance(even, even, even, OPEN).item() == pytest.approx(1.0)
    assert load_balance(collapsed, collapsed, collapsed, OPEN).item() == pytest.approx(2.0)


def test_z_loss_is_the_mean_squared_log_sum_exp():
    logits = torch.randn(4, 2)
    got = z_loss(logits, logits.softmax(-1), logits, OPEN)
    torch.testing.assert_close(got, logits.logsumexp(-1).square().mean())


def test_the_two_entropies_want_use_of_all_experts_and_certainty_about_each_image():
    even, collapsed, unsure = one_hot(0, 1, 0, 1), one_hot(0, 0, 0, 0), torch.full((4, 2), 0.5)
    assert batch_entropy(even, even, even, OPEN).item() == pytest.approx(0.0, abs=1e-6)
    assert batch_entropy(even, unsure, even, OPEN).item() == pytest.approx(0.0, abs=1e-6)
    assert batch_entropy(even, collapsed, even, OPEN).item() == pytest.approx(math.log(2))
    assert instance_entropy(even, even, even, OPEN).item() == 0.0
    assert instance_entropy(even, unsure, even, OPEN).item() == pytest.approx(math.log(2))
    assert entropy(torch.tensor([0.25, 0.75, 0.0])).item() == pytest.approx(0.5623351446188083)


def test_images_without_an_allowed_expert_do_not_count():
    logits = torch.randn(4, 2)
    allowed = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    for name, loss in LOSSES.items():
        probabilities = masked_softmax(logits, allowed)
        weights = (probabilities > 0.5).float()
        part = loss(logits[:2], probabilities[:2], weights[:2], allowed[:2])
        torch.testing.assert_close(loss(logits, probabilities, weights, allowed), part, msg=name)


def test_losses_are_weighted_named_and_computed_in_training_only():
    losses = {"load_balance": 0.5, "z_loss": 2.0, "batch_entropy": 1.0, "instance_entropy": 1.0}
    router = gate(losses=losses)
    single = {name: gate(losses={name: 1.0}) for name in losses}
    summary, text = torch.randn(6, 6), torch.randn(6, 8)
    got = router.train()(summary, text).losses
    assert set(got) == set(losses)
    for name, factor in losses.items():
        torch.testing.assert_close(got[name], factor * single[name].train()(summary, text).losses[name])
    assert router.eval()(summary, text).losses == {}


def test_the_entropies_train_a_collapsed_gate_to_use_all_experts_with_certainty():
    router = gate(experts=2, losses={"batch_entropy": 1.0, "instance_entropy": 0.2}, inputs="image").train()
    with torch.no_grad():
        router.mlp[-1].bias.copy_(torch.tensor([3.0, -3.0]))
    summary = torch.cat([torch.randn(16, 6) + 2 * torch.eye(6)[0], torch.randn(16, 6) - 2 * torch.eye(6)[0]])
    assert (router(summary).weights[:, 0] > 0).all()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        sum(router(summary).losses.values()).backward()
        optimizer.step()
    routing = router.eval()(summary)
    used = (routing.weights > 0).float().mean(0)
    assert used.min() > 0.3, f"collapsed: {used.tolist()}"
    assert routing.logits.softmax(-1).max(-1).values.mean() > 0.9


def test_supervised_loss_takes_classes_multi_hot_and_soft_targets_and_leaves_out_rows_without_one():
    logits = torch.randn(3, 2)
    router = gate(experts=2)
    routing = Routing(("e0", "e1"), torch.zeros(3, 2), logits=logits)
    want = torch.nn.functional.cross_entropy(logits[:2], torch.tensor([1, 0]))
    torch.testing.assert_close(router.supervised_loss(routing, torch.tensor([1, 0, -100])), want)
    multi_hot = torch.tensor([[0, 1], [1, 0], [0, 0]])
    torch.testing.assert_close(router.supervised_loss(routing, multi_hot), want)
    soft = torch.tensor([[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(router.supervised_loss(routing, soft), -logits[0].log_softmax(-1).mean())
    nothing = routing_loss(logits.requires_grad_(), torch.zeros(3, 2))
    assert nothing.item() == 0.0 and nothing.requires_grad
    with pytest.raises(AlignmentError, match=r"\(3, 3\), expected \(3, 2\)"):
        router.supervised_loss(routing, torch.zeros(3, 3))
    with pytest.raises(AlignmentError, match="not made by a gate"):
        router.supervised_loss(Routing(("e0", "e1"), torch.zeros(3, 2)), multi_hot)
