"""Does a head keep the contract? Each check raises AssertionError with a sentence on what broke."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.heads import HEADS
from mllm.heads.base import TARGET, Head, HeadLoss, HeadParts, Reading, Step, head_losses, lay_targets
from mllm.heads.build import head_config, head_tokens, resolved_heads
from mllm.testing.running import run_checks
from mllm.types import Block, VisionFeatures, VisualLayout

Case = tuple[dict[str, Any], HeadParts]
FIRST_TOKEN = 20
NULL = 0


class TinyModel(nn.Module):
    """The least that a head can belong to: embeddings, a running mean in place of a language model, an output layer."""

    def __init__(self, head: Head, parts: HeadParts, vocabulary: int):
        super().__init__()
        self.heads = nn.ModuleDict({"head": head})
        self.embeddings, self.lm_head = nn.Embedding(vocabulary, parts.width), nn.Linear(parts.width, vocabulary)
        self.image_tokenizer: Any = parts.tokenizer
        self.visual_head: Head = head
        self.visual_config: Any = head.config
        self.infos = parts.encoders
        self.depth, self.rules = parts.layers, parts.rules
        self.features = {
            name: VisionFeatures(torch.randn(2, info.grid[0] * info.grid[1], info.width), info.grid)
            for name, info in parts.encoders.items()
        }

    image_token_id = 4

    def visual_layouts(
        self, image_sizes: Tensor | None, video_times: Tensor | None = None
    ) -> list[VisualLayout] | None:
        """As views native lay pictures of these (height, width) out, for the first encoder; as the parts' rules lay videos out, where times
        are given; None without either."""
        if video_times is not None:
            assert self.rules is not None
            return self.rules.layouts(None, times=video_times)
        if image_sizes is None:
            return None
        info = next(iter(self.infos.values()))
        unit = info.image.patch or 1
        grids = [(height // unit, width // unit) for height, width in image_sizes.tolist()]
        lines = [info.leading + rows * (columns + info.row_ends) for rows, columns in grids]
        blocks = [
            Block(count, (1, *grid), info.row_ends, leading=info.leading)
            for count, grid in zip(lines, grids, strict=True)
        ]
        return [VisualLayout((block,), patches=grid) for block, grid in zip(blocks, grids, strict=True)]

    def tokens_of_images(self, total: int, image_sizes: Tensor | None) -> list[int]:
        return [1] * total

    @property
    def model(self) -> TinyModel:
        return self

    @property
    def config(self) -> Any:
        return self

    def get_text_config(self) -> TinyModel:
        return self

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        return self.embeddings(input_ids)

    def is_visual(self, input_ids: Tensor) -> Tensor:
        return torch.zeros_like(input_ids, dtype=torch.bool)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def token_loss(self, hidden: Tensor, labels: Tensor, num_items: Any = None) -> Tensor:
        logits, targets = self.lm_head(hidden)[:, :-1].float(), labels[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return loss / ((targets != -100).sum().clamp(min=1) if num_items is None else num_items)

    def forward(self, step: Step) -> Reading:
        """Hidden states of a step that the head has laid."""
        assert step.input_ids is not None
        values = self.embed_tokens(step.input_ids)
        if "slot_mask" in step.inputs:
            embeds = step.inputs["slot_embeds"].to(values)
            values = values.masked_scatter(step.inputs["slot_mask"][..., None], embeds)
        count = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
        wanted = HEADS.get(self.visual_config.type).reads(self.visual_config)
        features = {name: self.features[name] for name in wanted}
        for feature in features.values():
            feature.tokens = feature.tokens.to(values.dtype)
        hidden = values.float().cumsum(1).div(count).to(values)
        asked = step.inputs.get("output_hidden_states")
        return Reading(hidden, features, [values * (1 + k) for k in range(self.depth)] + [hidden] if asked else None)


def build(case: Case, *, seed: int = 0) -> TinyModel:
    """A tiny model with the head, its tokens numbered as a model's would be."""
    config, parts = case
    torch.manual_seed(seed)
    resolved = resolved_heads({"head": config}, parts, id_of=None, first_free=FIRST_TOKEN, null=NULL)["head"]
    vocabulary = FIRST_TOKEN + len(head_tokens({"head": config}, parts)) + 1
    return TinyModel(HEADS.get(config["type"])(head_config(resolved), parts), parts, vocabulary)


def run(model: TinyModel, case: Case, *, targets: bool = True) -> HeadLoss:
    """The loss of two samples, with what they should be answered or without."""
    head = model.heads["head"]
    assert isinstance(head, Head)
    step, given = head.example(case[1], 2)
    step.inputs |= given if targets else {}
    lay_targets(model, step)
    total, parts = head_losses(model, step, model(step))
    return HeadLoss(torch.as_tensor(total), parts or {})


def check_config(name: str, case: Case) -> None:
    """The config survives JSON, its tokens get ids, and the targets' names begin as all targets' do."""
    cls, model = HEADS.get(name), build(case)
    config = model.visual_config
    assert head_config(config.model_dump(mode="json")) == config, "the config does not survive JSON"
    tokens = cls.tokens(head_config(case[0]), case[1])
    assert len(set(tokens)) == len(tokens), f"tokens are named twice: {tokens}"
    assert not tokens or config.tokens, f"resolve() gave {tokens} no ids"
    assert all(key.startswith(TARGET) for key in cls.targets), f"targets must begin with {TARGET}: {cls.targets}"
    unknown = set(cls.reads(config)) - set(case[1].encoders)
    assert not unknown, f"reads() names encoders that the model lacks: {sorted(unknown)}"


def check_losses(name: str, case: Case) -> None:
    """With targets the loss is a finite scalar above zero, and its parts are reported by name, detached."""
    found = run(build(case).train(), case)
    assert found.total.dim() == 0 and torch.isfinite(found.total), f"the loss is no finite scalar: {found.total}"
    assert float(found.total.detach()) > 0, "targets were given and the loss is zero"
    assert found.parts, "no part of the loss is reported by name"
    for part, value in found.parts.items():
        assert value.dim() == 0 and torch.isfinite(value), f"loss {part} is no finite scalar: {value}"
        assert not value.requires_grad, f"loss {part} is reported with its graph; detach it"


def check_gradients(name: str, case: Case) -> None:
    """The loss reaches every parameter of the head, and the hidden states."""
    model = build(case).train()
    run(model, case).total.backward()
    missing = [key for key, p in model.heads.named_parameters() if p.grad is None or not p.grad.any()]
    allowed = HEADS.get(name).without_gradient
    missing = [key for key in missing if not any(part in key for part in allowed)]
    assert not missing, f"the loss's gradient does not reach {missing}"
    assert model.embeddings.weight.grad is not None and model.embeddings.weight.grad.any(), (
        "the loss does not reach the hidden states"
    )


def check_idle(name: str, case: Case) -> None:
    """A batch without targets adds zero in training, and reaches every learning parameter: ranks reduce alike."""
    if not HEADS.get(name).targets:
        return  # its words are its targets
    model = build(case).train()
    found = run(model, case, targets=False)
    assert float(found.total.detach()) == 0 and not found.parts, f"a batch without targets has a loss: {found}"
    if list(model.heads.parameters()):
        found.total.backward()
        wrong = [key for key, p in model.heads.named_parameters() if p.grad is None or p.grad.any()]
        assert not wrong, f"a batch without targets leaves these without a zero gradient: {wrong}"


def check_meta_build(name: str, case: Case) -> None:
    """Building on the meta device allocates nothing."""
    with torch.device("meta"):
        head = HEADS.get(name)(head_config(case[0]), case[1])
    real = [key for key, tensor in head.state_dict(keep_vars=True).items() if tensor.device.type != "meta"]
    assert not real, f"built on the meta device, these tensors are real: {real}"


def check_save_and_load(name: str, case: Case) -> None:
    """Parameters and config carry the whole head."""
    first, second = build(case, seed=0).eval(), build(case, seed=1).eval()
    second.load_state_dict(first.state_dict(), strict=True)
    second.features = first.features
    torch.testing.assert_close(run(first, case).total, run(second, case).total, rtol=1e-5, atol=1e-6)


def check_bfloat16(name: str, case: Case) -> None:
    """In bfloat16 the loss is finite and in fp32."""
    model = build(case).to(torch.bfloat16)
    found = run(model, case)
    assert found.total.dtype == torch.float32, f"the loss is {found.total.dtype}, expected float32"
    assert torch.isfinite(found.total), "the loss is not finite in bfloat16"


def check_without_labels(name: str, case: Case) -> None:
    """Targets without labels are laid, as in drawing or answering."""
    if not HEADS.get(name).targets:
        return  # without labels there are no targets
    model = build(case).eval()
    step, given = model.heads["head"].example(case[1], 2)  # type: ignore[operator]
    step.labels = None
    step.inputs |= given
    lay_targets(model, step)
    assert "head" in step.laid, "targets were given and the head laid none"


CHECKS: tuple[Callable[[str, Case], None], ...] = (
    check_config,
    check_losses,
    check_gradients,
    check_idle,
    check_meta_build,
    check_save_and_load,
    check_bfloat16,
    check_without_labels,
)


def check_head(name: str, config: Mapping[str, Any] | None = None) -> list[str]:
    """Run every check on a registered head; returns the checks' names.

    config: keys to set beside the class's `Head.tiny` example. Raises `AssertionError` naming the check and what broke.
    """
    example, parts = HEADS.get(name).tiny()
    case = ({**example, **(config or {}), "type": name}, parts)
    return run_checks(CHECKS, name, case)
