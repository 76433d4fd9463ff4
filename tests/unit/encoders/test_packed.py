"""Does attention of pictures that lie end to end stay within each, and where do they end?"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mllm.encoders.packed import _ends, packed_attention


def test_segments_do_not_see_each_other():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 9, 4).unbind()
    found = packed_attention(query, key, value, [4, 5], scale=0.5)
    for start, stop in ((0, 4), (4, 9)):
        part = slice(start, stop)
        alone = F.scaled_dot_product_attention(query[:, part], key[:, part], value[:, part], scale=0.5)
        torch.testing.assert_close(found[:, part], alone)


def test_ends_are_made_once_for_all_layers_and_may_be_saved_for_a_backward_pass():
    with torch.inference_mode():
        ends = _ends((4, 5), torch.device("cpu"))
    assert ends.tolist() == [0, 4, 9] and ends.dtype == torch.int32 and not ends.is_inference()
    assert _ends((4, 5), torch.device("cpu")) is ends
