"""When does a stage take features from disk, and who computes them first?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from mllm import distributed
from mllm.data.dataset import DataStream
from mllm.errors import AlignmentError, ConfigError, DataError, UnavailableError
from mllm.processing.chat import encode_sample
from mllm.processing.image_processor import MllmImageProcessor
from mllm.processing.protocol import Processor
from mllm.recipe import StageSpec
from mllm.train.data import StageData
from mllm.train.features.cache import (
    CachedImageProcessor,
    CachedProcessor,
    FeaturesInPlaceOfPixels,
    check_space,
    estimate,
    fill,
    joining,
    most_views,
    open_stores,
    view_keys,
    why_not,
)
from mllm.train.observe.progress import StageDisplay
from mllm.train.prepare import DTYPES

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

MAX_ATTEMPTS = 100


def use_cache(
    stage: StageSpec,
    data: StageData,
    model: MllmForConditionalGeneration,
    processor: Processor,
    learning: set[str],
    display: StageDisplay,
    stack: ExitStack,
) -> bool:
    """Let the stage read features instead of pictures, if it asks for that; compute missing ones now. Returns whether it does.

    Raises `ConfigError` or `UnavailableError` with the reason when it cannot, unless ``cache_features`` is auto.
    """
    if not stage.cache_features:
        return False
    automatic = stage.cache_features == "auto"
    problem = why_not(model, learning)
    if problem is not None:
        if automatic:
            display.print(f"features are not cached: {problem}")
            return False
        raise ConfigError(f"stages.{stage.name}.cache_features: {problem}; set it to auto, or leave it out")
    dtype = stage.dtype if stage.cache_features in (True, "auto") else str(stage.cache_features)
    stores = open_stores(model, dtype, resampler=processor.image_processor.resampler)
    images, views = list(_images(data)), most_views(model.model.rules)
    total = int(distributed.sum_numbers([len(images)])[0])
    try:
        check_space(stores, total, views)
    except UnavailableError as error:
        if automatic:
            display.print(f"features are not cached: {error}")
            return False
        raise UnavailableError(f"stages.{stage.name}.{error}") from None
    size = estimate(stores, total, views) / 1e9
    display.print(f"features of {total:,} pictures as {dtype}: at most {size:.2f} GB in {stores_folder(stores)}")
    display.start(len(images), what="features")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        display.update(done, None)

    original = processor.image_processor
    stored, failed = fill(
        model, stores, images, resampler=original.resampler, max_pixels=original.max_pixels, progress=advance
    )
    display.close()
    if failed:
        _fill_replacements(data, model, stores, original)
    stored, failed = (int(n) for n in distributed.sum_numbers([stored, failed]))
    for store in stores.values():
        store.close()
        store.refresh()
    display.print(f"{stored:,} newly computed, {total - stored - failed:,} there already, {failed:,} cannot be decoded")
    reader = CachedImageProcessor(
        stores, dict(model.model.pixel_keys), DTYPES[stage.dtype], model.model.rules, joining(model)
    )
    cached: Any = CachedProcessor(processor, reader)
    assert isinstance(data.stream, DataStream)  # a recipe with shards and cache_features is refused
    data.stream.dataset.encode = partial(encode_sample, cached, max_length=stage.max_length)
    stack.enter_context(FeaturesInPlaceOfPixels(model))
    return True


def _fill_replacements(
    data: StageData, model: MllmForConditionalGeneration, stores: dict[str, Any], image_processor: MllmImageProcessor
) -> None:
    """A row whose picture cannot be decoded is replaced by the next good one of its dataset: store that one's too."""
    for draw in data.draws():
        for attempt in range(MAX_ATTEMPTS):
            row = data.mixture.substitute(draw, attempt).row if attempt else draw.row
            try:
                images = data.mixture.sources[draw.dataset][row].images
                keys = [view_keys(image, model.model.rules, together=joining(model)) for image in images]
            except (DataError, AlignmentError):
                continue
            fill(model, stores, images, resampler=image_processor.resampler, max_pixels=image_processor.max_pixels)
            if all(key in stores[name] for found in keys for name in stores for key in found[name]):
                break


def stores_folder(stores: dict[str, Any]) -> str:
    return str(next(iter(stores.values())).folder.parent)


def _images(data: StageData) -> Iterator[Any]:
    """The pictures of this process's samples, each file once."""
    seen: set[tuple[int, int]] = set()
    files: set[str] = set()
    for draw in data.draws():
        if (draw.dataset, draw.row) in seen:
            continue
        seen.add((draw.dataset, draw.row))
        try:
            images = data.mixture.sources[draw.dataset][draw.row].images
        except (DataError, AlignmentError):
            continue
        for image in images:
            if isinstance(image, str):
                if image in files:
                    continue
                files.add(image)
            yield image
