"""How are codes kept on disk, so that a model trains on them without pixels?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm.damage import naming_damage, read_json
from mllm.errors import CheckpointError, DataError
from mllm.modes import by_umask
from mllm.plugins import code_hashes
from mllm.types import VisualCodes
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.images import ImageSource, to_pixels

SHARD_SIZE = 4096
INDEX_FILE = "codes.json"


def fingerprint(tokenizer: VisualTokenizer, *, rounded: bool = False) -> str:
    """A hash of the config, the weights and of plug-in code: codes of one tokenizer mean nothing to another. rounded: of the weights in
    bfloat16, the same for a tokenizer and its copy in that type."""
    digest = hashlib.sha256(tokenizer.config.model_dump_json().encode())
    for sha256 in code_hashes(type(module) for module in tokenizer.modules()):
        digest.update(sha256.encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        if rounded and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode_images(
    tokenizer: VisualTokenizer,
    images: ImageSource,
    directory: str | Path,
    *,
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
    rank: int = 0,
    ranks: int = 1,
) -> int:
    """Write the codes of ``images`` as ``codes-00000.safetensors`` … of ``shard_size`` images; returns how many
    shards this call wrote. Finished shards are kept, so a call after an interruption goes on; ranks take every
    ``ranks``-th shard. Each shard records the contents of the images that it was made from.

    Raises `DataError` when the folder holds codes of another tokenizer, type (`run_in_bfloat16`), image number or shard
    size, or of other images: replaced, or in another order.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    index = {
        "tokenizer": fingerprint(tokenizer),
        "images": len(images),
        "shard_size": shard_size,
        "grid": list(tokenizer.grid),
        "scales": None if tokenizer.scales is None else list(tokenizer.scales),
        "codebooks": {name: list(size) for name, size in tokenizer.codebooks.items()},
        "dtype": tokenizer.compute_dtype,
    }
    file = directory / INDEX_FILE
    if file.is_file():
        found = {"dtype": "float32", **read_json(file)}
        different = [key for key in index if found.get(key) != index[key]]
        if different:
            raise DataError(f"{directory} holds other codes ({', '.join(different)} differ); choose another folder")
    else:
        part = file.with_suffix(f".part{rank}")
        part.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        part.replace(file)
    device, written = tokenizer.last_layer().device, 0
    tokenizer.eval()
    for number in range(rank, -(-len(images) // shard_size), ranks):
        shard = _shard(directory, number)
        last = min((number + 1) * shard_size, len(images))
        contents = images.contents(range(number * shard_size, last))
        if shard.is_file():
            _check_contents(shard, contents, images, number * shard_size)
            continue
        found_codes: dict[str, list[Tensor]] = {name: [] for name in tokenizer.codebooks}
        for start in range(number * shard_size, last, batch_size):
            pixels = to_pixels(images.batch(range(start, min(start + batch_size, last))), device)
            for name, ids in tokenizer.encode(pixels).codes.items():
                found_codes[name].append(ids.to(torch.int32).cpu())
        _write(shard, {name: torch.cat(parts) for name, parts in found_codes.items()}, contents)
        written += 1
    return written


def _shard(directory: Path, number: int) -> Path:
    return directory / f"codes-{number:05d}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], contents: list[str]) -> None:
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    save_file(tensors, str(part), metadata={"contents": " ".join(contents)})
    by_umask(part)
    part.replace(path)


def _check_contents(shard: Path, contents: list[str], images: ImageSource, first: int) -> None:
    """Raises `DataError` naming the first image that is not the one whose codes a shard holds."""
    from safetensors import safe_open

    with safe_open(str(shard), framework="pt") as file:
        recorded = ((file.metadata() or {}).get("contents") or "").split()
    cure = "encode into another folder, or delete this one"
    if not recorded:
        raise DataError(f"{shard} does not say which images it was made from, so it cannot be gone on from; {cure}")
    different = [place for place, pair in enumerate(zip(recorded, contents)) if pair[0] != pair[1]]
    if different:
        moved = "is now at another place" if recorded[different[0]] in contents else "was replaced or taken away"
        raise DataError(
            f"{shard}: the codes of {len(different)} images are of other pictures, the first {images.describe(first + different[0])}: "
            f"what was encoded there {moved}; {cure}"
        )


class StoredCodes:
    """Codes that `encode_images` wrote; ``codes[i]`` are image i's. Shards are memory-mapped.

    tokenizer: checked against the codes' fingerprint when given. Raises `CheckpointError` for another one, or for
    missing shards.
    """

    def __init__(self, directory: str | Path, tokenizer: VisualTokenizer | None = None):
        from safetensors import safe_open

        self.directory = Path(directory)
        file = self.directory / INDEX_FILE
        if not file.is_file():
            raise CheckpointError(f"{self.directory}: no {INDEX_FILE}; this folder holds no stored codes")
        self.index: dict[str, Any] = read_json(file)
        if tokenizer is not None and fingerprint(tokenizer) != self.index["tokenizer"]:
            raise CheckpointError(f"{self.directory}: codes of another tokenizer; encode the images again")
        number = -(-self.index["images"] // self.index["shard_size"])
        missing = [i for i in range(number) if not _shard(self.directory, i).is_file()]
        if missing:
            raise CheckpointError(f"{self.directory}: shards {missing[:5]} of {number} are missing; encode again")
        with naming_damage(self.directory):
            self._shards = [safe_open(str(_shard(self.directory, i)), framework="pt") for i in range(number)]

    def __len__(self) -> int:
        return self.index["images"]

    def __getitem__(self, position: int) -> VisualCodes:
        """Codes of one image, batch of 1."""
        if not 0 <= position < len(self):
            raise IndexError(f"image {position} of {len(self)}")
        shard, row = divmod(position, self.index["shard_size"])
        codes = {name: self._shards[shard].get_slice(name)[row : row + 1].long() for name in self.index["codebooks"]}
        scales = self.index["scales"]
        return VisualCodes(codes, tuple(self.index["grid"]), None if scales is None else tuple(scales))
