"""How does a saved checkpoint find this toolkit when nothing has imported it?

Every checkpoint carries one small Python file that ``auto_map`` in its configs points to. transformers, which cannot know the model
type before ``import mllm``, then names ``trust_remote_code=True``; with it the file hands over the installed toolkit's classes, or
says what to install. `mllm.models.remote_code` writes a file of the same name that brings the code along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.install import DISTRIBUTION

MODULE = "mllm_remote"
SOURCES = "mllm_sources.py"
"""Stands beside the door where the code was brought along."""
CLASSES = {
    "AutoConfig": "MllmConfig",
    "AutoModel": "MllmModel",
    "AutoModelForImageTextToText": "MllmForConditionalGeneration",
    "AutoProcessor": "MllmProcessor",
    "AutoImageProcessor": "MllmImageProcessor",
}
AUTO_MAP = {auto: f"{MODULE}.{name}" for auto, name in CLASSES.items()}
_HOMES = {
    "MllmConfig": "mllm.models.configuration_mllm",
    "MllmModel": "mllm.models.modeling_mllm",
    "MllmForConditionalGeneration": "mllm.models.modeling_mllm",
    "MllmProcessor": "mllm.processing.processor",
    "MllmImageProcessor": "mllm.processing.image_processor",
}
CLASS_LINES = "".join(f'{name} = importlib.import_module("{home}").{name}\n' for name, home in _HOMES.items())
"""Python that gives every class its name, once the toolkit can be imported."""
_DOOR = f'''"""Opens this checkpoint with the toolkit mllm, which must be installed: pip install {DISTRIBUTION}.

`import mllm` before the Auto classes of transformers does the same without trust_remote_code.
"""

import importlib
import importlib.util

found = importlib.util.find_spec("mllm")  # without a loader it is a folder that happens to have the name
if found is None or found.loader is None or importlib.util.find_spec("mllm.door") is None:
    raise ImportError(
        "this checkpoint is opened by the toolkit mllm, which is not installed here: pip install {DISTRIBUTION} "
        "(the plain name mllm on the package index is another project); "
        "`mllm export --remote-code` writes a checkpoint that opens without it"
    )
importlib.import_module("mllm.models.registration").register()
{CLASS_LINES}'''


def write_door(folder: str | Path) -> Path:
    """Write the file into a checkpoint's folder; returns its path. A file that brings the code along is left as it is."""
    path = Path(folder) / f"{MODULE}.py"
    if not (path.with_name(SOURCES).is_file() and path.is_file()):
        path.write_text(_DOOR, encoding="utf-8")
    return path


class OpenedByDoor:
    """Base of the classes that ``auto_map`` names.

    transformers marks a class that it found so, and would copy the one module that defines it beside the next checkpoint: ours is
    a part of a package, and every checkpoint has its door already.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> None:
        """Nothing to do: see the class."""


class SavesDoor(OpenedByDoor):
    """Base of those that are saved on their own: config and processors."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `write_door` adds its file."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_door(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
