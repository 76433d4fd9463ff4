"""Which parameters learn, at which rate and with which decay? The recipe's ``learn`` applied, checked and shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from mllm.connectors.build import connector_config
from mllm.errors import ConfigError, did_you_mean
from mllm.heads.build import FORMER, heads_with_weights
from mllm.models import lora
from mllm.models.making import num_elements
from mllm.recipe import LearnSpec, ModelSpec, StageSpec, reader_of
from mllm.train.added_rows import PART, rows_beside_adapter

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration
    from mllm.train.engine.trainable import TrainableModel


_NO_DECAY = re.compile(
    r"(^|\.)(bias|.*_bias|gamma|.*layer_?scale\w*|cls_token(\.\d+)?|class_embedding|pos_embed(_for_scale)?(\.\d+)?|"
    r"position_embedding\w*|logit_scale|reg_token|register_tokens|channel_token|A_log|D)$"
)
_NORM_CLASS = re.compile(r"norm", re.IGNORECASE)
_NORM_NAME = re.compile(r"(^|[._])(norm\d*|ln(_\w+|\d+)?|\w*layer_?norm\w*|\w*_norm)(\.|$)")


@dataclass(frozen=True)
class Group:
    """Parameters that share part, rate and decay."""

    part: str
    lr: float
    weight_decay: float
    names: tuple[str, ...]
    num_parameters: int
    alone: bool = False
    """The part's only group."""

    @property
    def name(self) -> str:
        """What logs call it: the part, and for what decay spares, ``part/no_decay``."""
        return self.part if self.weight_decay or self.alone else f"{self.part}/no_decay"


def _present_name(part: str, known: list[str]) -> str:
    """The name of a part, from the one that it had before heads had names."""
    return f"heads.{part}" if part == FORMER and f"heads.{part}" in known else part


def recipe_parts(spec: ModelSpec) -> list[str]:
    """The parts that a recipe's model will have."""
    parts = [] if spec.language_model is None else ["language_model"]
    parts += [*(f"encoders.{name}" for name in spec.encoders)]
    parts += [name for name in ("connector", "router") if getattr(spec, name) is not None]
    if spec.connector is not None and getattr(connector_config(spec.connector), "fast", None) is not None:
        parts.append("slow_attention")
    if spec.visual_tokenizer is not None and reader_of(spec.visual_tokenizer) is None:
        parts.append("visual_tokenizer")
    return [*parts, *(f"heads.{name}" for name in heads_with_weights(spec.heads))]


def learning_by_part(known: list[str], stage: StageSpec) -> dict[str, LearnSpec]:
    """Part → how it learns; a name stands for all parts below it: ``encoders``, ``heads``, and ``visual_tokenizer`` where that has
    parts. known: the model's parts.

    Raises `ConfigError` for a part that the model lacks and for a part that is named twice.
    """
    where = f"stages.{stage.name}.learn"
    result: dict[str, LearnSpec] = {}
    for name, spec in stage.learning().items():
        present = _present_name(name, known)
        parts = [p for p in known if p == present or p.startswith(f"{present}.")]
        if not parts:
            shown = list(dict.fromkeys([*known, *(p.partition(".")[0] for p in known)]))
            raise ConfigError(
                f"{where}.{name}: this model has no such part{did_you_mean(name, shown)}. "
                f"Its parts: {', '.join(sorted(shown))}"
            )
        for part in parts:
            if part in result:
                raise ConfigError(
                    f"{where}: {part} is given a rate twice (by {part.partition('.')[0]} and by name); keep one of the two"
                )
            result[part] = spec
    return result


def apply_learning(model: TrainableModel, stage: StageSpec, *, zero_stage: int = 0) -> list[Group]:
    """Freeze everything, then let learn what the stage names; inject adapters. Returns the parameter groups. zero_stage: of
    the engine that will train it.

    The result is checked: every learning parameter is in exactly one group, no other one requires a gradient.
    """
    specs = learning_by_part(list(model.part_prefixes()), stage)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parts = model.named_parts()
    head = model.get_output_embeddings()
    for part, spec in specs.items():
        if spec.lora is not None:
            if spec.last_layers is not None:
                raise ConfigError(
                    f"stages.{stage.name}.learn.{part}: lora and last_layers exclude each other; give one"
                )
            rows = (
                rows_beside_adapter(cast("MllmForConditionalGeneration", model), stage, zero_stage=zero_stage)
                if part == PART
                else {}
            )
            lora.inject(model, part, parts[part], spec.lora, skip={id(head)}, rows=rows)
    for parameter in model.parameters():  # PEFT switches its own adapters on; below decides alone
        parameter.requires_grad_(False)
    owner = {name: model.part_of(name) for name, _ in model.named_parameters()}
    for part, spec in specs.items():
        names = [n for n, p in owner.items() if p == part]
        if not names:
            raise ConfigError(f"stages.{stage.name}.learn.{part}: this part has no parameters in this model")
        for name in _selected(model, stage, part, spec, names):
            model.get_parameter(name).requires_grad_(True)
    groups = _make_groups(model, stage, specs, owner)
    _check(model, groups, specs)
    return groups


def _selected(model: TrainableModel, stage: StageSpec, part: str, spec: LearnSpec, names: list[str]) -> list[str]:
    """Of one part's parameter names, those that learn."""
    if spec.lora is not None:
        return [n for n in names if lora.is_adapter(n)]
    if spec.last_layers is None:
        return names
    where = f"stages.{stage.name}.learn.{part}.last_layers"
    ((prefix, module),) = model.named_parts()[part][:1]
    if not hasattr(module, "layer_groups"):
        raise ConfigError(f"{where}: only encoders can be unfrozen by layer")
    groups = module.layer_groups()  # pyright: ignore[reportCallIssue]
    layers = [g for g in groups if re.fullmatch(r"layers\.\d+", g[0])]
    if spec.last_layers > len(layers):
        raise ConfigError(f"{where} is {spec.last_layers}, but this encoder has {len(layers)} layers")
    first = groups.index(layers[-spec.last_layers])
    prefixes = [f"{prefix}.{p}" for _, group in groups[first:] for p in group]
    return [n for n in names if n.startswith(tuple(prefixes))]


def no_decay_names(model: nn.Module) -> set[str]:
    """Parameters that get no weight decay: biases, norms, scales and single tokens. By name and owner, never by number
    of dimensions (under ZeRO-3 every parameter has one)."""
    names: set[str] = set()
    for module_name, module in model.named_modules():
        is_norm = bool(_NORM_CLASS.search(type(module).__name__))
        for name, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            if is_norm or _NO_DECAY.search(full) or _NORM_NAME.search(full):
                names.add(full)
    return names


def _make_groups(
    model: TrainableModel, stage: StageSpec, specs: dict[str, LearnSpec], owner: dict[str, str]
) -> list[Group]:
    exempt = no_decay_names(model)
    groups = []
    for part, spec in specs.items():
        decay = stage.optimizer.weight_decay if spec.weight_decay is None else spec.weight_decay
        learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad and owner[n] == part]
        for value in dict.fromkeys([decay, 0.0]):
            chosen = [(n, p) for n, p in learning if (0.0 if n in exempt else decay) == value]
            if chosen:
                numel, alone = sum(num_elements(p) for _, p in chosen), len(chosen) == len(learning)
                groups.append(Group(part, spec.lr, value, tuple(n for n, _ in chosen), numel, alone))
    return groups


def _check(model: TrainableModel, groups: list[Group], specs: dict[str, LearnSpec]) -> None:
    grouped = [name for group in groups for name in group.names]
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == set(learning), sorted(set(grouped) ^ set(learning))[:5]
    for part, spec in specs.items():
        rates = {group.lr for group in groups if group.part == part}
        assert rates == {spec.lr}, f"{part}: asked for rate {spec.lr}, applied {rates}"


def set_modes(model: nn.Module) -> None:
    """Training mode where something learns, evaluation mode (no dropout, fixed statistics) in frozen submodules.

    A frozen router stays in training mode: it goes on to explore, which the parts that learn need.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        frozen = parameters and not any(p.requires_grad for p in parameters)
        if frozen:
            module.eval()
        if getattr(module, "trains_when_frozen", False):
            module.training = True


def frozen_summary(model: TrainableModel) -> dict[str, int]:
    """Part → number of its frozen parameters."""
    result: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            part = model.part_of(name)
            result[part] = result.get(part, 0) + num_elements(parameter)
    return result


def groups_table(stage: StageSpec, groups: Iterable[Group], frozen: dict[str, int]) -> Any:
    """A rich table of what learns and what does not."""
    from rich.table import Table

    table = Table(title=f"stage {stage.name}: what learns", title_justify="left")
    for column in ("part", "tensors", "parameters", "lr", "weight decay"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for group in groups:
        table.add_row(
            group.part, str(len(group.names)), f"{group.num_parameters:,}", f"{group.lr:g}", f"{group.weight_decay:g}"
        )
    for part, count in sorted(frozen.items()):
        table.add_row(part, "", f"{count:,}", "frozen", "")
    return table
