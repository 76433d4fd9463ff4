"""Is the chunked loss the plain loss, value and gradients, in every variant?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mllm.models.loss import linear_cross_entropy, shift_labels


def _case(dtype: torch.dtype = torch.float32, rows: int = 3, length: int = 17, width: int = 24, vocab: int = 101):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, length, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 0.3).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    return hidden, weight, bias, labels


def _plain(hidden, weight, bias, labels, scale=1.0, softcap=None, items=None):
    logits = F.linear(hidden, weight, bias).float() * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    target = shift_labels(labels).reshape(-1)
    total = F.cross_entropy(logits.view(-1, logits.shape[-1]), target, ignore_index=-100, reduction="sum")
    return total / (int((target != -100).sum()) if items is None else items)


@pytest.mark.parametrize(
    "settings", [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}, {"num_items_in_batch": 7}]
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_the_chunked_loss_and_its_gradients_equal_the_plain_ones_in_fp32(settings, with_bias, chunk):
    hidden, weight, bias, labels = _case()
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    plain = dict(settings)
    items = plain.pop("num_items_in_batch", None)
    expected = _plain(hidden, weight, bias if with_bias else None, labels, items=items, **plain)
    expected_grads = torch.autograd.grad(expected * 1.7, inputs)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias if with_bias else None, chunk_size=chunk, **settings)
    assert abs(loss.item() - expected.item()) < 1e-5
    for grad, wanted in zip(torch.autograd.grad(loss * 1.7, inputs), expected_grads):
        assert (grad - wanted).abs().max() < 1e-5


def test_bf16_loss_stays_within_two_thousandths_of_the_plain_bf16_loss():
    hidden, weight, _, labels = _case(torch.bfloat16, rows=4, length=64, width=64, vocab=500)
    expected = _plain(hidden, weight, None, labels)
    expected_grads = torch.autograd.grad(expected, [hidden, weight])
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size=16)
    assert abs(loss.item() - expected.item()) < 2e-3
    for grad, wanted in zip(torch.autograd.grad(loss, [hidden, weight]), expected_grads):
        assert grad.dtype == torch.bfloat16
        assert F.cosine_similarity(grad.float().flatten(), wanted.float().flatten(), dim=0) > 0.999


def test_a_tied_weight_gets_the_gradient_of_both_uses():
    _, weight, _, labels = _case()
    ids = labels.clamp(min=0)
    expected = torch.autograd.grad(_plain(F.embedding(ids, weight), weight, None, labels), weight)[0]
    got = torch.autograd.grad(linear_cross_entropy(F.embedding(ids, weight), weight, labels, chunk_size=5), weight)[0]
    assert (got - expected).abs().max() < 1e-6


def test_without_supervised_positions_the_loss_is_zero_and_every_input_still_gets_a_gradient():
    hidden, weight, bias, labels = _case()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias=bias, num_items_in_batch=5)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, [hidden, weight, bias]):
        assert grad.abs().max() == 0


def test_a_packed_sample_never_predicts_the_first_token_of_the_next_one():
    labels = torch.tensor([[10, 11, 12, 20, 21]])
    position_ids = torch.tensor([[0, 1, 2, 0, 1]])
    assert shift_labels(labels, position_ids).tolist() == [[11, 12, -100, 21, -100]]
    assert shift_labels(labels).tolist() == [[11, 12, 20, 21, -100]]


def test_no_buffer_of_all_logits_is_ever_allocated():
    hidden, weight, _, labels = _case(rows=8, length=64, width=16, vocab=2000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk_size=32).backward()
    assert largest <= 32 * 2000 + 1, largest
