"""How does a multimodal checkpoint carry the diffusion decoder of its visual tokenizer?

In a folder of its own, ``diffusion_decoder/``: what reads all weight files beside ``config.json`` (vLLM) would take its weights for the
model's.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from mllm.damage import hub_file, read_json
from mllm.visual_tokenizers.base import DECODER_CONFIG, DECODER_WEIGHTS, VisualTokenizer
from mllm.visual_tokenizers.storage import fingerprint

FOLDER = "diffusion_decoder"
ROUNDED = "tokenizer_rounded"
"""Key of the decoder's file: what its tokenizer is in bfloat16, which a model's checkpoint may hold it in."""


def attach(tokenizer: VisualTokenizer, folder: str | Path) -> None:
    """Tell a tokenizer of the decoder that lies in a folder, if one does; it is read at first use (`VisualTokenizer.diffusion`).

    folder: a saved tokenizer's, whose weights ``tokenizer`` has, or a multimodal checkpoint's.
    """
    inside = Path(folder) / FOLDER
    place = inside if (inside / DECODER_CONFIG).is_file() else Path(folder)
    if not (place / DECODER_CONFIG).is_file():
        return
    tokenizer.folder = place
    tokenizer.decoder_of = read_json(place / DECODER_CONFIG).get(ROUNDED) or fingerprint(tokenizer, rounded=True)


def carry(tokenizer: VisualTokenizer, checkpoint: str | Path) -> bool:
    """Copy a tokenizer's decoder into a checkpoint's folder; whether there is one. A decoder whose tokenizer has changed since is left out,
    with a warning: it was trained beside other codes."""
    source = tokenizer.folder
    if source is None or tokenizer.decoder_of is None or not (source / DECODER_CONFIG).is_file():
        return False
    if fingerprint(tokenizer, rounded=True) != tokenizer.decoder_of:
        warnings.warn(
            f"{checkpoint}: the visual tokenizer has learned since its diffusion decoder was trained; the decoder is left out. Train "
            "one beside it by a stage of kind diffusion",
            stacklevel=3,
        )
        return False
    target = Path(checkpoint) / FOLDER
    if target.resolve() == source.resolve():
        return True
    target.mkdir(parents=True, exist_ok=True)
    stored = {**read_json(source / DECODER_CONFIG), ROUNDED: tokenizer.decoder_of}
    (target / DECODER_CONFIG).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    shutil.copy2(source / DECODER_WEIGHTS, target / DECODER_WEIGHTS)
    return True


def hub_decoder(name: str) -> Path | None:
    """The folder in the hub's cache of a published checkpoint with a decoder in it; None where it has none."""
    found = [hub_file(name, f"{FOLDER}/{file}") for file in (DECODER_CONFIG, DECODER_WEIGHTS)]
    return None if None in found else Path(str(found[0])).parent.parent
