"""Is a checkpoint with half its keys, another head, another size or a prefix named for what it is, with what to give instead?"""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders import ENCODERS
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import CheckpointError, ConfigError


class Fresh:
    """A tiny encoder of a family, its weights under the names of a checkpoint, and how another opens them."""

    def __init__(self, family: str, folder: Path):
        self.spec, self.file = ENCODERS.get(family).tiny(), folder / "weights.safetensors"
        self.encoder = build_encoder(encoder_config(self.spec, where="eye"))
        self.state = {k.removeprefix("model."): v.clone() for k, v in self.encoder.state_dict().items()}

    def open(self, state: dict[str, torch.Tensor]) -> None:
        save_file({key: value.contiguous() for key, value in state.items()}, self.file)
        spec = {**self.spec, "weights": {"source": str(self.file)}}
        with torch.device("meta"):
            encoder = build_encoder(encoder_config(spec, where="eye"))
        encoder.load_pretrained()


@pytest.mark.parametrize("family", ["falcon", "unit", "vir"])
def test_weights_that_do_not_fit_are_named(family: str, tmp_path: Path):
    fresh = Fresh(family, tmp_path)
    head = {"my_head.weight": torch.zeros(7, 3)}
    fresh.open({f"net.eye.{key}": value for key, value in fresh.state.items()} | head)  # below a prefix: fits
    with pytest.raises(CheckpointError, match=r"1 not part .*my_head.weight\. All of the encoder is there"):
        fresh.open(fresh.state | head)
    keys = random.Random(0).sample(list(fresh.state), len(fresh.state) // 2)
    with pytest.raises(CheckpointError, match=r"missing: .*of the encoder's \d+ tensors: give the whole file"):
        fresh.open({key: fresh.state[key] for key in keys})
    with pytest.raises(CheckpointError, match="another family's file"):
        fresh.open(head)
    larger = {k: torch.zeros(*(n + 1 for n in v.shape)) if v.ndim > 1 else v for k, v in fresh.state.items()}
    with pytest.raises(CheckpointError, match=r"of another shape: .*choose the preset of that one"):
        fresh.open(larger)


def test_pixels_of_other_channels_are_told_what_to_do(tmp_path: Path):
    encoder = Fresh("vir", tmp_path).encoder
    for shape, advice in {
        (2, 1, 16, 20): r"pixels\.expand\(-1, 3, -1, -1\)",
        (2, 4, 16, 20): "choose three of the 4 channels",
        (3, 16, 20): r"pixels\[None\]",
        (2, 3, 16, 16): "set its image_size",
    }.items():
        with pytest.raises(ConfigError, match=advice):
            encoder(torch.zeros(shape))
