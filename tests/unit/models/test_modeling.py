"""Is the model a good Hugging Face citizen, and equal to what it is made of?"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import mllm.models
from mllm.errors import AlignmentError, CheckpointError, ConfigError
from mllm.models.configuration_mllm import MllmConfig, language_model_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.models.text_check import check_inside
from mllm.models.text_part import decoder_of
from mllm.types import IMAGE_MARK, Turn
from tests.helpers import picture, tiny_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
KV = {**SMALL, "num_key_value_heads": 1}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": KV,
    "llama tied": {**KV, "tie_word_embeddings": True, "model_type": "llama"},
    "mistral": KV,
    "qwen2": {**KV, "tie_word_embeddings": True},
    "qwen3": {**KV, "head_dim": 16},
    "gemma": {**KV, "head_dim": 16},
    "gemma2": {**KV, "head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "gemma3_text": {**KV, "head_dim": 16, "sliding_window": 8},
    "phi": {**SMALL},
    "phi3": {**KV, "pad_token_id": 0},
    "smollm3": {**KV, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {**KV, "logits_scaling": 4.0},
    "cohere": {**KV, "logit_scale": 0.25},
    "olmo2": KV,
    "falcon_h1": {**KV, **MAMBA, "lm_head_multiplier": 3.0},
    "hyperclovax": {**KV, "logits_scaling": 4.0},
    "minicpm3": {**SMALL, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "llama4_text": {**KV, "head_dim": 16, "num_local_experts": 2},
}


def small_config(name: str) -> Any:
    return language_model_config({"model_type": name, **FAMILIES[name]})


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_text_logits_equal_the_language_model_alone(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    text = small_config(name)
    causal = AutoModelForCausalLM.from_config(text).eval()
    model = MllmForConditionalGeneration(MllmConfig(text_config=text, lm_head_bias=check_inside(text))).eval()
    model.model.language_model.load_state_dict(decoder_of(causal).state_dict())
    model.lm_head.load_state_dict(causal.get_output_embeddings().state_dict())
    model.tie_weights()
    ids = torch.randint(3, 90, (2, 12))
    with torch.no_grad():
        expected, got = causal(ids).logits, model(ids).logits
        loss = model(ids, labels=ids).loss
        chunked = model(ids, labels=ids, skip_logits=True).loss
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(chunked, loss, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = MllmForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("modernbert-decoder", {"pad_token_id": 0}, "does more between its last layer and its logits"),
        ("mpt", {"logit_scale": 0.5}, "does more between its last layer and its logits"),
        ("mamba", {}, "takes no past_key_values"),
        ("pegasus", {}, "takes no inputs_embeds and no past_key_values"),
    ],
)
def test_a_language_model_that_would_not_give_its_own_logits_is_refused(
    name: str, more: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.language_model: {name} {told}"):
        check_inside(language_model_config({"model_type": name, **SMALL, **more}))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return tiny_model(tmp_path_factory.mktemp("tokenizer"))


def prompts(processor: Any) -> tuple[list[str], list[list[Any]]]:
    user = [
        f"{IMAGE_MARK}\nwhat?",
        "no picture at all, a longer question",
        f"{IMAGE_MARK} and {IMAGE_MARK} differ how?",
    ]
    from mllm.processing.chat import render_prompt

    texts = [render_prompt(processor, [Turn("user", content)]) for content in user]
    return texts, [[picture(1)], [], [picture(2, size=(9, 50)), picture(3)]]


def run(model: Any, processor: Any, texts: list[str], images: list[list[Any]], **options: Any) -> list[list[int]]:
    inputs = processor(
        text=texts, images=images, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
    )
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)[:, length:].tolist()


def test_each_encoder_moves_the_logits(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    texts, images = prompts(processor)
    inputs = processor(text=texts[:1], images=images[:1], return_tensors="pt")
    with torch.no_grad():
        base = model(**inputs).logits
        for key in processor.pixel_keys.values():
            changed = dict(inputs)
            changed[key] = -inputs[key]
            assert (model(**changed).logits - base).abs().max() > 1e-3, key


def test_batches_with_left_padding_answer_like_single_prompts(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    texts, images = prompts(processor)
    together = run(model, processor, texts, images)
    alone = [run(model, processor, [t], [i])[0] for t, i in zip(texts, images)]
    assert together == alone
    assert len({tuple(row) for row in alone}) == 3


def test_the_cache_changes_nothing(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    texts, images = prompts(processor)
    assert run(model, processor, texts, images) == run(model, processor, texts, images, use_cache=False)


def test_beams_keep_each_samples_images_together(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    texts, images = prompts(processor)
    together = run(model, processor, texts, images, num_beams=3)
    alone = [run(model, processor, [t], [i], num_beams=3)[0] for t, i in zip(texts, images)]
    assert together == alone


def test_sampling_with_several_return_sequences_runs(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    texts, images = prompts(processor)
    torch.manual_seed(0)
    assert len(run(model, processor, texts, images, do_sample=True, num_return_sequences=2)) == 6


def test_saved_and_opened_by_the_auto_classes_it_is_the_same_model(tiny: tuple[Any, Any], tmp_path: Any) -> None:
    model, processor = tiny
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MllmForConditionalGeneration and type(reader).__name__ == "MllmProcessor"
    texts, images = prompts(processor)
    assert prompts(reader)[0] == texts
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=0, rtol=0)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), again.named_buffers()):
        torch.testing.assert_close(theirs, ours, atol=0, rtol=0, msg=f"buffer {name}")
    assert run(again.eval(), reader, texts, images) == run(model, processor, texts, images)
    bf16 = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert next(bf16.parameters()).dtype == torch.bfloat16
    (tmp_path / sorted(p.name for p in tmp_path.glob("model-*.safetensors"))[0]).unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        MllmForConditionalGeneration.from_pretrained(tmp_path)


def test_a_checkpoint_cut_in_half_or_with_a_gap_is_refused(tiny: tuple[Any, Any], tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = tiny
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"its header needs .* cut short"):
        MllmForConditionalGeneration.from_pretrained(tmp_path)
    name = next(k for k in tensors if "multi_modal_projector" in k)
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 weights are missing .*{name.split('.')[-2]}"):
        MllmForConditionalGeneration.from_pretrained(tmp_path)


def test_wrong_counts_are_refused_with_both_numbers(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    inputs = processor(text="<image> a", images=picture(), return_tensors="pt")
    with pytest.raises(AlignmentError, match="17 image placeholder tokens for 16 visual tokens"):
        ids = torch.cat([inputs["input_ids"], torch.tensor([[processor.image_token_id]])], dim=1)
        model(**{**inputs, "input_ids": ids, "attention_mask": None})
    with pytest.raises(AlignmentError, match="no image was given"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(AlignmentError, match="different numbers of images"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})


def test_gradient_checkpointing_and_text_only_batches_reach_every_learning_parameter(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    inputs = processor(text="<image> abc", images=picture(), return_tensors="pt")

    def gradients(**batch: Any) -> dict[str, Any]:
        model.zero_grad()
        model.train()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain = {n: None if g is None else g.clone() for n, g in gradients(**inputs).items()}
    model.gradient_checkpointing_enable()
    try:
        for name, gradient in gradients(**inputs).items():
            assert (gradient is None) == (plain[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4)
    finally:
        model.gradient_checkpointing_disable()
    text = processor(text="abc def", return_tensors="pt")
    idle = gradients(**text)
    model.eval()
    for name, gradient in plain.items():
        if gradient is not None:
            assert idle[name] is not None, f"{name} has no gradient on a text-only batch"
            if "vision_tower" in name or "multi_modal_projector" in name:
                assert idle[name].abs().max() == 0


def test_every_parameter_belongs_to_exactly_one_part(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    parts = {model.part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"language_model", "connector", "encoders.semantic", "encoders.detail"}
    assert set(model.named_parts()) == parts
    covered = {p for modules in model.named_parts().values() for _, m in modules for p in m.parameters()}
    assert covered == set(model.parameters())


def test_lora_on_language_model_and_encoder_merges_to_the_same_logits(tiny: tuple[Any, Any], tmp_path: Any) -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    model, processor = tiny
    inputs = processor(text="<image> abc", images=picture(), return_tensors="pt")
    torch.manual_seed(1)
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(
            r=4,
            target_modules=r".*(language_model.*(q_proj|up_proj)|encoders\.semantic.*q_proj)",
            init_lora_weights=False,
        ),
    ).eval()
    with torch.no_grad():
        before = adapted(**inputs).logits
        assert (before - model(**inputs).logits).abs().max() > 1e-3
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, before, atol=1e-5, rtol=1e-5)


def test_the_plain_trainer_trains_it(tiny: tuple[Any, Any], tmp_path: Any) -> None:
    import copy

    from transformers import Trainer, TrainingArguments

    model, processor = tiny
    rows = []
    for seed in range(4):
        row = processor(text="<image> abc", images=picture(seed), return_tensors="pt")
        rows.append({k: v if k.startswith("pixel") else v[0] for k, v in row.items()} | {"labels": row["input_ids"][0]})

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: (torch.cat if k.startswith("pixel") else torch.stack)([s[k] for s in samples]) for k in samples[0]}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, learning_rate=1e-2,
        save_strategy="no", remove_unused_columns=False, logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_config_json_is_self_sufficient(tiny: tuple[Any, Any], tmp_path: Any) -> None:
    model, _ = tiny
    model.config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["encoders"]["semantic"]["info"]["grid"] == [4, 4]
    config = MllmConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        built = MllmForConditionalGeneration(config)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert config.layout().num_tokens == 16 and mllm.models is not None


def test_embeddings_of_added_tokens_start_as_small_as_the_language_models_own(tmp_path):
    """In a vocabulary that grows for placeholders or visual codes; torch's own start is 50 times larger."""
    from mllm.models.build import build_model
    from tests.helpers import TINY_LLM, tiny_spec, tiny_tokenizer

    for tied in (False, True):
        small = {**TINY_LLM, "vocab_size": 200, "tie_word_embeddings": tied}
        tiny_tokenizer().save_pretrained(str(tmp_path))
        spec = tiny_spec(str(tmp_path), language_model={"config": small, "tokenizer": str(tmp_path)})
        model, _ = build_model(spec)
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            assert len(table) > 200
            assert 0.01 < float(table[200:].std()) < 0.04


@torch.no_grad()
def test_embeddings_are_asked_like_their_tokens(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    texts, images = prompts(processor)
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=False)
    pixels = {key: inputs[key] for key in processor.pixel_keys.values()}
    given = {"attention_mask": inputs["attention_mask"], **pixels, "max_new_tokens": 6, "do_sample": False}
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        wanted = model.generate(inputs["input_ids"], **given, **options)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(model.generate(inputs_embeds=embeddings, **given, **options), wanted)


@torch.no_grad()
def test_a_token_that_is_added_by_hand_can_be_written(tmp_path: Any) -> None:
    """Rows that only fill the tables up still cannot."""
    model, processor = tiny_model(tmp_path)
    processor.tokenizer.add_tokens(["<yes>"])
    new = processor.tokenizer.convert_tokens_to_ids("<yes>")
    model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
    rows = model.lm_head.weight.shape[0]
    assert rows % 64 == 0 and model.config.unassigned_ids == range(new + 1, rows)
    model.lm_head.weight[new:].mul_(50.0)
    seen = {token for row in run(model, processor, *prompts(processor), num_beams=4) for token in row}
    assert max(seen) == new
    model.save_pretrained(tmp_path / "saved")
    assert MllmConfig.from_pretrained(tmp_path / "saved").num_token_ids == new + 1


def test_a_frozen_batch_norm_keeps_its_statistics_under_any_trainer(tiny: tuple[Any, Any]) -> None:
    """An adapter holds no statistics: what they became in training would be missing where it is opened."""
    model, _ = tiny
    frozen, learning, bare = (torch.nn.BatchNorm2d(4, affine=affine) for affine in (True, True, False))
    frozen.requires_grad_(False)
    model.added = torch.nn.Sequential(frozen, learning, bare)
    try:
        model.train()
        assert [module.training for module in model.added] == [False, True, True] and model.training
    finally:
        del model.added
        model.eval()
