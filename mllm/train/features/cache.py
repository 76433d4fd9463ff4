"""How are frozen encoders run once per picture instead of once per epoch?

Features are kept on disk by the hash of the picture's bytes and, where it is seen in several views, of the view, in one store
per encoder, whose name is the hash of everything that decides its features: weights, config, plug-in code, transform, dtype. A
store is a set of shards; a shard has one writer, a data file and an index that is appended to only after the data are on disk, so a
kill leaves nothing half-written behind and any number of readers may look on. Stages, runs and recipes share the stores.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mllm.config import to_plain
from mllm.encoders.multiview import ViewsEncoder
from mllm.errors import ConfigError, DataError, UnavailableError
from mllm.plugins import code_hashes
from mllm.processing.images import image_size, load_image
from mllm.processing.layout import IMAGE_SIZES, VIDEO_TIMES, LayoutRules
from mllm.processing.protocol import Processor
from mllm.processing.views.base import WHOLE
from mllm.processing.views.pixels import to_view_pixels
from mllm.train.checkpoint.resume import fingerprint
from mllm.train.features.films import film_keys, film_pixels, picture_key, times_of
from mllm.types import VisionFeatures

if TYPE_CHECKING:
    from mllm.models.modeling_mllm import MllmForConditionalGeneration

_RECORD = struct.Struct("<32sIQI")  # key, place of the shard's row, bytes of the data file after it, checksum
_BLOCK = 64  # features that share one int8 scale: per-token scales ruin tokens with one large channel
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_AS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""What a store's address calls its type: stores of earlier versions are found again."""


def cache_root() -> Path:
    """Where stores lie: ``$MLLM_CACHE/features``, by default below ``~/.cache/mllm``."""
    return Path(os.environ.get("MLLM_CACHE", "~/.cache/mllm")).expanduser() / "features"


class Codec(NamedTuple):
    """Features ``(N, D)`` ↔ bytes. int8: absolute maximum per block of 64 channels, scales in fp32."""

    dtype: str
    tokens: int
    width: int

    @property
    def size(self) -> int:
        """Bytes of one picture's features."""
        if self.dtype == "int8":
            return self.tokens * (self._blocks * _BLOCK + 4 * self._blocks)
        return self.tokens * self.width * (4 if self.dtype == "float32" else 2)

    @property
    def _blocks(self) -> int:
        return -(-self.width // _BLOCK)

    def encode(self, features: Tensor) -> bytes:
        features = features.detach().cpu()
        if self.dtype != "int8":
            return features.to(_DTYPES[self.dtype]).contiguous().view(torch.uint8).numpy().tobytes()
        padded = torch.nn.functional.pad(features.float(), (0, self._blocks * _BLOCK - self.width))
        blocks = padded.view(self.tokens, self._blocks, _BLOCK)
        scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        values = (blocks / scales).round().to(torch.int8)
        return values.numpy().tobytes() + scales.float().numpy().tobytes()

    def decode(self, data: bytes | memoryview) -> Tensor:
        """``(N, D)`` in the stored type; fp32 for int8."""
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if self.dtype != "int8":
            return raw.view(_DTYPES[self.dtype]).view(self.tokens, self.width)
        cut = self.tokens * self._blocks * _BLOCK
        values = raw[:cut].view(torch.int8).view(self.tokens, self._blocks, _BLOCK)
        scales = raw[cut:].view(torch.float32).view(self.tokens, self._blocks, 1)
        return (values * scales).view(self.tokens, -1)[:, : self.width].contiguous()


class FeatureStore:
    """One encoder's features by picture. ``add`` appends to a shard of this process alone; ``refresh`` sees others' work."""

    def __init__(self, folder: Path, codec: Codec, about: dict[str, Any]):
        self.folder, self.codec = folder, codec
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / "store.json"
        if not marker.is_file():
            temporary = folder / f".store-{uuid.uuid4().hex}"
            temporary.write_text(json.dumps({**about, **codec._asdict()}, indent=1), encoding="utf-8")
            temporary.replace(marker)
        self._rows: dict[bytes, tuple[str, int]] = {}
        self._read: dict[str, int] = {}
        self._maps: dict[str, np.memmap] = {}
        self._writer: tuple[str, Any, Any, int] | None = None
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_writer": None}  # workers open the files themselves

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def refresh(self) -> None:
        """Read what has been added to any shard's index; a last record that is cut or wrong is left for later."""
        for path in sorted(self.folder.glob("*.index")):
            size = self.folder / f"{path.stem}.data"
            available = size.stat().st_size if size.is_file() else 0
            with path.open("rb") as stream:
                stream.seek(self._read.get(path.stem, 0))
                while len(record := stream.read(_RECORD.size)) == _RECORD.size:
                    key, row, end, check = _RECORD.unpack(record)
                    if check != zlib.crc32(record[:-4]) or end > available:
                        break
                    self._rows.setdefault(key, (path.stem, row))
                    self._read[path.stem] = self._read.get(path.stem, 0) + _RECORD.size

    def get(self, key: bytes) -> Tensor:
        """Features ``(N, D)``. Raises KeyError for a picture that is not stored."""
        shard, row = self._rows[key]
        start, end = row * self.codec.size, (row + 1) * self.codec.size
        mapped = self._maps.get(shard)
        if mapped is None or len(mapped) < end:
            mapped = self._maps[shard] = np.memmap(self.folder / f"{shard}.data", dtype=np.uint8, mode="r")
        return self.codec.decode(mapped[start:end].tobytes())

    def add(self, items: Iterable[tuple[bytes, Tensor]]) -> None:
        """Store features ``(N, D)`` by key: data first, flushed to disk, then their index."""
        if self._writer is None:
            name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._writer = (
                name,
                (self.folder / f"{name}.data").open("xb"),
                (self.folder / f"{name}.index").open("xb"),
                0,
            )
        name, data, index, row = self._writer
        records = []
        for key, features in items:
            encoded = self.codec.encode(features)
            assert len(encoded) == self.codec.size, (len(encoded), self.codec)
            data.write(encoded)
            head = struct.pack("<32sIQ", key, row, (row + 1) * self.codec.size)
            records.append(head + struct.pack("<I", zlib.crc32(head)))
            row += 1
        data.flush()
        os.fsync(data.fileno())
        index.write(b"".join(records))
        index.flush()
        self._writer = (name, data, index, row)

    def close(self) -> None:
        if self._writer is not None:
            self._writer[1].close()
            self._writer[2].close()
            self._writer = None


def view_keys(
    image: Any, rules: LayoutRules, *, where: str = "image", together: Collection[str] = ()
) -> dict[str, list[bytes]]:
    """Encoder → the key of each view that it has of a picture; the picture's own for one that is seen as a whole. Of a video each frame
    has one, which in the encoders ``together`` hangs on all frames that are seen with it."""
    if rules.video is not None:
        return film_keys(image, rules, together, where=where)
    key = picture_key(image, where=where)
    if not rules.needs_size:
        return {name: [key] for name in rules.images}
    return {
        name: [
            key if view == WHOLE else hashlib.blake2b(key + repr(view).encode(), digest_size=32).digest()
            for view in views
        ]
        for name, views in rules.view_boxes(image_size(image, where=where)).items()
    }


class CachedImageProcessor:
    """Stands where a processor's image processor stands: pictures → stored features ``(views, N, D)`` under the batch keys of
    their encoders' pixels. Raises `DataError` for a picture that could not be stored (it cannot be decoded)."""

    def __init__(
        self,
        stores: dict[str, FeatureStore],
        keys: dict[str, str],
        dtype: torch.dtype,
        rules: LayoutRules,
        together: Collection[str] = (),
    ):
        self.stores, self.keys, self.dtype, self.rules, self.together = stores, keys, dtype, rules, together
        self.experts: tuple[str, ...] = ()

    def __call__(self, images: Sequence[Any], **_: Any) -> dict[str, Tensor]:
        hashes = [
            view_keys(image, self.rules, where=f"image {k}", together=self.together) for k, image in enumerate(images)
        ]
        result = {}
        if self.rules.video is not None:
            result[VIDEO_TIMES] = times_of(images, self.rules)
        if self.rules.needs_size:
            sizes = [image_size(image, where=f"image {k}") for k, image in enumerate(images)]
            result[IMAGE_SIZES] = torch.tensor(sizes, dtype=torch.long)
        for name, store in self.stores.items():
            rows = []
            for k, key in ((k, key) for k, keys in enumerate(hashes) for key in keys[name]):
                if key not in store:
                    store.refresh()
                if key not in store:
                    raise DataError(f"image {k}: has no stored features; it could not be decoded, or was changed since")
                rows.append(store.get(key).to(self.dtype))
            result[self.keys[name]] = torch.stack(rows)
        return result


class CachedProcessor:
    """A processor whose pictures come from the cache; all else is the processor's own."""

    def __init__(self, processor: Processor, image_processor: CachedImageProcessor):
        self.processor, self.image_processor = processor, image_processor

    def __getattr__(self, name: str) -> Any:
        if name in ("processor", "image_processor"):  # while unpickling
            raise AttributeError(name)
        return getattr(self.processor, name)


def why_not(model: MllmForConditionalGeneration, learning: Iterable[str]) -> str | None:
    """Why a model's features cannot be cached in a stage, None when they can. learning: the stage's parts."""
    bank = getattr(getattr(model, "model", model), "vision_tower", None)
    if bank is None:
        return "the model has no encoder"
    learning_encoders = [part for part in learning if part.startswith("encoders.")]
    if learning_encoders:
        return f"{learning_encoders[0]} learns, so its features change"
    if bank.experts:
        return "the model routes pictures to experts"
    rules = getattr(getattr(model, "model", model), "rules", None)
    if rules is not None and rules.native:
        return "pictures have as many features as their size gives (views native)"
    if rules is not None and rules.shares:
        return "how a picture is seen depends on its neighbours (views.max_sample_tokens, or several: whole)"
    film = rules is not None and rules.video is not None and not rules.needs_size
    if rules is not None and rules.video is not None and rules.needs_size:
        return "the model takes video, and its pictures in tiles"
    for name, encoder in bank.encoders.items():
        if encoder.joins_views and not film:
            return f"in encoder {name} the views of a picture see each other"
        if encoder.joins_views and not isinstance(encoder, ViewsEncoder):
            return f"encoder {name} makes features of several frames together"
    if getattr(bank, "with_attention", None):
        return "the connector reads an encoder's attention maps"
    for name, info in bank.infos.items():
        if info.image.points:
            return f"encoder {name} reads where the scene lies, which a picture alone does not tell"
        if info.image.cameras:
            return f"encoder {name} reads the cameras of frames, which their pictures alone do not tell"
    for name, source in getattr(bank, "reads", {}).items():
        return f"encoder {name} reads the features of {source}"
    for name, encoder in bank.encoders.items():
        if getattr(encoder.config, "keep_prefix", False):
            return f"encoder {name} hands on prefix tokens"
    return None


def open_stores(
    model: MllmForConditionalGeneration, dtype: str, *, resampler: Any = "pil", root: Path | None = None
) -> dict[str, FeatureStore]:
    """A store for every encoder of a model, by what decides its features. resampler: what pictures are scaled with."""
    bank = model.model.vision_tower
    stores = {}
    for name, encoder in bank.encoders.items():
        info = bank.infos[name]
        requires_grad = [p.requires_grad for p in encoder.parameters()]
        assert not any(requires_grad), name
        computed = str(next(encoder.parameters(), torch.empty(0)).dtype)
        about = {"config": to_plain(encoder.config), "weights": fingerprint(encoder), "computed in": computed}
        about |= {"image": to_plain(info.image), "resampler": str(resampler)}
        if code := code_hashes(type(module) for module in encoder.modules()):
            about["code"] = code
        address = json.dumps([about, _STORED_AS.get(dtype, dtype)], sort_keys=True)
        digest = hashlib.sha256(address.encode()).hexdigest()[:32]
        codec = Codec(dtype, info.num_tokens, info.width)
        stores[name] = FeatureStore((root or cache_root()) / digest, codec, about)
    return stores


def most_views(rules: LayoutRules) -> dict[str, int]:
    """Encoder → the most views that it may have of one picture."""
    layout = rules.longest()
    return {name: layout.rows_of(name) for name in rules.images}


def joining(model: MllmForConditionalGeneration) -> frozenset[str]:
    """The encoders in which the frames of a video see each other."""
    return frozenset(name for name, encoder in model.model.vision_tower.encoders.items() if encoder.joins_views)


def estimate(stores: dict[str, FeatureStore], pictures: int, views: Mapping[str, int] | None = None) -> int:
    """Bytes that so many pictures take at most. views: as `most_views` gives them; None: one each."""
    return pictures * sum(store.codec.size * (1 if views is None else views[name]) for name, store in stores.items())


def check_space(stores: dict[str, FeatureStore], pictures: int, views: Mapping[str, int] | None = None) -> None:
    """Raises `UnavailableError` when the disk cannot hold the features, with both numbers."""
    needed = estimate(stores, pictures, views)
    folder = next(iter(stores.values())).folder
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise UnavailableError(
            f"cache_features: {pictures:,} pictures need {needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are "
            "free; set MLLM_CACHE to a larger disk, cache_features: int8, or leave it out"
        )


@torch.no_grad()
def fill(
    model: MllmForConditionalGeneration,
    stores: dict[str, FeatureStore],
    images: Iterable[Any],
    *,
    resampler: Any = "pil",
    max_pixels: int | None = None,
    batch_size: int = 32,
    progress: Any = None,
) -> tuple[int, int]:
    """Compute and store what is missing of these pictures; returns (stored, could not be decoded). progress: called with 1 for
    every picture looked at."""
    bank, rules, together = model.model.vision_tower, model.model.rules, joining(model)
    specs = {name: info.image for name, info in bank.infos.items()}
    seen: set[bytes] = set()
    pending: dict[str, list[tuple[bytes, Tensor]]] = {name: [] for name in specs}
    stored = failed = waiting = 0

    def flush() -> None:
        nonlocal stored, waiting
        for name, store in stores.items():
            encoder = bank.encoders[name]
            parameter = next(encoder.parameters(), torch.empty(0))
            while rows := pending[name][:batch_size]:
                pixels = torch.stack([row for _, row in rows]).to(parameter.device, parameter.dtype)
                features = encoder(pixels).tokens
                store.add((key, tokens) for (key, _), tokens in zip(rows, features) if key not in store)
                del pending[name][:batch_size]
        stored, waiting = stored + waiting, 0

    for number, image in enumerate(images):
        try:
            keys = view_keys(image, rules, where=f"image {number}", together=together)
            lead = b"".join(keys[name][-1] for name in keys)
            absent = lead not in seen and not all(key in stores[name] for name in stores for key in keys[name])
            if absent and rules.video is not None:
                seen.add(lead)
                rows_of = film_pixels(
                    image, rules, specs, resampler=resampler, max_pixels=max_pixels, where=f"image {number}"
                )
                for name in specs:
                    found = zip(keys[name], rows_of[name], strict=True)
                    if name not in together:
                        pending[name] += {key: row for key, row in found if key not in stores[name]}.items()
                        continue
                    parameter = next(bank.encoders[name].parameters())
                    pixels = torch.stack(rows_of[name]).to(parameter.device, parameter.dtype)
                    scene = torch.zeros(len(pixels), dtype=torch.long, device=parameter.device)
                    features = bank.encoders[name](pixels, scene_ids=scene).tokens
                    stores[name].add(zip(keys[name], features, strict=True))
                waiting += 1
            elif absent:
                seen.add(lead)
                picture = load_image(image, where=f"image {number}", max_pixels=max_pixels)
                views = rules.view_boxes((picture.height, picture.width))
                for name, rows in to_view_pixels(picture, specs, views, resampler=resampler).items():
                    pending[name] += zip(keys[name], rows, strict=True)
                waiting += 1
        except DataError:
            failed += 1
        if max(map(len, pending.values())) >= batch_size:
            flush()
        if progress is not None:
            progress(1)
    flush()
    for store in stores.values():
        store.refresh()
    return stored, failed


class FeaturesInPlaceOfPixels:
    """While open, a model's encoders take features ``(B, N, D)`` where they take pixels, and give zeros for the black pictures with
    which text-only batches keep processes in step. Names and state stay as they are."""

    def __init__(self, model: MllmForConditionalGeneration):
        self.bank = model.model.vision_tower

    def __enter__(self) -> FeaturesInPlaceOfPixels:
        for name, encoder in self.bank.encoders.items():
            encoder.forward = _PassOn(encoder, self.bank.infos[name])
        return self

    def __exit__(self, *exception: Any) -> None:
        for encoder in self.bank.encoders.values():
            encoder.__dict__.pop("forward", None)


class _PassOn:
    def __init__(self, encoder: nn.Module, info: Any):
        self.shape = (info.num_tokens, info.width)
        self.grid = info.grid

    def __call__(self, pixels: Tensor, **_: Any) -> VisionFeatures:
        if pixels.dim() == 4:
            return VisionFeatures(pixels.new_zeros(len(pixels), *self.shape), self.grid)
        if tuple(pixels.shape[1:]) != self.shape:
            raise ConfigError(f"stored features have shape {tuple(pixels.shape[1:])}, this encoder gives {self.shape}")
        return VisionFeatures(pixels, self.grid)
