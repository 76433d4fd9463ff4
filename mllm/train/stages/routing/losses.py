"""How much does each expert lower a sample's loss? Measured for a whole dataset, resumably."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from mllm import distributed
from mllm.config import to_plain
from mllm.data.collate import collate
from mllm.data.routing_labels import NONE, LabelRule, content_of, helpful_experts, read_lines
from mllm.data.sources import Source
from mllm.errors import AlignmentError, ConfigError, DataError, blamed_on
from mllm.models.loss import shift_labels
from mllm.processing.chat import IGNORE, EncodedSample, encode_sample
from mllm.processing.layout import IMAGE_SIZES
from mllm.processing.protocol import Processor
from mllm.types import Routing

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration


@torch.no_grad()
def losses_by_expert(
    model: MllmForConditionalGeneration, inputs: dict[str, Tensor], num_images: Sequence[int]
) -> Tensor:
    """``(samples, 1 + E)``: each sample's mean loss per learned token without any expert and with each one alone.

    inputs: a right-padded batch as `mllm.data.collate.collate` makes it. Every encoder runs once per image; connector and
    language model run 1 + E times.
    """
    body = model.model
    bank = body.vision_tower
    pixels, layouts = body.pixel_keys.by_encoder(inputs), body.visual_layouts(inputs.get(IMAGE_SIZES))
    text = body.question_summary(inputs.get("router_input_ids"))
    base = bank.encode_base(pixels)
    features = {name: bank.encode_expert(name, pixels[name]) for name in bank.experts}
    count, device = int(sum(num_images)), inputs["input_ids"].device
    results = []
    for index in range(-1, len(bank.experts)):
        weights = torch.zeros(count, len(bank.experts), device=device)
        chosen = {}
        if index >= 0:
            weights[:, index] = 1.0
            chosen = {bank.experts[index]: features[bank.experts[index]]}
        given = {**base, **chosen}
        ordered = {name: given[name] for name in bank.encoders if name in given}
        tokens = body.connect(ordered, Routing(bank.experts, weights), text, layouts)
        hidden = body(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            image_features=tokens,
            image_sizes=inputs.get(IMAGE_SIZES),
            use_cache=False,
        ).last_hidden_state
        results.append(_sample_losses(model, hidden, inputs["labels"]))
    return torch.stack(results, dim=1)


def _sample_losses(model: MllmForConditionalGeneration, hidden: Tensor, labels: Tensor) -> Tensor:
    targets = shift_labels(labels)
    learned = targets != IGNORE
    losses = F.cross_entropy(model.compute_logits(hidden[learned]).float(), targets[learned], reduction="none")
    rows = learned.nonzero()[:, 0]
    totals = losses.new_zeros(len(labels)).index_add(0, rows, losses)
    return totals / learned.sum(dim=1)


def label_source(
    model: MllmForConditionalGeneration,
    processor: Processor,
    source: Source,
    path: Path,
    *,
    rule: LabelRule | None = None,
    num_rows: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    made_by: str = "",
    share: Any = lambda path, writer=None: None,
) -> Path:
    """Write the label file of a dataset (all processes share the rows); returns ``path``. Does nothing where it is complete,
    and goes on where it was left.

    share: called with a file (and ``writer``, the process that wrote it) that all machines must see. Rows without a picture and rows
    that cannot be used get a line without losses. Raises `DataError` when the file there belongs to other data or experts.
    """
    rule = rule or LabelRule()
    bank = getattr(model.model, "vision_tower", None)
    if bank is None or not bank.experts:
        raise ConfigError(
            "this model has no router, so there is nothing to label; add router: {type: gate, experts: […]}"
        )
    top_k = rule.top_k or bank.router.config.top_k
    total = min(len(source), num_rows or len(source))
    header = {
        "dataset": to_plain(source.spec),
        "fingerprint": source.fingerprint,
        "rows": total,
        "experts": list(bank.experts),
        "margin": rule.margin,
        "top_k": top_k,
        "made_by": made_by,
    }
    share(path)
    known = _known(path, header)
    if distributed.is_main():
        known = _unchanged(source, known)  # one process's word: files may arrive meanwhile
    known = distributed.gather_objects(known if distributed.is_main() else None)[0]
    if len(known) < total:
        rank, world = distributed.rank(), distributed.world_size()
        own = path.with_name(f"{path.name}.part{rank}")
        done = {**known, **_unchanged(source, _known(own, header))}
        todo = [row for row in range(total) if row not in done and row % world == rank]
        _measure(model, processor, source, own, header, todo, total, rule.margin, top_k, batch_size, max_length)
        distributed.barrier()
        for number in range(world):
            share(own.with_suffix(f".part{number}"), writer=number)
        if distributed.keeps_folder():
            _merge(path, header, world)
        distributed.barrier()
    return path


def _known(path: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Finished rows of a file with the same header; `DataError` for another one."""
    found, rows = read_lines(path)
    if found is None:
        return {}
    for key in ("fingerprint", "experts", "margin", "top_k", "made_by"):
        if found.get(key) != header[key]:
            raise DataError(
                f"{path} was made with {key} {found.get(key)!r}, now it is {header[key]!r}; delete it, or choose another output"
            )
    return {row: entry for row, entry in rows.items() if row < header["rows"]}


def _unchanged(source: Source, rows: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Of measured rows, those whose text and pictures are what they were."""
    kept = {}
    for row, entry in rows.items():
        try:
            same = entry.get("content") is not None and entry["content"] == content_of(source[row])
        except (DataError, AlignmentError):
            same = False
        if same:
            kept[row] = entry
    return kept


def _measure(
    model: MllmForConditionalGeneration,
    processor: Processor,
    source: Source,
    path: Path,
    header: dict[str, Any],
    todo: list[int],
    total: int,
    margin: float,
    top_k: int,
    batch_size: int,
    max_length: int | None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, kept = read_lines(path)
    with path.open("w", encoding="utf-8") as file:
        for entry in [header, *kept.values()]:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        with _evaluation(model), _bar(f"routing labels {source.name}", len(todo)) as advance:
            for start in range(0, len(todo), batch_size):
                for entry in _entries(
                    model, processor, source, todo[start : start + batch_size], margin, top_k, max_length
                ):
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                file.flush()
                advance(len(todo[start : start + batch_size]))


def _entries(
    model: MllmForConditionalGeneration,
    processor: Processor,
    source: Source,
    rows: list[int],
    margin: float,
    top_k: int,
    max_length: int | None,
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    usable: list[tuple[int, EncodedSample]] = []
    contents: dict[int, str | None] = {}
    for row in rows:
        try:
            sample = source[row]
            with blamed_on(source.where(row, sample.id)):
                encoded = encode_sample(processor, sample, max_length)
                contents[row] = content_of(sample)
        except (DataError, AlignmentError) as error:
            entries.append({"row": row, "losses": None, "reason": str(error)})
            continue
        if encoded.num_images:
            usable.append((row, encoded))
        else:
            about = {"row": row, "id": encoded.id, "content": contents[row]}
            entries.append({**about, "losses": None, "reason": "no image"})
    if not usable:
        return entries
    device = next(model.parameters()).device
    batch = collate([sample for _, sample in usable], pad_token_id=processor.tokenizer.pad_token_id).to(device)
    names = [NONE, *model.model.vision_tower.experts]
    found = losses_by_expert(model, batch.inputs, batch.num_images.tolist()).tolist()
    for (row, sample), values in zip(usable, found):
        losses = {name: round(value, 5) for name, value in zip(names, values)}
        label = helpful_experts(losses, margin=margin, top_k=top_k)
        about = {"row": row, "id": sample.id, "content": contents[row]}
        entries.append({**about, "losses": losses, "experts": label})
    return entries


def _merge(path: Path, header: dict[str, Any], world: int) -> None:
    """One file from what stood there and all parts, by row; the parts are removed (also those of an earlier, larger run)."""
    parts = sorted(path.parent.glob(f"{path.name}.part*"))
    rows: dict[int, dict[str, Any]] = {}
    for file in [path, *parts]:
        rows |= read_lines(file)[1]
    temporary = path.with_name(f".writing-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        for entry in [header, *(rows[row] for row in sorted(rows))]:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    temporary.replace(path)
    for part in parts:
        part.unlink()


@contextmanager
def _evaluation(model: MllmForConditionalGeneration) -> Iterator[None]:
    """Evaluation mode for the block; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    """A progress bar on the main process's terminal, or a line at every tenth."""
    console = Console(stderr=True)
    if not distributed.is_main():
        yield lambda _: None
        return
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total)
            yield lambda count: progress.advance(task, count)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if total and before * 10 // total != done * 10 // total:
            console.print(f"{title} {done}/{total}", highlight=False)

    yield advance
