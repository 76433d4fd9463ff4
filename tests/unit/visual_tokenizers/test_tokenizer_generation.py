"""Do heads, samplers, next-scale drawing and the image grammar do what the published code does?"""

from __future__ import annotations

import pytest
import torch

from mllm.errors import AlignmentError, ConfigError
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.heads import DepthTransformer, DepthTransformerConfig, GenerationHead
from mllm.visual_tokenizers.next_scale import decode_sum, generate_next_scale, next_scale_inputs, next_scale_mask
from mllm.visual_tokenizers.sampling import (
    filter_logits,
    guide,
    next_scale_guidance,
    sample,
)
from mllm.visual_tokenizers.sequence import ImageGrammar, ImageGrammarProcessor, Level
from tests.unit.visual_tokenizers.test_tokenizer_networks import renamed
from tests.unit.visual_tokenizers.tokenizer_configs import TINY


def test_depth_transformer_is_vilaus(golden):
    case = golden("vilau_depth_transformer")
    head = DepthTransformer(
        DepthTransformerConfig(width=32, layers=2, heads=4), hidden=24, code_dim=8, size=16, depth=3
    ).eval()
    rules = [
        (r"pos_emb_d", "positions"), (r"in_mlp_1", "from_codes"), (r"in_mlp_2", "from_hidden"),
        (r"head_transformer\.", ""), (r"\.ln([12])", r".norm\1"), (r"\.attn\.proj", ".out"), (r"\.attn\.", "."),
        (r"\.mlp\.0", ".up"), (r"\.mlp\.2", ".down"), (r"classifier_mlp\.layer_norm", "norm"),
        (r"classifier_mlp\.linear", "out"),
    ]  # fmt: skip
    head.load_state_dict(renamed(case.weights, rules))
    case.check(logits=head(case.inputs["h"], case.inputs["codebook"][case.inputs["codes"]]))


def test_generation_head_is_janus(golden):
    case = golden("janus_generation_head")
    head = GenerationHead(24, 16, 40)
    head.load_state_dict(renamed(case.weights, [("output_mlp_projector", "inner"), ("vision_head", "out")]))
    case.check(logits=head(case.inputs["h"]))


def test_top_k_top_p_is_tokenflows(golden):
    case = golden("tokenflow_topk_topp")
    logits, ctor = case.inputs["logits"], case.meta["ctor"]
    kept = filter_logits(logits, top_k=ctor["top_k"], top_p=ctor["top_p"])
    case.check(
        keep=kept.isfinite().long(),
        keep_k_only=filter_logits(logits, top_k=ctor["top_k"]).isfinite().long(),
        probs=kept.softmax(-1),
        argmax=sample(logits, top_k=1),
    )


def test_next_scale_inputs_are_tokenflows(golden):
    case = golden("tokenflow_next_scale_input")
    codes, scales = case.inputs["indices"], case.meta["ctor"]["scales"]
    vectors = lambda ids: case.inputs["codebook"][ids]  # noqa: E731
    case.check(
        slots=next_scale_inputs(codes, vectors, scales),
        slots_same_scale_0=next_scale_inputs(codes, vectors, scales, same_scale=0),
        slots_same_scale_last=next_scale_inputs(codes, vectors, scales, same_scale=1),
        decode_sum=decode_sum(codes, vectors, scales),
    )


def test_next_scale_mask_is_tokenflows(golden):
    case = golden("tokenflow_next_scale_mask")
    mask = next_scale_mask(case.inputs["keep"], case.inputs["image_start"], case.meta["ctor"]["scales"])
    case.check(visible=mask.long())
    with pytest.raises(AlignmentError, match="does not fit"):
        next_scale_mask(case.inputs["keep"], torch.tensor([9, 10]), case.meta["ctor"]["scales"])


def illume_grammar(case) -> tuple[ImageGrammar, int]:
    ctor = case.meta["ctor"]
    special = ctor["special"]
    levels = []
    for index in (0, 1):
        first, end = ctor[f"level{index}_range"]
        rows, columns = ctor[f"level{index}_rows"], ctor[f"level{index}_tokens"]
        start = special[f"start_of_level{index}"], special[f"end_of_level{index}"]
        levels.append(Level(f"level{index}", *start, first, end - first, rows, columns))
    names = ("start_of_image", "end_of_image", "end_of_line")
    return ImageGrammar(levels, **{name: special[name] for name in names}), special["end_of_text"]


def test_image_grammar_is_illumes(golden):
    case = golden("illume_image_grammar")
    grammar, end_of_text = illume_grammar(case)
    processor = ImageGrammarProcessor(grammar, end_of_text=end_of_text)
    ids = torch.tensor([[grammar.start_of_image]])
    for logits in case.inputs["logits"]:
        ids = torch.cat([ids, processor(ids, logits[None]).argmax(-1, keepdim=True)], 1)
    case.check(ids=ids[0, 1:])
    image = ids[0, : grammar.length]
    codes = grammar.read(image)[0]
    assert {k: len(v) for k, v in codes.items()} == {"level0": 6, "level1": 12}
    assert torch.equal(grammar.write(codes), image)


def test_image_grammar_holds_for_each_sample_of_a_batch(golden):
    case = golden("illume_image_grammar")
    grammar, end_of_text = illume_grammar(case)
    processor = ImageGrammarProcessor(grammar, end_of_text=end_of_text)
    prompts = torch.tensor([[8, 8, 0], [8, 0, 3], [8, 7, 7]])
    batch = prompts
    torch.manual_seed(0)
    steps = torch.randn(grammar.length + 2, 3, 25)
    for logits in steps:
        batch = torch.cat([batch, processor(batch, logits).argmax(-1, keepdim=True)], 1)
    for row in range(3):
        alone = prompts[row : row + 1]
        for logits in steps:
            alone = torch.cat([alone, processor(alone, logits[row : row + 1]).argmax(-1, keepdim=True)], 1)
        assert torch.equal(alone[0], batch[row])
    assert batch[0, 2 + grammar.length] == end_of_text and batch[1, 1 + grammar.length] == end_of_text
    text = batch[2, 3:]
    first = (text == grammar.start_of_image).nonzero().flatten().tolist()
    outside = text[: first[0]] if first else text
    assert not any(low <= t < high for t in outside.tolist() for low, high in grammar.reserved())


def test_image_grammar_follows_the_size_written_before_the_image():
    def make(rows):
        return ImageGrammar([Level("pixel", 3, 4, 10, 5, rows, 2)], start_of_image=0, end_of_image=1, end_of_line=2)

    processor = ImageGrammarProcessor(make(1), variants={(5, 6): make(2)})
    ids = torch.tensor([[7, 7, 0], [5, 6, 0]])
    logits = torch.zeros(2, 16)
    for _ in range(12):
        ids = torch.cat([ids, processor(ids, logits).argmax(-1, keepdim=True)], 1)
    assert (ids[0] == 2).sum() >= 1 and ids[0, 3:9].tolist() == [3, 10, 10, 2, 4, 1]
    assert ids[1, 3:12].tolist() == [3, 10, 10, 2, 10, 10, 2, 4, 1]


def test_a_sequence_cut_inside_an_image_says_so():
    grammar = ImageGrammar([Level("pixel", 3, 4, 10, 5, 2, 2)], start_of_image=0, end_of_image=1, end_of_line=2)
    whole = grammar.write({"pixel": torch.tensor([0, 1, 2, 3])})
    assert len(whole) == grammar.length
    assert torch.equal(grammar.read(torch.cat([torch.tensor([9]), whole, whole]))[1]["pixel"], torch.arange(4))
    with pytest.raises(AlignmentError, match="cut off after 4 of 9"):
        grammar.read(whole[:5])
    broken = whole.clone()
    broken[4] = 12
    with pytest.raises(AlignmentError, match="position 4: id 12"):
        grammar.read(broken)
    with pytest.raises(ConfigError, match="0 to 4"):
        grammar.write({"pixel": torch.tensor([0, 1, 2, 5])})
    with pytest.raises(AlignmentError, match="2×2"):
        grammar.write({"pixel": torch.tensor([0, 1, 2])})


def test_guidance_is_one_formula():
    c, u = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(guide(c, u, 1.0), c) and torch.equal(guide(c, u, 0.0), u)
    t = 1.5
    assert torch.allclose(guide(c, u, 1 + t), (1 + t) * c - t * u)
    assert [next_scale_guidance(7.5, i, 4) for i in range(4)] == [1.0, 3.5, 6.0, 8.5]


def test_sampling_is_reproducible_and_follows_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -5.0]).expand(4000, 4)
    first, second = (sample(logits, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    share = torch.bincount(first, minlength=4) / 4000
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.03)
    assert sample(logits, temperature=0).unique().tolist() == [0]
    assert set(sample(logits, top_k=2).unique().tolist()) == {0, 1}
    with pytest.raises(ConfigError, match="top_p"):
        sample(logits, top_p=1.5)


def test_depth_generation_equals_step_by_step_argmax_and_is_guided():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TINY["dualtoken"]).eval()
    size, depth = tokenizer.codebooks["pixel"]
    head = DepthTransformer(
        DepthTransformerConfig(width=16, layers=1, heads=2), hidden=12, code_dim=8, size=size, depth=depth
    ).eval()
    hidden = torch.randn(6, 12)
    vectors = lambda ids: tokenizer.code_vectors("pixel", ids)  # noqa: E731
    codes = head.generate(hidden, vectors, temperature=0)
    teacher_forced = head(hidden[:, None], tokenizer.code_vectors("pixel", codes[:, None]))[:, 0].argmax(-1)
    assert torch.equal(codes, teacher_forced)
    both = torch.cat([hidden, torch.randn(6, 12)])
    assert head.generate(both, vectors, guidance=3.0, temperature=0).shape == (6, depth)
    same = torch.cat([hidden, hidden])
    assert torch.equal(head.generate(same, vectors, guidance=3.0, temperature=0), codes)


def test_next_scale_drawing_feeds_the_training_inputs_and_decodes():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TINY["tokenflow"]).eval()
    scales, size = tokenizer.scales, tokenizer.codebooks["shared"][0]
    vectors = lambda ids: tokenizer.code_vectors("shared", ids[..., None])[:, :, 0]  # noqa: E731
    weight = torch.randn(12, size)
    seen = []

    def predict(index, slots, commit):
        seen.append((index, slots, commit))
        logits = torch.zeros(2, 1, size) + torch.arange(size) if slots is None else slots @ weight
        return logits, logits * 0.5

    codes = generate_next_scale(predict, vectors, scales, passes=((0, 0.0), (1, 0.0)), temperature=0)
    assert codes.shape == (2, sum(s * s for s in scales))
    assert [(i, c) for i, _, c in seen] == [(0, True), (1, True), (1, False), (2, True), (2, False)]
    slots = next_scale_inputs(codes, vectors, scales)
    committed = torch.cat([s for i, s, c in seen if c and i], 1)
    assert torch.allclose(slots, committed, atol=1e-5), "drawing must read what training reads"
    whole = VisualCodes({"shared": codes[..., None]}, tokenizer.grid, scales)
    direct = decode_sum(codes, vectors, scales).flatten(2).transpose(1, 2)
    assert torch.allclose(tokenizer.embed(whole)["shared"], direct, atol=1e-5)
    assert tokenizer.decode(whole).shape == (2, 3, 16, 16)
