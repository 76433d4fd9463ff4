"""Do other people's trainers learn words, and words only, from what our processor and model give them?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.helpers import picture

ROWS = [
    {
        "images": [picture(number)] * (1 + number % 2),
        "messages": [
            {"role": "user", "content": "Which digit is it? " + "it " * number},
            {"role": "assistant", "content": f"It is {number}."},
        ],
    }
    for number in range(4)
]
QUIET: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "save_strategy": "no",
    "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-3, "seed": 0, "gradient_checkpointing": False,
}  # fmt: skip


def words_loss(model: Any, batch: Any, placeholder: int) -> float:
    """Mean cross-entropy over real next words, from logits alone."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    targets = targets.masked_fill(targets == placeholder, -100)
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("adapted", [False, True])
def test_trl_learns_no_placeholder_and_its_loss_is_that_of_the_words(cut_model: Any, tmp_path: Any, adapted: bool):
    """TRL 1.16 takes the loss from hidden states, past the model's `forward`: the labels themselves must be right."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    model, processor = cut_model
    collate = DataCollatorForVisionLanguageModeling(processor)
    batch = collate(copy.deepcopy(ROWS))
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 6 * 16
    assert not (batch["labels"] == processor.image_token_id).any()
    assert int((batch["labels"] != -100).sum()) == int(batch["attention_mask"].sum()) - 6 * 16
    adapter = LoraConfig(r=4, target_modules=r".*language_model.*q_proj") if adapted else None
    arguments = SFTConfig(output_dir=str(tmp_path), bf16=False, gradient_accumulation_steps=2, **QUIET)
    trainer = SFTTrainer(
        copy.deepcopy(model), arguments, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=processor,
        peft_config=adapter,
    )  # fmt: skip
    first, second = losses(trainer)  # all four rows a step
    assert abs(first - words_loss(model, batch, processor.image_token_id)) < 2e-3
    assert second < first or adapted


def test_the_plain_trainer_with_the_language_models_collator_learns_no_placeholder(cut_model: Any, tmp_path: Any):
    """`DataCollatorForLanguageModeling` copies the ids, and `Trainer` counts its labels, placeholders among them."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model, processor = cut_model
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = "<|endoftext|>"
    rows = []
    for number in range(4):
        row = processor(text=f"<image> what is it? {number}", images=picture(number), return_tensors="pt")
        rows.append({key: value[0] for key, value in row.items()})
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate(copy.deepcopy(rows))
    assert (batch["labels"] == processor.image_token_id).any()
    expected = words_loss(model, batch, processor.image_token_id)
    with torch.no_grad():
        for options in ({}, {"skip_logits": True}):
            assert abs(float(model(**batch, **options).loss) - expected) < 1e-4
    arguments = TrainingArguments(str(tmp_path), gradient_accumulation_steps=2, remove_unused_columns=False, **QUIET)
    trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=rows, data_collator=collate)
    first, second = losses(trainer)
    assert abs(first - expected) < 2e-3 and second < first


def test_accelerate_trains_it_like_a_plain_loop(cut_model: Any):
    from accelerate import Accelerator

    model, processor = cut_model
    batch = processor(text="<image> what is it?", images=picture(3), return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    found = []
    for accelerator in (None, Accelerator(cpu=True)):
        own = copy.deepcopy(model).train()
        optimizer = torch.optim.SGD(own.parameters(), lr=1e-2)
        if accelerator is not None:
            own, optimizer = accelerator.prepare(own, optimizer)
        for _ in range(2):
            loss = own(**batch).loss
            loss.backward() if accelerator is None else accelerator.backward(loss)
            if accelerator is None:
                torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            else:
                accelerator.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
    assert found[:2] == pytest.approx(found[2:], abs=1e-5) and found[1] < found[0]


def test_rows_of_added_tokens_start_at_the_mean_and_spread_of_the_models_own(cut_model: Any):
    """0.136 in SmolLM2, where its config's ``initializer_range`` says 0.02."""
    model, processor = cut_model
    table = model.get_input_embeddings().weight.detach()
    known, added = table[: processor.image_token_id], table[processor.image_token_id :]
    assert len(added) == 64 and model.config.unassigned_ids == range(len(known) + 1, len(table))
    assert abs(float(added[0].std() / known.std()) - 1) < 0.15  # <image>: 576 values
    torch.testing.assert_close(added[1:], known.mean(0).expand(63, -1), atol=1e-5, rtol=1e-4)  # no token has them


def test_peft_trains_chosen_tokens_beside_its_adapters_and_merges_them(cut_model: Any):
    from peft import LoraConfig, get_peft_model

    model, processor = cut_model
    batch = processor(text="<image> what is it?", images=picture(3), return_tensors="pt")
    chosen = int(batch["input_ids"][0, -1])
    settings = LoraConfig(r=4, target_modules=r".*language_model.*q_proj", trainable_token_indices=[chosen])
    adapted = get_peft_model(copy.deepcopy(model), settings)
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(p.shape == (1, 576) for p in learning) == 1
    optimizer = torch.optim.SGD(learning, lr=1e-3)
    plain, chunked = (adapted(**batch, labels=batch["input_ids"], skip_logits=skip).loss for skip in (False, True))
    assert float(plain.detach()) == pytest.approx(float(chunked.detach()), abs=1e-4)
    chunked.backward()
    optimizer.step()
    with torch.no_grad():
        assert float(adapted(**batch, labels=batch["input_ids"]).loss) < float(plain)
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-3, rtol=1e-4)
    moved = (merged.get_input_embeddings().weight != model.get_input_embeddings().weight).any(1).nonzero()
    assert moved.flatten().tolist() == [chosen]
