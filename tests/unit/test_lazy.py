"""Does ``import mllm`` keep scikit-learn out of every start, and is it there when assisted decoding asks for it?"""

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
"""


def test_assisted_decoding_imports_sklearn_at_its_first_use():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.0, 0.5, 1.0, 1.0]"
