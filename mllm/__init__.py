"""mllm: multimodal LLMs with pluggable vision encoders.

``import mllm`` loads no torch. The model classes are imported, and registered with transformers' Auto classes, when
first used: by name (``mllm.MllmForConditionalGeneration``) or as soon as transformers itself has been imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
