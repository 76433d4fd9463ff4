"""Which parts of a model keep which number format when a stage is prepared?"""

from __future__ import annotations

import torch
from torch import nn

from mllm.train.prepare import give_dtype, give_frozen_dtype


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.rand(4))


def make_network():
    """A frozen batch norm between two convolutions, the second of which learns; a rotary table; a quantised weight."""
    network = nn.ModuleDict(
        {"first": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4), "last": nn.Conv2d(4, 4, 1), "rotary": Rotary()}
    )
    network["rotary"].register_parameter("packed", nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False))
    network["first"].requires_grad_(False)
    network["norm"].requires_grad_(False).eval()
    return network


def dtypes(network):
    return {name: str(t.dtype)[6:] for name, t in (*network.named_parameters(), *network.named_buffers())}


def test_a_frozen_batch_norm_takes_pictures_of_either_type_under_autocast():
    network = make_network()
    wide = network["norm"](network["first"](torch.ones(2, 3, 2, 2))).detach()
    give_frozen_dtype(network, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network["first"](torch.ones(2, 3, 2, 2))
        assert hidden.dtype == torch.bfloat16
        narrow = network["norm"](hidden)
        torch.testing.assert_close(network["norm"](hidden.float()), narrow.float(), atol=2e-2, rtol=2e-2)
        network["last"](narrow).sum().backward()
    torch.testing.assert_close(narrow.float(), wide, atol=2e-2, rtol=2e-2)  # bf16 has 8 bits
    found = dtypes(network)
    assert found["first.weight"] == "bfloat16" and found["last.weight"] == "float32"
    assert {found[f"norm.{name}"] for name in ("weight", "bias", "running_mean", "running_var")} == {"float32"}
    assert found["rotary.inv_freq"] == "float32" and found["rotary.packed"] == "uint8"


def test_a_whole_model_in_bfloat16_keeps_its_tables_and_its_quantised_weights():
    network = make_network()
    give_dtype(network, torch.bfloat16)
    found = dtypes(network)
    assert found.pop("rotary.inv_freq") == "float32" and found.pop("rotary.packed") == "uint8"
    assert found.pop("norm.num_batches_tracked") == "int64" and set(found.values()) == {"bfloat16"}
