"""How do images that the model draws enter its inputs, and what is their loss?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import AlignmentError, ConfigError
from mllm.heads.base import HeadLoss, HeadModel, MultimodalModel, Step
from mllm.heads.codes.grammar import vocabulary_offsets
from mllm.heads.pictures import pictures_before
from mllm.processing.chat import IGNORE
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.next_scale import next_scale_mask
from mllm.visual_tokenizers.sequence import code_blocks, pack_codes, unpack_codes


@dataclass
class DrawnImages:
    """The K images to draw of a batch, laid into its inputs.

    codes ``(K, S)``; read ``(K, S)``: those that are its inputs, the same but for noise in training; input_ids, labels ``(B, T)`` for the
    language model's own loss; starts ``(K, 2)``: row and column of each start token; learned ``(K,)``: whether an image's codes carry
    loss; code_labels: vocabulary head, codebook → labels ``(B, T)``; counts ``(K, S)``: what each code's loss counts, 1 in the mean of a
    picture (None: alike).
    """

    codes: Tensor
    read: Tensor
    input_ids: Tensor
    labels: Tensor | None
    starts: Tensor
    learned: Tensor
    num_slots: int
    code_labels: dict[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None


def codes_of(tokenizer: VisualTokenizer, images: Tensor) -> Tensor:
    """Pixels ``(K, 3, H, W)`` or packed codes ``(K, S)`` → packed codes. Raises `ConfigError` or `AlignmentError` for
    what the tokenizer cannot decode."""
    if not images.is_floating_point():
        unpack_codes(tokenizer, images)
        return images.long()
    with torch.no_grad(), evaluating(tokenizer):
        return pack_codes(tokenizer, tokenizer.encode(images))


@contextmanager
def evaluating(module: nn.Module | MultimodalModel) -> Iterator[None]:
    """Evaluation mode inside, every part's own mode again after."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def drop_text(
    input_ids: Tensor, starts: Tensor, first: Tensor, null: int, keep: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """input_ids ``(B, T)`` with the text before some images replaced by ``null``: between ``first`` ``(K,)`` (a sample's
    first token, which stays) and the images' start tokens, starts ``(K, 2)``. keep ``(B, T)``: tokens that are no text.
    The labels there are taken out: nothing is to be learned from no text."""
    input_ids = input_ids.clone()
    labels = None if labels is None else labels.clone()
    for (row, column), begin in zip(starts.tolist(), first.tolist()):
        span = slice(begin + 1, column)
        text = ~keep[row, span]
        input_ids[row, span] = input_ids[row, span].masked_fill(text, null)
        if labels is not None:
            here = slice(begin + 1, column + 1)
            text = torch.cat([text, text.new_ones(1)])
            labels[row, here] = labels[row, here].masked_fill(text, IGNORE)
    return input_ids, labels


def lay_images(model: HeadModel, images: Tensor, step: Step) -> DrawnImages:
    """Put K images (pixels or packed codes) into the spans of the step's ``input_ids``. Raises `AlignmentError` when the spans and
    the images differ in number."""
    input_ids, labels = step.input_ids, step.labels
    if labels is not None and step.num_items is None:
        step.num_items = (labels[:, 1:] != IGNORE).sum().clamp(min=1)
    config, head, tokenizer = model.visual_config, model.visual_head, model.image_tokenizer
    tokens = config.tokens
    codes = codes_of(tokenizer, images.to(input_ids.device))  # pyright: ignore[reportOptionalMemberAccess]
    slots = input_ids == tokens["code"]
    starts = (input_ids == tokens["start"]).nonzero()
    num_slots = head.num_slots
    if len(starts) != len(codes) or int(slots.sum()) != len(codes) * num_slots:
        raise AlignmentError(
            f"{len(codes)} images to draw, but {len(starts)} starts of an image and {int(slots.sum())} code placeholders in the "
            f"text (one image has {num_slots}); was it made by this model's own processor and not cut inside an image?"
        )
    places = slots.nonzero().view(len(codes), num_slots, 2)
    if labels is None or not num_slots:
        learned = torch.full((len(codes),), labels is not None, device=input_ids.device)  # pyright: ignore[reportOptionalMemberAccess]
    else:
        learned = labels[places[:, 0, 0], places[:, 0, 1]] != IGNORE
    drawn = DrawnImages(codes, codes, input_ids, labels, starts, learned, num_slots)  # pyright: ignore[reportArgumentType]
    if model.training and config.code_noise > 0 and len(codes):
        drawn.read = torch.where(learned[:, None], noisy_codes(codes, config.code_noise, tokenizer), codes)
    weighed, told = config.changed_weight != 1 and labels is not None, getattr(config, "told_changes", False)
    changed = None
    if (weighed or told) and len(codes):
        changed = changed_codes(model, images.to(input_ids.device), starts, step)  # pyright: ignore[reportOptionalMemberAccess]
    if weighed and changed is not None:
        counts = torch.where(changed, config.changed_weight, 1.0)
        drawn.counts = counts / counts.mean(1, keepdim=True)
    if model.training and labels is not None and config.text_dropout > 0 and len(codes):
        _drop_some(model, drawn, learned, step.attention_mask, step.position_ids)
    if labels is not None:
        drawn.labels = drawn.labels.masked_fill(slots, IGNORE)  # pyright: ignore[reportOptionalMemberAccess]
    if not head.has_weights:
        _write_vocabulary(model, drawn, places)
    else:
        embeddings = model.model.embed_tokens(torch.tensor([tokens["start"]], device=input_ids.device))  # pyright: ignore[reportOptionalMemberAccess]
        first = head.start(embeddings)[None].expand(len(codes), 1, -1)
        values = torch.cat([first, head.slots(drawn.read, tokenizer).to(first)], 1)
        if told and changed is not None:
            values = values + F.pad(head.told(changed), (0, 0, 0, 1)).to(values)  # nothing comes after the last code
        step.inputs |= {"slot_mask": slots | (input_ids == tokens["start"]), "slot_embeds": values.flatten(0, 1)}
        if config.type == "next_scale":
            step.attention_mask = scale_mask(
                model, drawn, step.attention_mask, step.position_ids, first.dtype, head.scales
            )
    step.input_ids, step.labels = drawn.input_ids, drawn.labels
    return drawn


CHANGED = 0.15
"""A pixel in [-1, 1] has changed where it differs by more in any of red, green and blue: resizing and rounding change less."""


def changed_codes(model: HeadModel, images: Tensor, starts: Tensor, step: Step) -> Tensor:
    """Which codes ``(K, S)`` of drawn pictures ``(K, 3, H, W)`` stand for cells that differ from the picture shown last before them, each
    seen at the drawn picture's size; all of a picture before which none is shown. starts ``(K, 2)``: their start tokens. Raises
    `ConfigError` for stored codes, and where pictures are not seen whole."""
    where = "changed_weight, told_changes"
    if not images.is_floating_point():
        raise ConfigError(
            f"{where}: drawn pictures came as stored codes; give pictures, whose pixels tell what changed"
        )
    assert step.input_ids is not None
    first = first_of_sample(starts, step.attention_mask, step.position_ids)
    owners = pictures_before(model, step.input_ids, starts, step.inputs.get("image_sizes"), first)
    seen, changed = owners >= 0, images.new_ones(len(images), *images.shape[2:])
    if bool(seen.any()):
        name, given = next(iter(step.pixels.items()), ("", None))
        number = int(owners.max()) + 1
        if given is None or given.dim() != 4 or len(given) < number:
            raise ConfigError(f"{where}: needs an encoder that sees each picture whole, as pixels of one view")
        spec = model.model.vision_tower.infos[name].image
        mean, deviation = (given.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
        sources = (given[owners[seen]] * deviation + mean).to(images) * 2 - 1
        sources = F.interpolate(sources, images.shape[2:], mode="bilinear", antialias=True)
        changed[seen] = ((images[seen] - sources).abs().amax(1) > CHANGED).to(images)
    blocks = code_blocks(model.image_tokenizer)
    pooled = [F.adaptive_max_pool2d(changed[:, None], (b.rows, b.columns)).flatten(1) for b in blocks]
    return torch.cat(pooled, 1) > 0


def noisy_codes(codes: Tensor, share: float, tokenizer: VisualTokenizer) -> Tensor:
    """Packed codes ``(K, S)``, about ``share`` of them in favour of others from their codebooks, from torch's own generator on the CPU."""
    number = codes.shape[1]
    sizes = torch.cat([torch.full((block.number,), block.size) for block in code_blocks(tokenizer)])
    chosen = torch.rand(len(codes), number) < share
    others = (torch.rand(len(codes), number, dtype=torch.float64) * sizes).long()
    return torch.where(chosen.to(codes.device), others.to(codes.device), codes)


def _drop_some(
    model: HeadModel, drawn: DrawnImages, learned: Tensor, mask: Tensor | None, position_ids: Tensor | None
) -> None:
    chosen = (torch.rand(len(learned)) < model.visual_config.text_dropout).to(learned.device) & learned
    starts = drawn.starts[chosen]
    if not len(starts):
        return
    first = first_of_sample(starts, mask, position_ids)
    keep = model.is_visual(drawn.input_ids)
    null = model.visual_config.tokens["null"]
    drawn.input_ids, drawn.labels = drop_text(drawn.input_ids, starts, first, null, keep, drawn.labels)


def first_of_sample(starts: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Column ``(K,)`` where the samples of the positions ``starts`` ``(K, 2)`` begin: padding may lie on the left, and
    packed samples before them."""
    rows, columns = starts.unbind(1)
    if position_ids is not None:
        return columns - position_ids[rows, columns]
    return torch.zeros_like(columns) if mask is None else mask.to(torch.int64).argmax(1)[rows]


def _write_vocabulary(model: HeadModel, drawn: DrawnImages, places: Tensor) -> None:
    """Codes as ids in the placeholders, and for each codebook the labels of its codes."""
    offsets = vocabulary_offsets(model.visual_config, model.image_tokenizer).to(drawn.codes.device)
    rows, columns = places[..., 0], places[..., 1]
    drawn.input_ids = drawn.input_ids.clone()
    drawn.input_ids[rows, columns] = drawn.read + offsets
    if drawn.labels is None:
        return
    targets = (drawn.codes + offsets).masked_fill(~drawn.learned[:, None], IGNORE)
    for block in code_blocks(model.image_tokenizer):
        labels = drawn.code_labels.setdefault(block.book, torch.full_like(drawn.labels, IGNORE))
        part = slice(block.start, block.start + block.number)
        labels[rows[:, part], columns[:, part]] = targets[:, part]


def scale_mask(
    model: HeadModel,
    drawn: DrawnImages,
    mask: Tensor | None,
    position_ids: Tensor | None,
    dtype: torch.dtype,
    scales: tuple[int, ...],
) -> Tensor:
    """Attention ``(B, 1, T, T)``, added to the scores: causal, full within a scale. Rows may hold several images.

    Raises `ConfigError` for packed rows and for attention kernels that take no mask.
    """
    kernel = getattr(model.config.get_text_config(), "_attn_implementation", None) or "sdpa"
    if kernel not in ("sdpa", "eager"):
        raise ConfigError(f"a next_scale head needs attention: sdpa or eager in the stage (it has {kernel})")
    if position_ids is not None and bool((position_ids[:, 1:] == 0).any()):
        raise ConfigError("a next_scale head cannot train on packed rows; set packing: false")
    batch, length = drawn.input_ids.shape
    keep = torch.ones(batch, length, device=drawn.input_ids.device) if mask is None else mask
    visible = torch.ones(length, length, dtype=torch.bool, device=keep.device).tril() & keep.bool()[:, None, :]
    for row, column in drawn.starts.tolist():
        start = torch.tensor([column + 1], device=keep.device)
        visible[row] |= next_scale_mask(keep[row : row + 1], start, scales)[0]
    visible |= torch.eye(length, dtype=torch.bool, device=keep.device)  # a padded query must see something
    return torch.zeros(visible.shape, dtype=dtype, device=keep.device).masked_fill(~visible, torch.finfo(dtype).min)[
        :, None
    ]


def code_losses(model: HeadModel, drawn: DrawnImages, hidden: Tensor, items: Tensor | float) -> HeadLoss:
    """Loss of the codes (weighted, a sum divided by ``items``) and the mean cross-entropy per code of each codebook.

    Every supervised placeholder counts as one token: a position with several codes counts their mean.
    """
    config, head, tokenizer = model.visual_config, model.visual_head, model.image_tokenizer
    weight = {name: config.weights.get(name, 1.0) for name in tokenizer.codebooks}
    number = drawn.learned.sum()
    report: dict[str, Tensor] = {}
    total = hidden.new_zeros((), dtype=torch.float32)
    if not head.has_weights:
        for name, labels in drawn.code_labels.items():
            loss = model.token_loss(hidden, labels, 1)
            total = total + weight[name] * loss / items
            report[name] = loss.detach() / (labels != IGNORE).sum().clamp(min=1)
        return HeadLoss(total, report)
    rows, columns = drawn.starts.unbind(1)
    slots = columns[:, None] + torch.arange(head.num_steps, device=hidden.device)
    states = hidden[rows[:, None], slots]
    share = drawn.num_slots / head.num_codes
    for name, losses in head.code_losses(states, drawn.codes, tokenizer).items():
        losses = losses * drawn.learned[:, None]
        counted = losses if drawn.counts is None else losses * of_book(drawn.counts, name, tokenizer)
        total = total + weight[name] * share * counted.sum() / items
        report[name] = losses.sum().detach() / (number * losses.shape[1]).clamp(min=1)
    return HeadLoss(total, report)


def of_book(packed: Tensor, name: str, tokenizer: VisualTokenizer) -> Tensor:
    """One codebook's part of ``(K, S)``, in the order of its losses."""
    blocks = [block for block in code_blocks(tokenizer) if block.book == name]
    return torch.cat([packed[:, block.start : block.start + block.number] for block in blocks], 1)
