"""What does the process import, once for all, from which training processes are forked on the CPU?

Its name is all that the fork server is given (`PRELOADED` of `mllm.train.launch`). More than half of a short run's time is imports, and
each process would pay them again.
"""

from __future__ import annotations

import gc
import importlib
import os

from mllm.noise import hush

OURS = ("mllm.models.build", "mllm.train.run", "mllm.train.stages.sft", "mllm.encoders.hf")
LATE = (
    "deepspeed.module_inject.auto_ep_layer",  # accelerate asks for DeepSpeed whenever a model is saved, and its engine for this
    "torch._inductor.compile_fx",  # by DeepSpeed's engine
    "setuptools",  # by DeepSpeed's optimizers
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "transformers.tokenization_mistral_common",  # whenever a processor is read
    "torch.utils.tensorboard",
    "mllm.encoders.timm",
)
"""What is imported only when it is needed, as by nearly every run; any of these may not be installed."""


def _import_all() -> None:
    hush()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as `import_deepspeed` does; it warns of what it finds otherwise
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    warm = os.environ.get("TORCH_WARM_POOL")
    os.environ["TORCH_WARM_POOL"] = "0"  # no processes of torch's own before the fork
    try:
        for name in OURS:
            importlib.import_module(name)
        for name in LATE:
            try:
                importlib.import_module(name)
            except Exception:  # absent or broken: the run that needs it says so
                continue
    finally:
        os.environ.pop("TORCH_WARM_POOL") if warm is None else os.environ.update(TORCH_WARM_POOL=warm)
    gc.freeze()  # what is here stays: a process that looks through it for garbage would copy all of it


_import_all()
