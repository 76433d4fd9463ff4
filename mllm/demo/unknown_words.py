"""What is a model asked for that no drawn scene shows: which phrases, of words that are trained on and of others that are only tested?

A model whose training names only what its scenes can show answers every other word with one that it knows, and marks that. So a share of
what it is asked for in training has words without any meaning there: nouns, words for looks, and made-up ones, also such as begin like a
word that it knows. The words of a test are others (`Words.split`), so that what is learned is not a list.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words("""
airplane anchor apple arrow axe backpack ball balloon banana barrel basket bat bear bee bell bicycle bird boat book
boot bottle bowl bread bridge brush bucket bus butterfly button cactus cake camel camera candle carrot castle cat
chain chair cheese chicken church clock cloud coat coin comb corn cow crab crocodile crown curtain deer desk dice door
drum duck eagle egg elephant envelope eye feather fence finger fish flag flower fork fox frog ghost giraffe glove goat
grape guitar hammer hand hat heart hedgehog helmet horse house island jacket jar kettle key king kite knife ladder
lamp leaf lemon letter lion lock man map mirror monkey moon mountain mouse mushroom nail needle nest nose onion orange
owl paint pan parrot pear pen piano pig pillow pipe pirate pizza plane plate plug potato pumpkin queen rabbit radio
rainbow ring robot rocket rope rose saw scarf scissors shark sheep shell ship shirt shoe skirt snail snake sofa spider
spoon star stone suitcase sun sword table teapot tent tiger toaster tomato tooth towel toy train treasure tree
trousers trumpet turtle umbrella van vase violin wagon watch whale wheel whistle window wolf woman worm zebra
""")
NOUNS_OF_TESTS = _words("""
unicorn cup car dog bench circus crow cube dragon fridge hexagon kangaroo laptop octopus pencil penguin person
sandwich squid telephone tripod truck volcano wizard
""")
LOOKS = _words("""
ancient black blurry bronze chequered crooked curly dirty dotted empty enormous feathered frozen furry glass glowing
grey hairy hidden hollow icy leather metal muddy oval paper plastic rusty shiny silver sleepy smiling soft striped
torn transparent velvet wet winged
""")
LOOKS_OF_TESTS = _words("angry brown burning golden pink spotted sparkling white wooden woollen")
ONSETS = _words("b bl br d dr f fl g gl gr k kl l m n p pl pr qu r s sh sk sl st t th tr v w z")
VOWELS, CODAS = "aeiou", "bdgklmnprstx"


@dataclass(frozen=True)
class Words:
    """Words that nothing in a scene is called: of a test, or of what is trained."""

    nouns: Sequence[str]
    looks: Sequence[str]
    tested: bool

    @classmethod
    def split(cls, *, tested: bool) -> Words:
        return cls(NOUNS_OF_TESTS, LOOKS_OF_TESTS, tested) if tested else cls(NOUNS, LOOKS, tested)

    def noun(self, rng: random.Random, known: Sequence[str]) -> str:
        return rng.choice(self.nouns) if rng.random() < 0.5 else self.made_up(rng, known)

    def look(self, rng: random.Random, known: Sequence[str]) -> str:
        return rng.choice(self.looks) if rng.random() < 0.5 else self.made_up(rng, known)

    def made_up(self, rng: random.Random, known: Sequence[str]) -> str:
        """A word of one to three syllables that is on no list; one in four begins like a known word. A fifth of all such words are a
        test's, by a hash of their letters."""
        while True:
            begin = ""
            if rng.random() < 0.25:
                like = rng.choice(known)
                begin = like[: rng.randint(2, len(like) - 1)]
            word = begin + "".join(
                rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
                for _ in range(rng.randint(1, 2 if begin else 3))
            )
            if is_tested(word) == self.tested and word not in _listed() and word not in known:
                return word


def is_tested(word: str) -> bool:
    """Whether a made-up word belongs to the tests."""
    return zlib.crc32(word.encode()) % 5 == 0


@cache
def _listed() -> frozenset[str]:
    return frozenset((*NOUNS, *NOUNS_OF_TESTS, *LOOKS, *LOOKS_OF_TESTS))


def unknown_phrase(
    words: Words, rng: random.Random, *, colours: Sequence[str], shapes: Sequence[str], places: Sequence[str]
) -> str:
    """A phrase that names nothing any scene can show, by at least one word without a meaning there: "the unicorn", "the purple dog",
    "the leftmost cup", "the wooden square", "the pink thing"."""
    known = (*colours, *shapes, *places, "thing")
    kind = rng.random()
    if kind < 0.4:
        return f"the {words.noun(rng, known)}"
    if kind < 0.55:
        return f"the {rng.choice(colours)} {words.noun(rng, known)}"
    if kind < 0.7:
        return f"the {rng.choice(places)} {words.noun(rng, known)}"
    if kind < 0.9:
        return f"the {words.look(rng, known)} {rng.choice((*shapes, 'thing'))}"
    return f"the {words.look(rng, known)} {words.noun(rng, known)}"
