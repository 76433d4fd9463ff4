"""How many CPU threads does small tensor work take?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operations of this thread in one thread, and give the others back afterwards.

    Preparing a batch is thousands of small operations. With a thread per core each of them waits for all cores: on a GPU
    host with 32 cores that took nine tenths of a training step. DataLoader workers have one thread for the same reason.
    Work that needs the cores (DeepSpeed's optimizer on the CPU, a model on the CPU) stays outside.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
