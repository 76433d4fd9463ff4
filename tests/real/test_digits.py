"""Is there anything to gain from another tokenisation of numbers, or has every digit its token already?"""

from __future__ import annotations

import pytest

from tests.real.tokenizers import tokenizer

pytestmark = pytest.mark.xdist_group("real_tokenizers")  # each is read once


def test_smollm2_has_no_token_of_two_digits():
    """So no number is split in another way than digit by digit, whatever the text around it."""
    made = tokenizer("smollm2")
    digits = [token for token in made.get_vocab() if any(sign.isdigit() and sign.isascii() for sign in token)]
    plain = sorted(token for token in digits if not token.startswith("<"))  # <fim…>, <|…|>: markers, never a number
    assert plain == list("0123456789")
    assert made.tokenize("842 - 616 = 226, 8.25") == [*"842", "Ġ-", "Ġ", *"616", "Ġ=", "Ġ", *"226", ",", "Ġ", *"8.25"]
