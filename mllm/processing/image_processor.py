"""How does one image become the pixels of every encoder?"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from mllm.door import AUTO_MAP, SavesDoor
from mllm.errors import ConfigError, DataError
from mllm.processing.codes import read_codes
from mllm.processing.frames import video_spec
from mllm.processing.images import image_size, load_image, to_pixels_multi
from mllm.processing.known_cameras import frame_cameras, with_cameras, without_cameras
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules
from mllm.processing.pixel_keys import PixelKeys
from mllm.processing.questions import pad_questions
from mllm.processing.scene_points import frame_points, unknown_points
from mllm.processing.settings_in_call import refuse_unread
from mllm.processing.videos import Seen, frames_of, named
from mllm.processing.views.base import views_config
from mllm.processing.views.pixels import to_view_pixels
from mllm.routers.fixed import fixed_weights, fixed_weights_of
from mllm.types import ImageSpec, Video, ViewLayout, VisualLayout

_log = logging.getLogger(__name__)


class MllmImagesKwargs(ImagesKwargs, total=False):
    """Per-call settings. experts: names of the experts to run, or name → weight, for all images or one entry per image; None:
    the model's router decides.
    router_input_ids: for each image, the token ids of the question a router reads; routing_pass: mark the images as
    those of a routing request, which vLLM shortens; picture_key: for each image, a number by which a server asks later who
    looked at it; visual_tokens: most that each image may take, where a sample has a
    budget."""

    experts: Any
    router_input_ids: Any
    routing_pass: Any
    picture_key: Any
    visual_tokens: Any


class MllmImageProcessor(SavesDoor, BaseImageProcessor):
    """One picture → one pixel tensor per encoder, each at its own size and normalisation.

    encoders: name → `ImageSpec`, in the model's order; layout: what the connector makes of one view; views: the way of
    looking (None: the whole picture once); video: which frames of a video are seen (None: it takes none); experts: routed encoders;
    code_encoders: those that read stored codes in place of pixels; code_source: fingerprint of the tokenizer such codes must
    be from; resampler: ``pil`` (exactly the published preprocessing) or ``torch`` (about twice as fast, within 2 of 255 levels of it).
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = MllmImagesKwargs

    def __init__(
        self,
        encoders: Mapping[str, Any] | None = None,
        encoder_order: Sequence[str] | None = None,
        layout: Any = None,
        views: Any = None,
        video: Any = None,
        experts: Sequence[str] = (),
        code_encoders: Sequence[str] = (),
        code_source: str | None = None,
        resampler: Literal["pil", "torch"] = "pil",
        max_pixels: int = 100_000_000,
        max_images: int = 1000,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        # JSON files are written with sorted keys; the first encoder's pixels have a name of their own, so order is kept apart.
        self.encoder_order = list(encoder_order if encoder_order is not None else encoders or {})
        self.encoders = {name: _plain((encoders or {})[name]) for name in self.encoder_order}
        self.layout = _plain(layout or {"num_tokens": 0, "grid": (0, 0)})
        self.views = None if views is None else _plain(views)
        self.video = None if video is None else _plain(video)
        self.experts = list(experts)
        self.code_encoders, self.code_source = list(code_encoders), code_source
        self.resampler, self.max_pixels, self.max_images = resampler, max_pixels, max_images
        self.model_input_names = [
            *self.pixel_keys.values(),
            *([IMAGE_SIZES] if self.rules.needs_size else []),
            *([VIDEO_TIMES] if self.video is not None else []),
            *(["expert_weights"] if self.experts else []),
        ]

    @property
    def specs(self) -> dict[str, ImageSpec]:
        """Encoder name → the pixels it expects."""
        return {name: ImageSpec.model_validate(spec) for name, spec in self.encoders.items()}

    @property
    def pixel_keys(self) -> PixelKeys:
        """Encoder name → key of its pixels in the output."""
        return PixelKeys(self.encoders)

    @property
    def rules(self) -> LayoutRules:
        """How an image is looked at and lies in the sequence."""
        written = json.dumps([self.layout, self.views, self.encoders, self.encoder_order, self.video], default=list)
        return _rules(written)

    def image_layouts(
        self,
        images: Sequence[Any],
        *,
        where: str = "sample",
        write: Callable[[str], list[int]] | None = None,
        visual_tokens: int = 0,
    ) -> list[VisualLayout]:
        """The tokens of every image; of its file only the header is read, and only where the size matters; of a video's file the index.

        Args:
            images: files, pictures or videos, in order.
            where: what an error begins with.
            write: a text's token ids, for what is written before frames.
            visual_tokens: most that each may take (0: what the model's views allow).

        Returns:
            One layout an image.

        Raises:
            DataError: an image cannot be read, or all together exceed the sample's budget.
        """
        rules = self.rules
        if any(isinstance(image, Video) for image in images):
            return [self._visual_layout(image, f"{where}, image {k}", write) for k, image in enumerate(images)]
        if not rules.needs_size:
            return rules.layouts(images)
        try:
            limit = rules.share(len(images), visual_tokens)
            sizes = [image_size(image, where=f"{where}, image {k}") for k, image in enumerate(images)]
            layouts = [rules.layout(size, limit) for size in sizes]
        except DataError as error:
            raise (
                error if str(error).startswith(where) else DataError(f"{where}: {len(images)} images: {error}")
            ) from error
        budget = rules.sample_budget
        if budget is not None and any(rules.layout(size) != found for size, found in zip(sizes, layouts)):
            _tell_reduction(budget)
        return layouts

    def _visual_layout(self, image: Any, where: str, write: Callable[[str], list[int]] | None) -> VisualLayout:
        """The tokens of a picture or a video beside which there is a video."""
        if not isinstance(image, Video):
            (layout,) = self.image_layouts([image], where=where)
            return layout
        seen = self._seen(image, where)
        times = seen.chosen.milliseconds
        return self.rules.timed_layout(times, write) if write else self.rules.video_layout(len(times))

    def _seen(self, video: Video, where: str) -> Seen:
        """A video's chosen frames, none of them decoded. Raises `DataError` in a model that takes no video."""
        if self.rules.video is None:
            raise DataError(
                f"{where} is a video, and this model takes none: its config has no video section (model.video: {{frames: 16}})"
            )
        return frames_of(video, self.rules.video, where=where, max_pixels=self.max_pixels)

    def _video_pixels(self, seen: Seen, video: Video, where: str) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
        """Every encoder's ``(F, 3, H, W)``, frame by frame of those that it is given (the last one repeated where the connector takes
        several together), and the frames' (height, width)."""
        specs, count, size = self.specs, len(seen.chosen.numbers), (1, 1)
        layout = self.rules.video_layout(count)
        given = {name: layout.frames_of(name) for name in specs}
        rows = {name: [torch.empty(0)] * len(frames) for name, frames in given.items()}
        for places, picture in seen.pictures():
            size = (picture.height, picture.width)
            wanted = {n: spec for n, spec in specs.items() if not (spec.points or set(places).isdisjoint(given[n]))}
            for name, pixels in to_pixels_multi(picture, wanted, resampler=self.resampler).items():  # type: ignore[arg-type]
                for row, frame in enumerate(given[name]):
                    if min(frame, count - 1) in places:
                        rows[name][row] = pixels
        found = {name: torch.stack(pixels) for name, pixels in rows.items() if not specs[name].points}
        for name, spec in specs.items():
            shown, beside = (
                [seen.chosen.numbers[min(frame, count - 1)] for frame in given[name]],
                f"{where}: encoder {name}",
            )
            if spec.points:
                found[name] = frame_points(video, shown, seen.clip.count, spec, where=beside)
            elif spec.cameras:
                cameras = frame_cameras(video, shown, seen.clip.count, spec, size=size, where=beside)
                found[name] = with_cameras(found[name], cameras)
        return {name: found[name] for name in specs}, size

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Read what a conversation names.

        Args:
            image_url_or_urls: paths, bytes, pictures and videos, or lists of them; only http(s) addresses are fetched (by transformers).

        Returns:
            The same, as pictures.

        Raises:
            DataError: a picture cannot be read.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, Video):
            return image_url_or_urls
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith(("http://", "https://")):
            return super().fetch_images(image_url_or_urls)
        return load_image(image_url_or_urls, where="image", max_pixels=self.max_pixels)

    def preprocess(
        self,
        images: Any,
        experts: Any = None,
        return_tensors: Any = None,
        router_input_ids: Any = None,
        routing_pass: Any = None,
        picture_key: Any = None,
        visual_tokens: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pictures to pixels of every encoder.

        Args:
            images: one picture or nested lists of them; in a model that takes video also `Video`.
            experts: names of the experts to run, or name → weight, for all images or one entry per image; None: the model's router decides.
            return_tensors: as transformers takes it; tensors in any case.
            router_input_ids: for each image, the token ids of the question a router reads.
            routing_pass: mark the images as those of a routing request, which vLLM shortens.
            visual_tokens: most that each image may take, where a sample has a budget (default: an equal part for each picture of an inner
                list).
            kwargs: what transformers' image processors take besides (`refuse_unread`).

        Returns:
            ``pixel_values`` ``(V, 3, H, W)`` of the first encoder, the views of all B images, and ``pixel_values_<name>`` of the others;
            ``image_sizes`` ``(B, 2)``, (height, width), where the views depend on them, ``(B, 3)`` with each picture's share of a sample's
            budget where there is one; ``video_times`` ``(B, F)`` in a model that takes video.

        Raises:
            ConfigError: a setting that nothing reads.
            DataError: a picture cannot be used; its position is named.
        """
        refuse_unread(kwargs)
        if experts is not None and not self.experts:
            raise ConfigError(
                "experts: this model routes nothing, it runs every encoder on every picture; leave experts out"
            )
        flat = _flatten(images)
        if len(flat) > self.max_images:
            raise DataError(
                f"{len(flat)} images in one call; at most {self.max_images} are allowed (image processor's max_images)"
            )
        specs, rules = self.specs, self.rules
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in specs}
        sizes: list[tuple[int, int]] = []
        limits = [visual_tokens] * len(flat) if visual_tokens is not None else _shares(images, rules)
        times: list[list[int]] = []
        for position, image in enumerate(flat):
            where = f"image {position}"
            if isinstance(image, Video):
                where = f"visual {position}, {named(image)}"
                seen = self._seen(image, where)
                frames, size = self._video_pixels(seen, image, where)
                sizes.append(size)
                times.append(seen.chosen.milliseconds)
                for name, pixels in frames.items():
                    rows[name].append(pixels)
                continue
            times.append([])
            codes = read_codes(image, where=where, source=self.code_source) if self.code_encoders else None
            if codes is not None and rules.needs_size:
                raise DataError(f"{where} is given by its codes, but views {rules.views.type} need the picture itself")
            if codes is not None:
                others = [name for name in specs if name not in self.code_encoders]
                if others:
                    raise DataError(
                        f"{where} is given by its codes, but encoder {others[0]!r} needs pixels; give the picture itself"
                    )
                for name in specs:
                    rows[name].append(codes)
                continue
            picture = load_image(image, where=where, max_pixels=self.max_pixels)
            if rules.needs_size:
                sizes.append((picture.height, picture.width))
                views = rules.view_boxes(sizes[-1], limits[position])
                seen_in = to_view_pixels(picture, specs, views, resampler=self.resampler)  # type: ignore[arg-type]
                for name, pixels in without_cameras(seen_in, specs, where).items():
                    rows[name].append(pixels)
                continue
            pictured = {name: spec for name, spec in specs.items() if not spec.points}
            made = to_pixels_multi(picture, pictured, resampler=self.resampler)  # type: ignore[arg-type]
            made = without_cameras(made, specs, where)
            for name, pixels in (made | unknown_points(specs, where)).items():
                rows[name].append(pixels if rules.video is None else pixels.expand(rules.view.shown, *pixels.shape))
        join = _cat if rules.needs_size or rules.video is not None else stack_images
        pixels_by_name = {name: join(tensors) for name, tensors in rows.items() if tensors}
        data: dict[str, Any] = dict(self.pixel_keys.by_key(pixels_by_name))
        if rules.needs_size and flat:
            rows_of = [(*s, k) for s, k in zip(sizes, limits)] if rules.shares or any(limits) else sizes
            data[IMAGE_SIZES] = torch.tensor(rows_of, dtype=torch.long)
        if rules.video is not None and flat:
            longest = max(1, *map(len, times)) if times else 1
            data[VIDEO_TIMES] = torch.tensor([row + [-1] * (longest - len(row)) for row in times], dtype=torch.long)
        if self.experts and flat:
            data["expert_weights"] = fixed_weights_of(experts, self.experts, len(flat))
            if router_input_ids is not None:
                data["router_input_ids"] = pad_questions(router_input_ids)
            if routing_pass is not None:
                data["routing_pass"] = torch.full((len(flat),), bool(routing_pass))
            if picture_key is not None:
                data["picture_key"] = torch.as_tensor(picture_key, dtype=torch.long)
        return BatchFeature(data, tensor_type=return_tensors)

    def expert_weights(self, experts: Any = None) -> torch.Tensor:
        """Weights of a routing by hand.

        Args:
            experts: as `mllm.routers.fixed.fixed_weights` reads them; None leaves the choice to the router.

        Returns:
            ``(1, E)``; NaN where the router chooses.

        Raises:
            ConfigError: an expert that the model does not have.
        """
        return fixed_weights(experts, self.experts)


def stack_images(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pixels or codes of several images as one tensor. Raises `DataError` for a mixture of the two."""
    if len({image.dim() for image in images}) > 1:
        raise DataError("some images are given as pictures and some as stored codes; one batch takes one kind")
    return images[0][None] if len(images) == 1 else torch.stack(list(images))  # one picture need not be copied


def _cat(views: Sequence[torch.Tensor]) -> torch.Tensor:
    return views[0] if len(views) == 1 else torch.cat(list(views))  # one picture's need not be copied


@lru_cache(maxsize=32)
def _rules(written: str) -> LayoutRules:
    layout, views, encoders, order, video = json.loads(written)
    images = {name: ImageSpec.model_validate(encoders[name]) for name in order}
    return LayoutRules(ViewLayout.model_validate(layout), images, views_config(views), video_spec(video))


def _shares(images: Any, rules: LayoutRules) -> list[int]:
    """For every picture, its share of its sample's budget. images: a list of samples' lists, or one sample's pictures."""
    nested = isinstance(images, (list, tuple)) and images and all(isinstance(item, (list, tuple)) for item in images)
    counts = [len(_flatten(item)) for item in images] if nested else [len(_flatten(images))]
    return [rules.share(count) for count in counts for _ in range(count)]


@lru_cache(maxsize=8)
def _tell_reduction(budget: int) -> None:
    """Said once: some samples' pictures are seen in fewer tokens."""
    _log.warning(
        "views: samples whose pictures take more than max_sample_tokens (%d) are seen in fewer tiles or patches", budget
    )


def _plain(spec: Any) -> Any:
    return spec.model_dump(mode="json") if hasattr(spec, "model_dump") else spec


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [flat for item in images for flat in _flatten(item)]
    return [images]
