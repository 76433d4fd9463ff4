"""Do states that are nearly the same in every answer still teach a head, and is one normalised alike alone and among others?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mllm.heads.base import HeadParts
from mllm.heads.build import head_config
from mllm.heads.running_norm import RunningNorm
from mllm.heads.segmentation.head import SegmentationHead
from mllm.heads.segmentation.losses import mask_bce, mask_dice
from mllm.types import EncoderInfo, ImageSpec, VisionFeatures

KINDS, WIDTH, PICTURES = 4, 32, 16


def scenes(looks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of four kinds of cells: features ``(B, 16, 24)``, the kind that is asked for ``(B,)``, its mask ``(B, 16, 16)``."""
    kinds = torch.randint(KINDS, (PICTURES, 16), generator=generator)
    asked = torch.randint(KINDS, (PICTURES,), generator=generator)
    masks = (kinds == asked[:, None]).view(-1, 1, 4, 4).float()
    return looks[kinds], asked, nn.functional.interpolate(masks, (16, 16))[:, 0].to(torch.uint8)


def learn(norm: str, steps: int) -> float:
    """IoU of a head on new pictures, whose states are alike to 98 % of their size's square."""
    torch.manual_seed(0)
    info = EncoderInfo(image=ImageSpec(height=16, width=16), grid=(4, 4), width=24)
    settings = {"type": "segmentation", "encoder": "eye", "norm": norm}
    decoder = {"type": "query", "width": 32, "depth": 1, "heads": 2}
    head = SegmentationHead(head_config({**settings, "decoder": decoder}), HeadParts(WIDTH, {"eye": info}))
    generator = torch.Generator().manual_seed(1)
    looks = torch.randn(KINDS, 24, generator=generator)
    phrases, shared = torch.randn(KINDS, WIDTH, generator=generator), 7 * torch.randn(WIDTH, generator=generator)
    optimizer, rows = torch.optim.AdamW(head.parameters(), 2e-3), torch.arange(PICTURES)
    places = torch.stack([rows, torch.zeros_like(rows)], 1)

    def marked() -> tuple[Tensor, Tensor]:
        features, asked, masks = scenes(looks, generator)
        states = shared + phrases[asked]
        states = (states / states.square().mean(-1, keepdim=True).sqrt())[:, None]
        return head.predict(states, places, rows, VisionFeatures(features, (4, 4)))[0], masks

    for _ in range(steps):
        logits, masks = marked()
        (2 * mask_bce(logits, masks).mean() + 0.5 * mask_dice(logits, masks).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    head.eval()
    with torch.no_grad():
        logits, masks = marked()
    return float(((logits > 0) & (masks == 1)).sum() / ((logits > 0) | (masks == 1)).sum())


def test_a_head_learns_what_its_states_differ_in_and_not_what_they_share() -> None:
    with_norm, without = learn("running", 80), learn("none", 80)
    assert with_norm > 0.9
    assert without < 0.6  # where the difference is lost, this test says nothing


def test_answers_depend_on_the_checkpoint_alone() -> None:
    torch.manual_seed(0)
    norm, states = RunningNorm(8), 5 + 3 * torch.randn(400, 8)
    for part in states.split(10):
        norm(part)
    norm.eval()
    found = norm(states)
    assert found.mean().abs() < 0.2 and abs(float(found.std()) - 1) < 0.2
    torch.testing.assert_close(norm(states[3:4]), found[3:4])
    again = RunningNorm(8).eval()
    again.load_state_dict(norm.state_dict())
    assert torch.equal(again(states), found)


def test_a_shared_part_that_moves_is_taken_out_of_each_batch() -> None:
    torch.manual_seed(0)
    norm, differences = RunningNorm(8), torch.randn(64, 8)
    for step in range(20):
        found = norm(3.0 * step + 0.1 * differences)
    assert torch.corrcoef(torch.stack([found.flatten(), differences.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_with_one_mask_or_none_trains(count: int) -> None:
    norm = RunningNorm(4)
    states = torch.ones(count, 4, dtype=torch.bfloat16, requires_grad=True)
    found = norm(states)
    found.sum().backward()
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and int(norm.batches) == count
    assert norm.mean.dtype == torch.float32  # half precision would lose a twentieth of a small change
