"""Does every registered conditioning branch keep the contract, and one of a plug-in's too?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import ConfigError, UnknownName
from mllm.testing.branches import CHECKS, build_example, check_branch, example, moved
from mllm.visual_tokenizers.diffusion.branches import CONDITIONING_BRANCHES
from mllm.visual_tokenizers.diffusion.branches.base import ConditioningBranch
from mllm.visual_tokenizers.diffusion.branches.injection import summed

pytest.importorskip("diffusers")

CONTROL = {
    "one": {"type": "control", "sees": ["semantic"], "depth": 2, "placement": "spread"},
    "two": {"type": "control", "sees": ["reconstruction", "source"]},
}
TRANSFORMER = {
    **CONDITIONING_BRANCHES.get("context").tiny(),
    "conditions": ["channels", "reconstruction", "source"],
    "branches": {**CONTROL, "three": {"type": "context", "depth": 1, "placement": "first"}},
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "name", [n for n in CONDITIONING_BRANCHES if CONDITIONING_BRANCHES.where(n).startswith("mllm.")]
)
def test_contract(name, check):
    check(CONDITIONING_BRANCHES.get(name).tiny())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_three_kinds_beside_one_transformer(check):
    check(TRANSFORMER)


@torch.no_grad()
def test_several_branches_add_up_to_their_single_ones():
    decoder = moved(build_example(TRANSFORMER))
    case = example(decoder)
    kept: dict[str, list] = {}
    for name, branch in decoder.branches.items():
        branch.register_forward_hook(lambda _m, _a, told, name=name: kept.update({name: told}))
    together = decoder.denoise(*case)
    total = summed(list(kept.values()))
    assert set(kept) == {"one", "two", "three"} and len(total) == 3
    first = sum(kept[name][0] for name in kept)
    torch.testing.assert_close(total[0], first)
    branches = dict(decoder.branches.items())
    for name in branches:  # each alone, the others silent
        decoder.branches = nn.ModuleDict({name: branches[name]})
        assert not torch.allclose(decoder.denoise(*case), together, atol=1e-5)
    with pytest.raises(ConfigError, match="same places"):
        summed([total, total[:2]])


def test_what_does_not_fit_is_told():
    tiny = CONDITIONING_BRANCHES.get("context").tiny()

    def refused(words: str, **changes) -> None:
        with pytest.raises(ConfigError, match=words):
            build_example({**tiny, **changes})

    refused(
        r"decoder\.branches\.a: expected a mapping with type, one of context, control", branches={"a": {"depth": 1}}
    )
    refused(
        r"decoder\.branches\.a\.sees: 'reconstruction' is neither",
        branches={"a": {"type": "control", "sees": ["reconstruction"]}},
    )
    refused(r"outside_only", branches={"a": {"type": "context", "sees": ["channels"]}})
    refused(r"decoder\.branches\.a\.text: there is no sequence", branches={"a": {"type": "control", "text": "read"}})
    refused("is a name of a part", branches={"a.b": {"type": "context"}})
    with pytest.raises(UnknownName, match="controll"):
        build_example({**tiny, "branches": {"a": {"type": "controll"}}})
    control = CONDITIONING_BRANCHES.get("control").tiny()
    with pytest.raises(ConfigError, match=r"branches\.a\.depth: beside a U-Net"):
        build_example({**control, "branches": {"a": {"type": "control", "depth": 1}}})


PLUGIN = '''
from torch import nn
from mllm.visual_tokenizers.diffusion.branches import CONDITIONING_BRANCHES
from mllm.visual_tokenizers.diffusion.branches.base import BranchConfig, ConditioningBranch
from mllm.visual_tokenizers.diffusion.branches.injection import picture_blocks


class PatchesConfig(BranchConfig):
    type: str = "patches"


@CONDITIONING_BRANCHES.register("patches")
class Patches(ConditioningBranch):
    """A condition's patches, added behind the first block alone."""

    Config = PatchesConfig

    def __init__(self, config, trunk, channels):
        super().__init__(config, trunk, channels)
        settings, self.places = trunk.network.config, len(picture_blocks(trunk.network)[0])
        width, patch = settings.num_attention_heads * settings.attention_head_dim, settings.patch_size
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.zeros_(self.patches.weight)
        nn.init.zeros_(self.patches.bias)

    def forward(self, seen):
        told = self.patches(seen.maps).flatten(2).transpose(1, 2)
        return [self.config.scale * told] + [None] * (self.places - 1)

    @classmethod
    def tiny(cls):
        tiny = CONDITIONING_BRANCHES.get("context").tiny()
        return {**tiny, "branches": {"one": {"type": "patches"}}}
'''


def test_a_branch_of_ones_own_is_checked_by_the_command(tmp_path):
    file = tmp_path / "my_branch.py"
    file.write_text(PLUGIN)
    result = CliRunner().invoke(app, ["check", "patches", "--kind", "branch", "--plugin", str(file)])
    assert result.exit_code == 0, result.output
    assert issubclass(CONDITIONING_BRANCHES.get("patches"), ConditioningBranch)
    listed = CliRunner().invoke(app, ["list", "branches"])
    assert "control" in listed.output and "context" in listed.output
    with pytest.raises(UnknownName):
        check_branch("nothing")
