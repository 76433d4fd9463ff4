"""Can an answer hold the id that stands for a picture?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.helpers import tiny_model


def test_both_of_vllms_runners_never_write_it_and_everything_else_is_left_alone(tmp_path):
    pytest.importorskip("vllm")
    from vllm.v1.sample.logits_processor import LogitsProcessor

    from mllm.serve.vllm.placeholder import PlaceholderProcessor, RunnerV2Processor, never_ids

    config = tiny_model(tmp_path)[0].config
    assert never_ids(config) == sorted({config.image_token_id, *config.unassigned_ids}) and config.unassigned_ids
    assert issubclass(PlaceholderProcessor, (LogitsProcessor, RunnerV2Processor))
    engine = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
    first = PlaceholderProcessor(engine, torch.device("cpu"), False)
    second = PlaceholderProcessor(engine, SimpleNamespace(device=torch.device("cpu")))
    assert not first.is_argmax_invariant()
    logits = torch.randn(3, config.get_text_config().vocab_size)
    logits[:, config.image_token_id] = 1000.0  # what a client's bias could make of it
    for changed in (first.apply(logits.clone()), second.apply(logits.clone(), None)):
        assert (changed.argmax(-1) != config.image_token_id).all()
        others = ~torch.isin(torch.arange(logits.shape[1]), torch.tensor(never_ids(config)))
        assert torch.equal(changed[:, others], logits[:, others]) and changed[:, ~others].isneginf().all()
