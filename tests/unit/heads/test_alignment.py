"""Do hidden states learn what a teacher sees, as EVE teaches them, at no cost to a model that answers?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mllm.data.collate import collate, collate_packed
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError
from mllm.heads.alignment import AlignmentHead, AlignmentHeadConfig, teacher_pictures
from mllm.heads.base import HeadParts
from mllm.heads.build import head_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import encode_sample
from mllm.types import EncoderInfo, ImageSpec
from tests.helpers import TINY_LLM, samples_of_unlike_sizes, tiny_model

STUDENT = {"type": "eve", "width": 16, "patch_size": 4, "num_heads": 2, "image_size": 48}
TEACHER: dict[str, Any] = {"type": "unit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "cpe_max_size": 24}
TEACHER |= {"image_size": 24}


def setup(folder: Path, *, views: dict[str, Any] | None = None, **head: Any) -> tuple[Any, Any]:
    """A tiny EVE with a teacher whose weights lie in ``folder``."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    teacher = build_encoder(encoder_config(TEACHER, where="teacher"))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_file({name: value.clone() for name, value in teacher.model.state_dict().items()}, folder / "t.safetensors")  # type: ignore[union-attr]
    settings = {"type": "alignment", "teacher": {**TEACHER, "weights": {"source": str(folder / "t.safetensors")}}}
    return tiny_model(
        folder / "words",
        encoders={"patches": STUDENT},
        connector={"type": "mlp", "depth": 2},
        views=views or {"type": "native", "rule": "qwen", "max_patches": 64},
        heads={"align": {**settings, "every": 1, "num_heads": 2, **head}},
        language_model={"config": {**TINY_LLM, "num_hidden_layers": 3}, "tokenizer": str(folder / "words")},
    )


@pytest.fixture(scope="module")
def eve(tmp_path_factory: Any) -> tuple[Any, Any]:
    return setup(tmp_path_factory.mktemp("eve"))


def published(head: Any, states: torch.Tensor) -> torch.Tensor:
    """VisionCompressor's arithmetic on ``(K, layers + 1, L)``, from its description: q, k and v are the normed, projected maps."""
    order = [head.layers[0] - step for step in range(0, head.layers[0] + 1, head.config.every)]
    assert order == head.layers
    maps = [
        F.linear(F.layer_norm(states[:, layer], states.shape[-1:], part[0].weight, part[0].bias), part[1].weight)
        for layer, part in zip(order, head.norm_layer, strict=True)
    ]
    width, heads = maps[0].shape[1], head.config.num_heads
    found = []
    for start in range(0, width, width // heads):
        own = slice(start, start + width // heads)
        scores = torch.stack([(maps[0][:, own] * other[:, own]).sum(1) / math.sqrt(width) for other in maps[1:]], dim=1)
        shares = scores.softmax(1)
        found.append(sum(shares[:, k : k + 1] * other[:, own] for k, other in enumerate(maps[1:])))
    return head.input_layer(states[:, head.layers[0]]) + head.output_layer(torch.cat(found, dim=1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("layers", "every", "heads"), [(8, 4, 2), (5, 2, 4), (3, 1, 1)])
def test_joined_layers_are_those_of_the_paper(layers: int, every: int, heads: int) -> None:
    info = EncoderInfo(image=ImageSpec(height=8, width=8, patch=8), grid=(1, 1), width=4)
    config = head_config({"type": "alignment", "teacher": TEACHER, "every": every, "num_heads": heads})
    assert isinstance(config, AlignmentHeadConfig)
    torch.manual_seed(0)
    head = AlignmentHead(config, HeadParts(12, {"e": info}, layers=layers))
    states = torch.randn(7, layers + 1, 12)
    found = head([states[:, layer] for layer in head.layers])
    torch.testing.assert_close(found, published(head, states), atol=1e-5, rtol=1e-5)


def test_the_teacher_sees_the_student_s_picture_in_the_middle_of_its_canvas() -> None:
    student = ImageSpec(height=32, width=32, patch=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
    teacher = EncoderInfo(image=ImageSpec(height=16, width=16), grid=(4, 4), width=4)
    cells = torch.rand(2, 4, 3)  # one colour a cell
    mean, std = (torch.tensor(value) for value in (student.mean, student.std))
    patches = ((cells - mean) / std)[..., None].expand(2, 4, 3, 64).reshape(8, -1)
    seen = teacher_pictures(patches, [(2, 4)], [(2, 4)], student, teacher)
    assert seen.shape == (1, 3, 16, 16)
    assert not seen[0, :, :4].any() and not seen[0, :, 12:].any(), "above and below lies the mean colour"
    middle = F.avg_pool2d(seen[:, :, 4:12] * 0.5 + 0.5, 4)[0].permute(1, 2, 0)
    torch.testing.assert_close(middle, cells, atol=0.12, rtol=0)  # a bicubic kernel reaches into the next cell


def batch_of(processor: Any, *, packed: bool = False) -> dict[str, Any]:
    encoded = [encode_sample(processor, sample) for sample in samples_of_unlike_sizes()]
    if packed:
        return collate_packed([encoded], max_length=sum(map(len, encoded)), pad_token_id=0).inputs
    return collate(encoded, pad_token_id=0).inputs


def alignment(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The head's own share of the loss, with its gradient."""
    keep, model.heads.align.config.weight = model.heads.align.config.weight, 0.0
    without = model(**batch, use_cache=False).loss
    model.heads.align.config.weight = keep
    return model(**batch, use_cache=False).loss - without


def test_it_reaches_the_patch_layer_and_falls_padded_and_packed_alike(eve: tuple[Any, Any]) -> None:
    model, processor = eve
    model.train()
    batches = [batch_of(processor), batch_of(processor, packed=True)]
    first, second = (model(**batch, use_cache=False).losses["align/alignment"] for batch in batches)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    alignment(model, batches[0]).backward()
    patches = model.model.vision_tower.encoders["patches"]
    for name, parameter in [*patches.named_parameters(), *model.heads.named_parameters()]:
        if name not in ("layer.class_embedding", "layer.split_embedding"):  # seen by what follows them, not compared
            assert parameter.grad is not None and parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in model.heads.align._teacher[0].parameters())
    learning = [*patches.parameters(), *model.model.multi_modal_projector.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=3e-3)
    for _ in range(25):
        model.zero_grad()
        model(**batches[1], use_cache=False).loss.backward()
        optimizer.step()
    last = model(**batches[1], use_cache=False).losses["align/alignment"]
    assert float(last) < 0.5 * float(first), (float(first), float(last))
    model.zero_grad()
    model.eval()


def test_text_alone_still_reaches_every_weight_and_gradient_checkpointing_changes_nothing(eve: tuple[Any, Any]) -> None:
    model, processor = eve
    model.train()
    words = processor(text=["no picture"], return_tensors="pt")
    model(**words, labels=words["input_ids"]).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.heads.parameters())
    batch, grads = batch_of(processor), []
    for recomputed in (False, True):
        model.zero_grad()
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, use_cache=False).loss.backward()
        grads.append(model.model.vision_tower.encoders["patches"].layer.patch_embedding.weight.grad.clone())
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)


def test_answering_asks_for_no_hidden_states_and_no_teacher(eve: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = eve
    batch = batch_of(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MllmForConditionalGeneration.from_pretrained(tmp_path)
    out = again(**batch, use_cache=False)
    assert out.hidden_states is None and out.losses is None and again.heads.align._teacher == []
    own = {name for name, _ in AlignmentHead(again.heads.align.config, _parts(again)).named_parameters()}
    assert {name.removeprefix("heads.align.") for name in again.state_dict() if name.startswith("heads.")} == own
    # learning goes on where it was: the same teacher, read anew
    model.train(), again.train()
    torch.testing.assert_close(again(**batch, use_cache=False).loss, model(**batch, use_cache=False).loss)
    model.eval()


def _parts(model: Any) -> HeadParts:
    return HeadParts(64, model.config.encoder_infos(), layers=model.config.text_config.num_hidden_layers)


def test_a_picture_larger_than_the_teacher_s_is_pooled_to_its_cells(tmp_path: Path) -> None:
    views = {"type": "native", "rule": "eve", "max_side": 336, "max_patches": 144}
    model, processor = setup(tmp_path, views=views)  # up to 12 tokens a side, and the teacher has 6
    model.train()
    loss = model(**batch_of(processor), use_cache=False).losses["align/alignment"]
    assert torch.isfinite(loss) and 0 < float(loss) < 2


def test_what_cannot_be_aligned_is_told(eve: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = eve
    batch = batch_of(processor)
    features = model.get_image_features(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
    model.train()
    cached = {key: value for key, value in batch.items() if key != "pixel_values"}
    with pytest.raises(ConfigError, match="cache_features: false"):
        model(**cached, image_features=torch.cat(features))
    model.eval()
    for changes, words in [
        ({"encoder": "eye"}, "'eye' is no encoder of this model; its encoders: patches"),
        ({"every": 9}, "leaves one of 3 layers"),
        ({"num_heads": 3}, "3 do not divide the teacher's width 16"),
        ({"teacher": TEACHER}, "knows nothing to teach"),
        ({"teacher": STUDENT}, "gives no map of the picture"),
    ]:
        with pytest.raises(ConfigError, match=words):
            setup(tmp_path, **changes)
