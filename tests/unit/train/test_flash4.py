"""Is the package's kernel called as it is written, for packed rows and dense ones, under the torch that is here?"""

from __future__ import annotations

import types
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mllm.errors import UnavailableError
from mllm.train import flash4
from mllm.varlen import segment_attention


def _reference(q, k, v, *, scale, causal, ends, left):
    """Attention within each segment of ``(T, heads, d)``, and the logarithm of each row's sum."""
    outputs, sums = [], []
    for a, b in pairwise(ends):
        keys, values = (t[a:b].repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        far = torch.arange(b - a)[:, None] - torch.arange(b - a)
        hidden = (far < 0) & torch.tensor(causal) | (far > (left if left is not None else b))
        scores = scores.masked_fill(hidden, float("-inf"))
        sums.append(scores.logsumexp(-1))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs), torch.cat(sums, 1)


class _Kernels(types.SimpleNamespace):
    """As the package's module: what it is given is kept, and attention done in plain torch. It gives five results forward."""

    def _flash_attn_fwd(self, q, k, v, *, softmax_scale, causal, return_lse, **more):
        assert return_lse
        self.seen.append(("forward", causal, more))
        return *self._run(q, k, v, softmax_scale, causal, more), None, None, None

    def _flash_attn_bwd(self, q, k, v, out, up, lse, *, softmax_scale, causal, deterministic, **more):
        self.seen.append(("backward", causal, more))
        inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]

        def again():
            found, sums = self._run(*inputs, softmax_scale, causal, more)
            torch.testing.assert_close(found, out)
            torch.testing.assert_close(sums, lse)
            return torch.autograd.grad(found, inputs, up)

        with ThreadPoolExecutor(1) as pool:  # below an operation torch records nothing; another thread knows of none
            return pool.submit(again).result()

    def _run(self, q, k, v, scale, causal, more):
        ends = more.get("cu_seqlens_q")
        flat = [q, k, v] if ends is not None else [t.flatten(0, 1) for t in (q, k, v)]
        bounds = ends.tolist() if ends is not None else [n * q.shape[1] for n in range(q.shape[0] + 1)]
        left, right = more.get("window_size_left"), more.get("window_size_right")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, sums = _reference(*flat, scale=scale, causal=causal or right == 0, ends=bounds, left=left)
        if ends is None:
            return out.view_as(q), sums.view(q.shape[2], *q.shape[:2]).transpose(0, 1)
        return out, sums


@pytest.fixture
def kernels():
    """Active for tensors of the CPU, for which torch has no such kernel of its own for packed rows."""
    found = _Kernels(seen=[])
    registered = flash4.register(found, "CPU")
    yield found
    registered.remove()


@pytest.mark.parametrize("window", [None, 4])
def test_packed_rows_go_through_the_packages_kernel_both_ways(kernels, window):
    torch.manual_seed(0)
    ends = [0, 9, 12, 20]
    q, k, v = (torch.randn(20, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    up = torch.randn(20, 4, 8)
    bounds = torch.tensor(ends, dtype=torch.int32)
    output = segment_attention(q, k, v, bounds, 16, causal=True, window=window)
    left = None if window is None else window - 1
    wanted, _ = _reference(q, k, v, scale=8**-0.5, causal=True, ends=ends, left=left)
    torch.testing.assert_close(output, wanted)
    for found, right in zip(torch.autograd.grad(output, (q, k, v), up), torch.autograd.grad(wanted, (q, k, v), up)):
        torch.testing.assert_close(found, right)
    assert [way for way, *_ in kernels.seen] == ["forward", "backward"]
    for _, causal, more in kernels.seen:
        # "No window" is said with None: −1 would be one of its own to the package.
        assert (causal, more["window_size_left"]) == ((True, None) if window is None else (False, 3))
        assert more["max_seqlen_q"] == more["max_seqlen_k"] == 16


def test_dense_rows_are_turned_for_the_package_and_back(kernels):
    torch.manual_seed(0)
    q, k, v, up = (torch.randn(2, 3, 5, 8) for _ in range(4))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(out, wanted.detach())
    empty = torch.zeros((), dtype=torch.uint64)
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        up, q, k, v, out, lse, None, None, 5, 5, 0.0, False, empty, empty
    )
    for mine, right in zip(found, torch.autograd.grad(wanted, inputs, up)):
        torch.testing.assert_close(mine, right)
    assert [more for _, _, more in kernels.seen] == [{}, {}]


def test_what_the_kernel_is_not_called_with_is_refused_by_name(kernels):
    q = torch.randn(4, 1, 8)
    ends = torch.tensor([0, 4], dtype=torch.int32)
    run = torch.ops.aten._flash_attention_forward
    with pytest.raises(UnavailableError, match="not called with alibi_slopes"):
        run(q, q, q, ends, ends, 4, 4, 0.0, True, False, alibi_slopes=torch.zeros(1))
    with pytest.raises(UnavailableError, match="drops no attention scores"):
        run(q, q, q, ends, ends, 4, 4, 0.1, True, False)
    assert not kernels.seen


def test_a_released_kernel_is_called_no_more():
    kernels = _Kernels(seen=[])
    flash4.register(kernels, "CPU").remove()
    q = torch.randn(4, 1, 8)
    with pytest.raises((NotImplementedError, RuntimeError)):
        segment_attention(q, q, q, torch.tensor([0, 4], dtype=torch.int32), 4, causal=True)
    assert not kernels.seen
