"""How do encoded samples become one batch of tensors, padded or packed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.data.plan import Position
from mllm.errors import AlignmentError, DataError
from mllm.processing.chat import IGNORE, EncodedSample


class Dropped(NamedTuple):
    """A sample that could not be used, and why."""

    dataset: str
    row: int
    id: str
    reason: str
    kind: str = ""
    """What went wrong, in a few words that are the same for many samples."""
    shard: str = ""
    """Of shards, the one that ``row`` is a row of."""


@dataclass
class Batch:
    """B rows of T tokens. ``inputs`` go to the model by name; the rest tells what they are.

    inputs: ``input_ids``, ``labels`` ``(B, T)``; ``attention_mask`` ``(B, T)`` when padded, ``position_ids`` ``(B, T)``
    (from 0 in every sample) when packed; pixels (of all views) and other per-image tensors of all images, in the order of the samples.
    """

    inputs: dict[str, Tensor]
    ids: list[str]
    datasets: list[str]
    """Id and dataset of every sample, row by row."""
    lengths: list[list[int]]
    """Tokens of every sample, per row."""
    num_images: Tensor
    """``(samples,)`` int64."""
    num_supervised: int
    """Tokens that carry loss."""
    num_views: int = 0
    """Views of all images together: what each encoder runs on."""
    segment_ids: Tensor | None = None
    """Packed: ``(B, T)`` int32, the sample's place in its row, -1 on padding."""
    cu_seq_lens: Tensor | None = None
    """Packed: int32 ends of all samples over the flattened ``B · T`` tokens, from 0; padding makes segments of its
    own, none longer than the longest sample; its length is a power of two plus one (the last value repeated), so that
    compiled code sees few shapes."""
    truncated: list[str] = field(default_factory=list)
    """Ids of samples whose text was cut."""
    dropped: list[Dropped] = field(default_factory=list)
    position: Position | None = None
    following: Position | None = None
    """Where this batch is in the plan, and where the next one is: what a checkpoint stores."""
    epoch: float = 0.0
    seconds: float = 0.0
    """What reading its samples and pictures took in the process that did it; of a batch that was split the first part has all."""

    def to(self, device: Any, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (`torch.utils.data.DataLoader` calls this)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
        values["inputs"] = {name: change(tensor) for name, tensor in self.inputs.items()}
        return Batch(**values)


def collate(
    samples: Sequence[EncodedSample],
    *,
    pad_token_id: int,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """One sample a row, padded to the longest (rounded up to ``pad_to_multiple_of``)."""
    longest = max(len(sample) for sample in samples)
    if pad_to_multiple_of:
        longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    ids = torch.full((len(samples), longest), pad_token_id, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        start = longest - len(sample) if padding_side == "left" else 0
        span = slice(start, start + len(sample))
        ids[row, span], labels[row, span], mask[row, span] = sample.input_ids, sample.labels, 1
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, **join_images(samples)}
    inputs |= join_targets(samples)
    return _batch(inputs, samples, [[len(sample)] for sample in samples])


def split_by_tokens(samples: Sequence[EncodedSample], most: int, multiple: int = 1) -> list[list[EncodedSample]]:
    """The samples of a padded batch as few batches of at most ``most`` tokens each, padding to a ``multiple`` included; the longest come
    first. As they are where they fit; a sample of more than ``most`` is alone."""
    padded = [-(-len(sample) // multiple) * multiple for sample in samples]
    if len(samples) * max(padded) <= most:
        return [list(samples)]
    parts: list[list[EncodedSample]] = []
    rows = 0  # that the present part may have
    for index in sorted(range(len(samples)), key=lambda index: -padded[index]):
        if not parts or len(parts[-1]) >= rows:
            parts.append([])
            rows = most // padded[index]
        parts[-1].append(samples[index])
    return parts


def collate_packed(rows: Sequence[Sequence[EncodedSample]], *, max_length: int, pad_token_id: int) -> Batch:
    """Several samples a row, one after another, every row ``max_length`` long.

    The first token of a sample carries no loss (it would be predicted from its neighbour). Raises `DataError` when a
    row is longer than ``max_length``.
    """
    ids = torch.full((len(rows), max_length), pad_token_id, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1, dtype=torch.int32)
    ends = [0]
    longest = max(len(sample) for row in rows for sample in row)
    for number, row in enumerate(rows):
        used = sum(len(sample) for sample in row)
        if used > max_length:
            names = ", ".join(f"{sample.id!r} ({len(sample)})" for sample in row)
            raise DataError(f"packed row of {names} has {used} tokens, more than max_length={max_length}")
        start = 0
        for place, sample in enumerate(row):
            span = slice(start, start + len(sample))
            ids[number, span], labels[number, span] = sample.input_ids, sample.labels
            labels[number, start] = IGNORE
            positions[number, span] = torch.arange(len(sample))
            segments[number, span] = place
            start += len(sample)
            ends.append(number * max_length + start)
        while start < max_length:  # no segment is longer than the longest sample: kernels are told that length
            stop = min(start + longest, max_length)
            positions[number, start:stop] = torch.arange(stop - start)
            ends.append(number * max_length + stop)
            start = stop
    padded = 1 << max(len(ends) - 2, 7).bit_length()
    ends += [ends[-1]] * (padded + 1 - len(ends))
    samples = [sample for row in rows for sample in row]
    inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, **join_images(samples)}
    inputs |= join_targets(samples)
    batch = _batch(inputs, samples, [[len(sample) for sample in row] for row in rows])
    batch.segment_ids, batch.cu_seq_lens = segments, torch.tensor(ends, dtype=torch.int32)
    return batch


def join_images(samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """Per-image tensors of all samples end to end, by batch key; rows of token ids are widened with -1.

    Every key must cover every image, pixels every view of it. Raises `AlignmentError` with both numbers, naming the first
    sample that differs.
    """
    joined: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for sample in samples for key in (*sample.pixels, *sample.extras)):
        parts = []
        for sample in samples:
            tensor = sample.pixels.get(key, sample.extras.get(key))
            found = 0 if tensor is None else tensor.shape[0]
            expected = sample.num_views.get(key, sample.num_images)
            if found != expected:
                what = "images" if expected == sample.num_images else "views of its images"
                raise AlignmentError(
                    f"sample {sample.id!r} of {sample.dataset}: {expected} {what} and {found} entries of {key}"
                )
            if tensor is not None and found:
                parts.append(tensor)
        if not parts:
            continue
        if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1:
            width = max(part.shape[1] for part in parts)
            parts = [F.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def join_targets(samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
    """``target_images``, ``target_masks``, ``target_examples`` and what heads of geometry learn: of all samples, end to end, where there
    is any. Raises `AlignmentError` for pictures and stored codes in one batch."""
    marked = [sample.masks for sample in samples if sample.masks is not None]
    beside = {"target_masks": torch.cat(marked)} if marked else {}
    shown = [sample.examples for sample in samples if sample.examples is not None]
    if shown:
        beside["target_examples"] = torch.cat(shown)
    for key in dict.fromkeys(key for sample in samples for key in sample.geometry):
        beside[key] = torch.cat([sample.geometry[key] for sample in samples if key in sample.geometry])
    parts = [(sample, sample.targets) for sample in samples if sample.targets is not None]
    if not parts:
        return beside
    first = parts[0][1]
    for sample, tensor in parts:
        if tensor.dim() != first.dim():
            raise AlignmentError(
                f"sample {sample.id!r} of {sample.dataset}: images to draw come as pictures and as stored codes in one batch; "
                "encode all of the mixture's pictures (mllm tokenizer encode), or none"
            )
    return {"target_images": torch.cat([tensor for _, tensor in parts]), **beside}


def _batch(inputs: dict[str, Tensor], samples: Sequence[EncodedSample], lengths: list[list[int]]) -> Batch:
    return Batch(
        inputs=inputs,
        ids=[sample.id for sample in samples],
        datasets=[sample.dataset for sample in samples],
        lengths=lengths,
        num_images=torch.tensor([sample.num_images for sample in samples], dtype=torch.long),
        num_supervised=sum(sample.num_supervised for sample in samples),
        num_views=sum(max(sample.num_views.values(), default=sample.num_images) for sample in samples),
        truncated=[sample.id for sample in samples if sample.truncated],
    )
