"""Do visual tokens learn the words of their own picture, and nothing from words that every picture has?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mllm.errors import AlignmentError, ConfigError
from mllm.recipe import StageSpec
from mllm.train.robust import Robust, RobustOptions
from mllm.train.stages.sft import check_sft
from mllm.train.word_contrast import SHARPNESS, WordContrast, word_contrast
from tests.helpers import tiny_model


def _by_hand(tokens, words, table):
    """The definition, word by word."""
    rows = [k for k, own in enumerate(tokens) if len(own)]
    sets = {k: set(words[k].tolist()) for k in rows}

    def found(row, word):
        return (
            torch.stack([SHARPNESS * torch.cosine_similarity(t, table[word], dim=0) for t in tokens[row]]).exp().sum()
        )

    losses = []
    for row in rows:
        for word in sets[row]:
            others = [found(k, word) for k in rows if word not in sets[k]]
            if others:
                losses.append(-(found(row, word) / (found(row, word) + sum(others))).log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("counts", [(3, 0, 4, 3), (3, 0, 3, 3)])  # rows of unlike and of like numbers of visual tokens
def test_it_is_what_it_says_word_by_word(counts):
    torch.manual_seed(0)
    table = torch.randn(12, 8)
    tokens = [torch.randn(count, 8, requires_grad=True) for count in counts]
    words = [
        torch.tensor(w) for w in ([1, 2, 2, 5], [3, 4], [2, 7, 5], [2, 8])
    ]  # 2 is everywhere, row 1 has no picture
    loss = word_contrast(tokens, words, table)
    torch.testing.assert_close(loss, _by_hand(tokens, words, table), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert float(tokens[0].grad.abs().sum()) > 0


def test_more_rows_send_no_more_kernels():
    """Row by row, a batch of 64 sent thousands of them, and waited for the GPU twice a row."""

    def operations(rows: int) -> int:
        tokens = torch.randn(rows, 3, 8, requires_grad=True)
        words = [torch.tensor([1, 2 + row]) for row in range(rows)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            word_contrast(list(tokens.unbind()), words, torch.randn(40, 8)).backward()
        return sum(event.count for event in profile.key_averages())

    assert operations(32) < 2 * operations(4)  # what is left are views


@pytest.mark.parametrize("words", [[[1, 2], [2, 1]], [[], []]])
def test_no_prior_lowers_it(words):
    """Words of every row, or none, give nothing to learn: zero, with a gradient of zeros."""
    tokens = [torch.randn(3, 8, requires_grad=True) for _ in words]
    loss = word_contrast(tokens, [torch.tensor(w, dtype=torch.long) for w in words], torch.randn(12, 8))
    loss.backward()
    assert float(loss.detach()) == 0 and not any(float(own.grad.abs().sum()) for own in tokens)


def test_a_projector_learns_to_say_what_its_pictures_show():
    """Pictures made of words' codes at random places: after some steps the words of pictures never seen are found in them."""
    torch.manual_seed(0)
    table, codes = torch.randn(40, 16), torch.randn(40, 32)
    projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))
    optimizer = torch.optim.Adam(projector.parameters(), lr=3e-3)

    def batch():
        words = [torch.randperm(40)[:4] for _ in range(16)]
        pictures = torch.randn(16, 12, 32) * 0.1
        for row, own in enumerate(words):
            pictures[row, torch.randperm(12)[:4]] += codes[own]
        return word_contrast(list(projector(pictures)), words, table)

    start = float(batch().detach())
    for _ in range(150):
        optimizer.zero_grad()
        batch().backward()
        optimizer.step()
    with torch.no_grad():
        assert float(batch()) < 0.3 * start


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"packing": True, "batch_size": 4}, "word_contrast: compares the rows of a batch"),
        ({"batch_size": 1}, "word_contrast: compares the rows of a batch"),
        ({"batch_size": 2, "engine": "zero3"}, "would wait forever; use none, sharded, fsdp2, zero1 or zero2"),
        ({"batch_size": 2, "options": {"words_alone": True}}, "words_alone: needs word_contrast"),
        (
            {
                "batch_size": 2,
                "learn": {"connector": 1e-3, "language_model": 1e-4},
                "options": {"word_contrast": 1.0, "words_alone": True},
            },
            "words_alone: language_model is not run",
        ),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(changes, told):
    """Under ZeRO-3 two ranks, one of them without pictures, did wait at the fifth step."""
    stage = {"name": "read", "learn": {"connector": 1e-3}, "data": "x", "steps": 1, "options": {"word_contrast": 1.0}}
    with pytest.raises(ConfigError, match=told):
        check_sft(StageSpec.model_validate({**stage, **changes}))


def test_it_is_added_to_the_loss_of_a_model_that_learns(tmp_path):
    model, _ = tiny_model(tmp_path)
    torch.manual_seed(0)
    keys = Robust(RobustOptions(), model).keys  # encoder → argument of its pixels
    infos = model.model.vision_tower.infos
    pixels = {keys[name]: torch.randn(2, 3, info.image.height, info.image.width) for name, info in infos.items()}
    places = [model.config.image_token_id] * model.config.layout((28, 28)).num_tokens
    ids = torch.tensor([[5, *places, 6, 7, 8], [5, *places, 6, 9, 8]])
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    inputs = {"input_ids": ids, "labels": labels, **pixels}
    plain = model.train()(**inputs).loss
    handle = WordContrast(0.5, {8}).attach(model)
    output = model(**inputs)
    seen = output.image_hidden_states.flatten(0, -2).chunk(2)
    alone = word_contrast(list(seen), [row[[0, -3, -2]] for row in ids], model.get_input_embeddings().weight)
    torch.testing.assert_close(output.loss, plain + 0.5 * alone)
    torch.testing.assert_close(output.losses["word_contrast"], alone.detach())
    halved = model(**inputs, num_items_in_batch=2 * (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(halved.loss, output.loss / 2, msg="it counts as this call's share of the step")
    output.loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    tiled = replace(
        output, loss=plain, image_hidden_states=tuple(output.image_hidden_states)
    )  # picture by picture, as tiles give them
    torch.testing.assert_close(WordContrast(0.5, {8})._add(model, (), inputs, tiled).loss, plain + 0.5 * alone)
    fewer = replace(output, image_hidden_states=output.image_hidden_states[1:])
    with pytest.raises(AlignmentError, match=r"visual tokens for .* places in the text"):
        WordContrast(0.5, {8})._add(model, (), inputs, fewer)
    handle.remove()
    only = WordContrast(0.5, {8}).attach_alone(model)
    model.zero_grad()
    bare = model(**inputs)
    torch.testing.assert_close(bare.loss, 0.5 * alone, msg="the same loss, without the language model's pass")
    torch.testing.assert_close(
        model(**inputs, num_items_in_batch=2 * (labels[:, 1:] != -100).sum()).loss, bare.loss / 2
    )
    bare.loss.backward()
    assert bare.logits is None and all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    assert all(p.grad is None for p in model.model.language_model.parameters())
    text = {"input_ids": ids[:, -3:], "labels": labels[:, -3:]}
    nothing = model(**text).loss
    nothing.backward()
    assert float(nothing.detach()) == 0
    only.remove()
    torch.testing.assert_close(model(**inputs).loss, plain)
    handle = WordContrast(0.5, {8}).attach(model)
    model.eval()
    quiet = model(**inputs)
    assert quiet.losses is None
    handle.remove()
