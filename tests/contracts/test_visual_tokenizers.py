"""Does every registered visual tokenizer keep the contract?"""

from __future__ import annotations

import pytest

from mllm.errors import CheckpointError
from mllm.testing.visual_tokenizers import CHECKS
from mllm.visual_tokenizers import VISUAL_TOKENIZERS
from mllm.visual_tokenizers.base import VisualTokenizer

NAMES = [name for name in VISUAL_TOKENIZERS if VISUAL_TOKENIZERS.where(name).startswith("mllm.")]


def test_ours_are_there():
    assert len(NAMES) >= 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(name, check):
    check(VISUAL_TOKENIZERS.get(name).tiny())


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        VisualTokenizer.from_pretrained(tmp_path)
