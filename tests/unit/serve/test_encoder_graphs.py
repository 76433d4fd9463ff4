"""Which batch sizes are captured, and does compiling an encoder leave its features alone?"""

import pytest
import torch

from mllm.encoders.backbones.dynperceiver import DynPerceiverEncoder
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.models.pipeline import EncoderBank
from mllm.serve.vllm.encoder_graphs import MAX_BATCH, EncoderGraphs, compile_encoders, repeats, run_blank, sizes_up_to
from tests.helpers import TINY_CLIP


@pytest.mark.parametrize(
    ("most", "sizes"), [(0, [1]), (1, [1]), (5, [1, 2, 3, 4, 5]), (11, [1, 2, 3, 4, 5, 6, 7, 8, 10, 11])]
)
def test_captured_sizes_end_at_what_one_step_encodes(most, sizes):
    assert sizes_up_to(most) == sizes


def test_padding_is_at_most_a_quarter_of_a_captured_batch():
    sizes = sizes_up_to(1000)
    assert sizes[-1] == MAX_BATCH
    for count in range(1, MAX_BATCH + 1):
        padded = next(size for size in sizes if size >= count)
        assert (padded - count) / padded <= 0.25


def test_compiled_encoders_give_the_same_features_at_every_batch_size():
    torch.manual_seed(0)
    bank = EncoderBank({"only": dict(TINY_CLIP)}).eval()
    for encoder in bank.encoders.values():
        encoder.to_empty(device="cpu")
        encoder.restore_buffers()
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    size = bank.infos["only"].image
    pixels = torch.randn(3, 3, size.height, size.width)
    with torch.inference_mode():
        plain = {count: bank({"only": pixels[:count]})[0]["only"].tokens for count in (1, 2, 3)}
    assert compile_encoders(dict(bank.encoders)) > 0
    run_blank(dict(bank.encoders), (2, 1))
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):  # no request waits for the compiler
        for count, expected in plain.items():
            assert torch.allclose(bank({"only": pixels[:count]})[0]["only"].tokens, expected, atol=1e-5, rtol=1e-4)


def test_a_graph_that_answers_for_other_pixels_is_told_from_one_that_rounds():
    torch.manual_seed(0)
    run = torch.randn(4, 9, 16)
    assert repeats(run + 1e-3 * torch.randn_like(run), run)
    assert not repeats(run.roll(1, dims=0), run)
    assert not repeats(torch.zeros_like(run), run)
    assert not repeats(torch.full_like(run, float("nan")), run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_encoder_that_waits_for_its_pixels_is_left_out_and_breaks_nothing_on_a_gpu():
    """A capture that breaks off would leave PyTorch's random generator and allocator as if it went on."""
    choices = {"whole": {}, "early": {"confidence": 0.5}}
    spec = {**DynPerceiverEncoder.tiny(), "output": "latents", "classifier": True}
    encoders = {
        name: build_encoder(encoder_config({**spec, **choice}, where="x")).cuda().eval()
        for name, choice in choices.items()
    }
    stream = torch.cuda.current_stream()
    with torch.inference_mode():
        left = EncoderGraphs(encoders, 2).install(required=False)
    assert list(left) == ["early"] and torch.cuda.current_stream() == stream
    assert torch.rand(3, device="cuda").shape == (3,) and torch.cuda.get_sync_debug_mode() == 0
