"""Is it said what to do about a source that cannot be read?"""

from __future__ import annotations

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mllm.hub import hub_reason


@pytest.mark.parametrize("source", ["runs/room_demo/tokenizer", "runs/x/"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(source):
    with pytest.raises(HFValidationError) as raised:
        validate_repo_id(source)
    wrapped = OSError("transformers' own words")
    wrapped.__cause__ = raised.value
    assert hub_reason(wrapped, source).startswith(f"there is no folder {source}, and no repository")


def test_another_error_is_given_in_its_own_first_line():
    assert hub_reason(OSError("disk is gone\nand more"), "x") == "disk is gone"
