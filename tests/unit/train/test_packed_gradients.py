"""Do samples packed into rows teach every part of a model, its encoders too, what they teach in rows of their own?"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from mllm.data.collate import collate, collate_packed
from mllm.processing.chat import encode_sample
from mllm.train import attention
from mllm.train.prepare import attention_inputs
from tests.helpers import samples_of_unlike_sizes, tiny_model


@pytest.mark.parametrize("neighbour", [False, True])
def test_packed_samples_teach_every_part_what_they_teach_alone(tmp_path, neighbour):
    """Loss and the gradients of connector, language model and both encoders, of pictures of unlike sizes. neighbour: samples that see
    each other, as they do where boundaries are not told, must be found out."""
    model, processor = tiny_model(tmp_path)
    samples = [encode_sample(processor, sample) for sample in samples_of_unlike_sizes()]
    rows = [[samples[0], samples[2]], [samples[3], samples[1]]]
    length = max(sum(map(len, row)) for row in rows) + 7

    def learned(batch, implementation):
        model.set_attn_implementation({"text_config": implementation})
        model.zero_grad()
        inputs = attention_inputs(batch, implementation)
        if neighbour and batch.cu_seq_lens is not None:
            ends = torch.arange(0, 2 * length + 1, length, dtype=torch.int32)
            inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
        output = model(**inputs, num_items_in_batch=sum(sample.num_supervised for sample in samples))
        output.loss.backward()
        found = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
        return float(output.loss.detach()), found

    attention.register()
    wanted_loss, wanted = learned(collate(samples, pad_token_id=0), "eager")
    loss, found = learned(collate_packed(rows, max_length=length, pad_token_id=0), attention.NAME)
    assert found.keys() == wanted.keys()
    encoders = {name.split("encoders.")[1].partition(".")[0] for name in found if "encoders." in name}
    assert len(encoders) == 2
    # What nothing reaches in exact arithmetic (a key's bias) has gradients of rounding noise, which point anywhere.
    most = max(float(gradient.abs().max()) for gradient in wanted.values())
    told = {name: gradient for name, gradient in wanted.items() if float(gradient.abs().max()) > 1e-5 * most}
    assert (
        len(told) > 0.7 * len(wanted)
        and {name.split("encoders.")[1].partition(".")[0] for name in told if "encoders." in name} == encoders
    )
    nearest = {name: float(cosine_similarity(found[name], gradient, dim=0)) for name, gradient in told.items()}
    if neighbour:
        assert abs(loss - wanted_loss) > 1e-3 and min(nearest.values()) < 0.99
        return
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert min(nearest.values()) > 0.9999, min(nearest, key=nearest.__getitem__)
    for name, gradient in told.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-6 * most, name
