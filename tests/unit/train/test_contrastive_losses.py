"""Do the contrastive losses equal the published ones, on one process and on several?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mllm import distributed
from mllm.train.stages.contrastive import losses as contrastive_losses
from mllm.train.stages.contrastive.losses import contrastive_loss, order_texts, ranking_loss
from tests.golden.fill import check, load

GOLDEN = Path(__file__).parents[2] / "golden"


def _case(name: str):
    meta, inputs, outputs = load(GOLDEN / f"{name}.json")
    return meta, {k.removeprefix("input."): torch.from_numpy(v) for k, v in inputs.items()}, outputs


def _check(meta, outputs, **found: torch.Tensor) -> None:
    check(meta, outputs, {f"output.{name}": value.detach().numpy() for name, value in found.items()})


def _features(count: int, texts: int, width: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(count, width, generator=generator), dim=-1)
    return images, F.normalize(torch.randn(count, texts, width, generator=generator), dim=-1)


def _as_blocks(texts: torch.Tensor) -> torch.Tensor:
    """The reference's ``[captions; negatives]`` → ours, ``(B, 1 + K, D)``."""
    return texts.unflatten(0, (2, -1)).movedim(0, 1)


def test_one_hard_negative_equals_the_reference_in_loss_and_gradients():
    meta, inputs, outputs = _case("negclip_loss")
    images, texts = inputs["image"].requires_grad_(), inputs["text"].requires_grad_()
    loss = contrastive_loss(images, _as_blocks(texts), inputs["logit_scale"][0]) / len(images)
    loss.backward()
    _check(meta, outputs, loss=loss.reshape(1), grad_image=images.grad, grad_text=texts.grad)


def test_texts_of_several_processes_are_ordered_as_the_reference_orders_them(monkeypatch):
    meta, inputs, outputs = _case("negclip_gather_order")
    image, text = inputs["image"], inputs["text"]
    blocks = torch.stack([_as_blocks(block) for block in text])
    scale, losses = inputs["logit_scale"][0], []
    for rank in range(len(image)):  # what each process computes when the collective hands it these
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(contrastive_losses, "gather", lambda t: image if t.dim() == 2 else blocks)
        losses.append(contrastive_loss(image[rank], blocks[rank], scale))
    total = torch.stack(losses).sum().reshape(1) / image.shape[0] / image.shape[1]
    _check(meta, outputs, all_text=order_texts(blocks), all_image=image.flatten(0, 1), loss=total)
    wrong = text.flatten(0, 1)
    assert not torch.equal(order_texts(blocks), wrong)


def test_without_negatives_it_is_clips_loss_and_an_absent_negative_counts_nothing():
    images, texts = _features(5, 3)
    scale = torch.tensor(7.0)
    logits = scale * images @ texts[:, 0].T
    wanted = 0.5 * (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5)))
    assert contrastive_loss(images, texts[:, :1], scale) / 5 == pytest.approx(wanted.item(), rel=1e-6)
    none = torch.tensor([[True, False, False]] * 5)
    for kind in ("infonce", "sigmoid"):
        masked = contrastive_loss(images, texts, scale, present=none, kind=kind)
        assert masked.item() == pytest.approx(contrastive_loss(images, texts[:, :1], scale, kind=kind).item(), rel=1e-6)
    assert contrastive_loss(images, texts, scale) > contrastive_loss(images, texts[:, :1], scale)


def test_sigmoid_loss_is_that_of_siglip_in_transformers():
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {
        **small,
        "vocab_size": 20,
        "max_position_embeddings": 6,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4})
    ).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.3), model.logit_bias.fill_(-2.0)
        output = model(torch.randint(0, 20, (4, 6)), torch.randn(4, 3, 8, 8), return_loss=True)
    ours = contrastive_loss(
        output.image_embeds,
        output.text_embeds[:, None],
        torch.tensor(1.3).exp(),
        bias=torch.tensor(-2.0),
        kind="sigmoid",
    )
    assert ours.item() / 4 == pytest.approx(output.loss.item(), rel=1e-5)


def test_ranking_learns_the_teachers_order_and_nothing_else():
    images, texts = _features(4, 4, seed=1)
    scale = torch.tensor(5.0)
    teacher = torch.tensor([[0.9, 0.5, 0.1], [0.1, 0.9, 0.5], [0.5, 0.5, 0.5], [0.7, float("nan"), 0.2]])
    loss = ranking_loss(images, texts, scale, teacher)
    assert torch.equal(loss, ranking_loss(images, texts, scale, teacher.exp() * 3)), "scores count by their order alone"

    def term(image: int, anchor: int, below: list[int]) -> float:
        own = scale * texts[image, 1:] @ images[image]
        others = scale * texts[:, 0] @ images[image]
        rest = [own[k] for k in below] + [others[k] for k in range(4) if k != image]
        return (torch.stack([own[anchor], *rest]).logsumexp(0) - own[anchor]).item()

    wanted = (term(0, 0, [1, 2]) + term(0, 1, [2])) / 2 + (term(1, 1, [0, 2]) + term(1, 2, [0])) / 2 + term(3, 0, [2])
    assert loss.item() == pytest.approx(wanted, rel=1e-5)  # image 2 has ties only
    floored = term(0, 0, [1, 2]) + term(1, 1, [0, 2]) + term(3, 0, [2])
    assert ranking_loss(images, texts, scale, teacher, floor=0.6).item() == pytest.approx(floored, rel=1e-5)
    free = texts.clone().requires_grad_()
    optimizer = torch.optim.SGD([free], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        ranking_loss(images, F.normalize(free, dim=-1), scale, teacher).backward()
        optimizer.step()
    similarity = torch.einsum("bd,bkd->bk", images, F.normalize(free.detach(), dim=-1)[:, 1:])
    assert similarity[0].argsort(descending=True).tolist() == [0, 1, 2]
    assert similarity[1].argsort(descending=True).tolist() == [1, 2, 0]
