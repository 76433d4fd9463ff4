"""What does the model really see? Batches of a stage, made as training makes them, taken apart for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mllm.data.collate import Batch, Dropped
from mllm.errors import ConfigError
from mllm.heads.build import head_configs
from mllm.models.build import config_and_processor, load_tokenizer
from mllm.processing.chat import IGNORE
from mllm.processing.frames import Chosen, choices_told
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules, visual_spans
from mllm.processing.protocol import Processor
from mllm.processing.template import for_training
from mllm.processing.turns import special_ids, template_notes
from mllm.processing.video_text import stamped
from mllm.recipe import Recipe, StageSpec
from mllm.train.data import StageData, open_mixture
from mllm.train.preflight.first_row import show_row, stop_line
from mllm.train.preflight.inspection_masks import MaskReader, SeenMask
from mllm.types import Grid, VisualLayout

if TYPE_CHECKING:
    from mllm.models.configuration_mllm import MllmConfig

KINDS = ("sft",)
"""Stage kinds whose samples are conversations that the model is trained to continue."""


@dataclass
class Run:
    """Tokens ``start`` … ``stop`` of a sample that are alike. kind: image, learned, masked or special; layout: an image's."""

    kind: str
    start: int
    stop: int
    text: str
    layout: VisualLayout | None = None


@dataclass
class Picture:
    """One view of a sample's image ``number``. pixels: encoder → what it is given, undone from normalisation; start: the
    image's first token; seconds: of a video's frame, from the video's start (None: a picture, or nothing tells)."""

    number: int
    view: int
    start: int
    layout: VisualLayout
    pixels: dict[str, Image.Image]
    seconds: float | None = None


@dataclass
class SeenSample:
    """One sample inside a row of ``row_length`` slots. positions: first and last position id; learned: what carries loss."""

    id: str
    dataset: str
    offset: int
    length: int
    positions: tuple[int, int]
    runs: list[Run]
    learned: str
    num_learned: int
    pictures: list[Picture]
    ids: list[int]
    truncated: bool
    masks: list[SeenMask] = field(default_factory=list)


@dataclass
class SeenRow:
    """One row of a batch."""

    slots: int
    samples: list[SeenSample]
    bounds: list[int] | None
    """Packed: where attention's segments begin and end in this row, padding's own included."""


@dataclass
class SeenStage:
    """What one stage's first batches hold. grids: encoder → (rows, columns, image height, image width)."""

    stage: StageSpec
    template: str
    rules: LayoutRules
    grids: dict[str, tuple[int, int, int, int]]
    rows: list[SeenRow] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    num_samples: int = 0
    marks: str | None = None
    """The encoder that masks are read from; None for a model that marks nothing."""
    first: Any = None
    """The first sample as `rich` text, what is learned green."""
    notes: list[str] = field(default_factory=list)
    """What to know of the chat template; where generation stops."""


def inspect_recipe(recipe: Recipe, *, num_samples: int = 8, stage: str | None = None) -> list[SeenStage]:
    """The first ``num_samples`` samples (whole rows) of every stage, or of one.

    Built without a model. Raises `ConfigError` for an unknown stage or one without conversations, and what reading the data
    raises.
    """
    from mllm.errors import UnknownName

    names = [s.name for s in recipe.stages]
    if stage is not None and stage not in names:
        raise UnknownName("stage", stage, names)
    chosen = [s for s in recipe.stages if s.kind in KINDS and stage in (None, s.name)]
    if not chosen:
        kinds = ", ".join(f"{s.name} ({s.kind})" for s in recipe.stages)
        raise ConfigError(f"stages: none of kind {' or '.join(KINDS)} to look at; this recipe has {kinds}")
    config, processor = config_and_processor(recipe.model, load_tokenizer(recipe.model.text_model))
    return [_look(recipe, s, config, processor, num_samples) for s in chosen]


def _look(recipe: Recipe, stage: StageSpec, config: MllmConfig, processor: Processor, num_samples: int) -> SeenStage:
    if stage.chat_template is not None:
        processor = for_training(processor, stage.chat_template)
    quiet = stage.model_copy(update={"num_workers": 0, "max_bad_share": 1.0})  # the page shows what is dropped
    data = StageData(quiet, processor, open_mixture(stage, recipe.seed), cache=Path(recipe.output_dir) / "lengths")
    infos = config.encoder_infos()
    grids = {name: (*info.grid, info.image.height, info.image.width) for name, info in infos.items()}
    seen = SeenStage(stage, processor.chat_template, processor.rules, grids)
    seen.marks = next(
        (head.encoder for head in head_configs(config.heads).values() if head.type == "segmentation"), None
    )
    seen.notes = [*template_notes(processor), stop_line(processor)]
    with choices_told() as choices:
        while seen.num_samples < num_samples:
            for micro in data.steps():
                for batch in micro:
                    if seen.num_samples < num_samples:
                        _add_batch(seen, batch, processor, num_samples, _seconds(batch, choices))
                if seen.num_samples >= num_samples:
                    break
            else:
                break  # the stage has no more
    return seen


def _seconds(batch: Batch, choices: Sequence[Chosen]) -> list[list[float]]:
    """Of each visual, when its frames are; [] for a picture and for a video of which nothing tells it, where the batch has the frames'
    numbers in place of times. choices: those that the batch was made by, among others."""
    untimed = {tuple(chosen.milliseconds) for chosen in choices if chosen.seconds is None}
    rows = [
        tuple(int(time) for time in row if int(time) >= 0)
        for row in batch.inputs.get(VIDEO_TIMES, [()] * int(batch.num_images.sum()))
    ]
    return [[] if row in untimed else [time / 1000 for time in row] for row in rows]


def _add_batch(
    seen: SeenStage, batch: Batch, processor: Processor, num_samples: int, seconds: Sequence[list[float]]
) -> None:
    seen.dropped += batch.dropped
    ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
    mask, positions = batch.inputs.get("attention_mask"), batch.inputs.get("position_ids")
    sizes, times = batch.inputs.get(IMAGE_SIZES), batch.inputs.get(VIDEO_TIMES)
    layouts = processor.rules.layouts(sizes, int(batch.num_images.sum()), times)
    if times is not None:
        layouts = [stamped(processor, batch.inputs, k) or layout for k, layout in enumerate(layouts)]
    spec = getattr(processor, "segments", None)
    reader = None if spec is None or seen.marks is None else MaskReader(spec, seen.marks, batch.inputs)
    sample = image = 0
    view = dict.fromkeys(processor.pixel_keys, 0)
    slots = ids.shape[1]
    for row, lengths in enumerate(batch.lengths):
        offset = 0 if mask is None else int(mask[row].argmax())
        shown = SeenRow(slots, [], _bounds(batch, row, slots))
        wanted = seen.num_samples < num_samples
        for length in lengths:
            count = int(batch.num_images[sample])
            if wanted:
                part = slice(offset, offset + length)
                if seen.first is None:
                    seen.first = show_row(ids[row, part].tolist(), labels[row, part].tolist(), processor)
                first = (
                    (0, length - 1)
                    if positions is None
                    else (int(positions[row, part][0]), int(positions[row, part][-1]))
                )
                shown.samples.append(
                    _sample(
                        batch,
                        sample,
                        layouts[image : image + count],
                        seconds[image : image + count],
                        dict(view),
                        ids[row, part],
                        labels[row, part],
                        offset,
                        first,
                        processor,
                    )
                )
                if reader is not None:
                    last = shown.samples[-1]
                    starts = [run.start for run in last.runs if run.layout is not None]
                    last.masks = reader.take(ids[row, part], labels[row, part], starts, last.pictures)
            for name in view:
                view[name] += sum(layout.rows_of(name) for layout in layouts[image : image + count])
            sample, image, offset = sample + 1, image + count, offset + length
        if wanted:
            seen.rows.append(shown)
            seen.num_samples += len(lengths)


def _bounds(batch: Batch, row: int, slots: int) -> list[int] | None:
    if batch.cu_seq_lens is None:
        return None
    low, high = row * slots, (row + 1) * slots
    return sorted({int(end) - low for end in batch.cu_seq_lens if low <= end <= high})


def _place_of(view: int, layout: VisualLayout, encoder: str) -> int | None:
    """Which of an encoder's pixels of a visual show a view; None: it is not given that view."""
    if layout.patches is not None:
        return 0
    if layout.rows_of(encoder) == layout.num_views:
        return view
    if layout.frames:
        return layout.frames_of(encoder).index(view) if view in layout.frames_of(encoder) else None
    return 0 if view == (layout.thumbnail or 0) else None  # encoders with fewer views have the thumbnail


def _sample(
    batch: Batch,
    sample: int,
    layouts: list[VisualLayout],
    seconds: Sequence[list[float]],
    first_views: dict[str, int],
    ids: Any,
    labels: Any,
    offset: int,
    positions: Any,
    processor: Processor,
) -> SeenSample:
    numbers, targets = ids.tolist(), labels.tolist()
    runs = _runs(numbers, targets, processor, visual_spans(ids, processor.image_token_id, layouts), layouts)
    pictures = []
    for number, run in enumerate(run for run in runs if run.layout is not None):
        assert run.layout is not None
        for view in range(run.layout.num_views):
            rows = {
                name: first + place
                for name, first in first_views.items()
                if (place := _place_of(view, run.layout, name)) is not None
            }
            pixels = _pixels(batch, rows, processor, run.layout.patches)
            times = seconds[number]
            when = times[min(view, len(times) - 1)] if times else None
            pictures.append(Picture(number, view, run.start, run.layout, pixels, when))
        first_views = {name: first + run.layout.rows_of(name) for name, first in first_views.items()}
    learned = [n for n in targets[1:] if n != IGNORE]  # the model never predicts a first token
    return SeenSample(
        id=batch.ids[sample],
        dataset=batch.datasets[sample],
        offset=offset,
        length=len(numbers),
        positions=positions,
        runs=runs,
        learned=processor.tokenizer.decode(learned),
        num_learned=len(learned),
        pictures=pictures,
        ids=numbers,
        truncated=batch.ids[sample] in batch.truncated,
    )


def _runs(
    ids: list[int], labels: list[int], processor: Processor, spans: list[tuple[int, int]], layouts: list[VisualLayout]
) -> list[Run]:
    """Neighbouring tokens of one kind, decoded together so that characters of several tokens stay whole. Every image is
    a run of its own."""
    special = special_ids(processor.tokenizer)
    images = {start: (stop, layout) for (start, stop), layout in zip(spans, layouts)}

    def kind(place: int) -> str:
        if labels[place] != IGNORE and place:
            return "learned"
        return "special" if ids[place] in special else "masked"

    runs: list[Run] = []
    place = 0
    while place < len(ids):
        if place in images:
            stop, layout = images[place]
            runs.append(Run("image", place, stop, "", layout))
        else:
            what, stop = kind(place), place + 1
            while stop < len(ids) and stop not in images and kind(stop) == what:
                stop += 1
            runs.append(Run(what, place, stop, processor.tokenizer.decode(ids[place:stop])))
        place = stop
    return runs


def _pixels(
    batch: Batch, rows: dict[str, int], processor: Processor, patches: Grid | None = None
) -> dict[str, Image.Image]:
    """Encoder → its pixels of one view as an 8-bit picture. Encoders that do not see the view, and experts that a batch
    carries no pixels for, are left out."""
    pictures, given = {}, processor.pixel_keys.by_encoder(batch.inputs)
    for name, spec in processor.image_processor.specs.items():
        if name not in given or name not in rows:
            continue
        if patches is not None:
            side, count = spec.patch or 1, patches[0] * patches[1]
            cells = given[name][rows[name] : rows[name] + count].reshape(*patches, 3, side, side)
            seen = cells.permute(2, 0, 3, 1, 4).reshape(3, patches[0] * side, patches[1] * side)
        else:
            seen = given[name][rows[name]][:3]
        values = seen.float().numpy().transpose(1, 2, 0) * np.array(spec.std) + np.array(spec.mean)
        pictures[name] = Image.fromarray((values * 255).round().clip(0, 255).astype(np.uint8))
    return pictures
