"""Does ``import mllm`` keep out of every start what few need, and is it there when it is asked for?"""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import mllm
from transformers.generation import candidate_generator as module
from transformers.utils import is_sklearn_available
assert "sklearn" not in sys.modules
assert is_sklearn_available() and module.is_sklearn_available()
print([list(map(float, part)) for part in module.roc_curve([0, 1, 1], [0.1, 0.4, 0.9])][1])
assert "sklearn" in sys.modules

import mllm.models.build
assert not {"timm", "transformers.models.sam.modeling_sam"} & set(sys.modules), "a model without masks waits for no decoder"
from timm.utils import summary
assert "wandb" not in sys.modules, "timm's own log asks for it when something is logged"
import importlib.util
assert hasattr(summary, "wandb") == (importlib.util.find_spec("wandb") is not None)
"""


def test_what_few_need_is_imported_at_its_first_use():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.0, 0.5, 1.0, 1.0]"
