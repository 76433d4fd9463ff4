"""Does an exported checkpoint open where this toolkit is not installed?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm.models.export import export
from mllm.models.remote_code import external_packages
from mllm.plugins import load_plugins
from tests.helpers import TINY_CLIP, picture, tiny_model
from tests.test_readme import block

OPEN = """
import importlib.util, json, sys
from pathlib import Path
sys.path = [p for p in sys.path if not (Path(p or ".") / "mllm" / "__init__.py").exists()]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
found = importlib.util.find_spec("mllm")
assert found is None or found.loader is None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, plain = sys.argv[1:]
try:
    AutoModelForImageTextToText.from_pretrained(plain, trust_remote_code=True)
    raise SystemExit("opened without the toolkit")
except ImportError as error:
    assert "pip install mllm-toolkit" in str(error), error
try:
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("opened without being trusted")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
for part in (model, processor):  # saved again, the folder is an ordinary checkpoint: its door asks for the toolkit
    part.save_pretrained(again := Path(folder).with_name("again"))
assert not (again / "configuration_mllm.py").exists() and not (again / "mllm_sources.py").exists()
assert "mllm-toolkit" in (again / "mllm_remote.py").read_text()
with torch.no_grad():
    print(json.dumps({"ids": inputs["input_ids"].tolist(), "logits": model.eval()(**inputs).logits[0, -1].tolist()}))
"""

BARE = """
import json, sys
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
assert "mllm" not in sys.modules
for opens in (AutoModelForImageTextToText, AutoProcessor):
    try:
        opens.from_pretrained(folder)
        raise SystemExit("opened without being trusted")
    except ValueError as error:
        assert "trust_remote_code=True" in str(error) and folder in str(error), error
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
for part in (model, processor):
    part.save_pretrained(again := Path(folder).with_name("again"))
same = {path.name for path in Path(folder).iterdir()} == {path.name for path in again.iterdir()}
print("\\n" + json.dumps({"model": type(model).__module__, "processor": type(processor).__module__, "same": same}))
"""


@pytest.mark.slow
def test_a_bare_from_pretrained_is_told_how_and_then_opens(tmp_path: Path) -> None:
    """Nothing imported the toolkit: transformers names its own argument, with which the installed classes are used."""
    for part in tiny_model(tmp_path / "words", encoders={"semantic": dict(TINY_CLIP)}):
        part.save_pretrained(tmp_path / "ours")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BARE, str(tmp_path / "ours")]
    result = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-4000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found == {"model": "mllm.models.modeling_mllm", "processor": "mllm.processing.processor", "same": True}


@pytest.mark.slow
def test_a_folder_opens_with_transformers_alone(tmp_path: Path) -> None:
    """A plug-in encoder beside a transformers encoder, in a process that cannot import the toolkit."""
    (tmp_path / "my_encoder.py").write_text(block("plugin"))
    load_plugins([str(tmp_path / "my_encoder.py")])
    encoders = {"semantic": dict(TINY_CLIP), "colour": {"type": "mean-colour"}}
    model, processor = tiny_model(tmp_path / "words", encoders=encoders, connector={"type": "sequence_concat"})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ours")
    folder = export(tmp_path / "ours", tmp_path / "open", remote_code=True)
    picture(3).save(tmp_path / "a.png")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLLM_PLUGINS")}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", OPEN, str(folder), str(tmp_path / "a.png"), str(tmp_path / "ours")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-4000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(3)}, {"type": "text", "text": "What?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert found["ids"] == inputs["input_ids"].tolist()
    with torch.no_grad():
        expected = model.eval()(**inputs).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-5)


def test_what_must_be_installed_is_named() -> None:
    """transformers checks the imports of ``mllm_remote.py`` and names those that are missing."""
    optional = "try:\n    import flash\nexcept ImportError:\n    pass\n"
    source = f"import timm\nfrom torch import nn\nimport os\nfrom mllm.errors import X\n{optional}"
    assert external_packages([source]) == ["timm", "torch"]
