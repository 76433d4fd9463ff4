"""Is a part named whose encoder grew out of scale, and is an ordinary decline left alone?"""

from __future__ import annotations

import pytest

from mllm.train.observe.fading import WINDOW, FadingParts


def run(parts: dict[str, list[float]], *, each: int = 20, quiet: int = 0) -> tuple[list[str], FadingParts]:
    """Norms that change every ``each`` steps, as they were read from a run's metrics; the language model's is 1.5."""
    watch, lines = FadingParts(quiet=quiet), []
    for step in range(each * len(next(iter(parts.values())))):
        norms = {part: values[step // each] for part, values in parts.items()} | {"language_model": 1.5}
        total = sum(norm**2 for norm in norms.values()) ** 0.5
        lines += watch(step + 1, norms, total)
    return lines, watch


def test_an_encoder_that_grew_takes_itself_and_its_neighbour_out_of_the_loss():
    """Norms of a run of SmolLM2 with two convolutional encoders, one of which has no norms of its own."""
    text = [0.25, 0.24, 0.9, 2.0, 16.0, 0.9, 0.1, 0.03, 0.013, 0.0044, 0.00079]
    objects = [0.25, 0.3, 0.2, 0.05, 0.0015, 1e-4, 4e-6, 8e-7, 4.1e-7, 3.6e-7, 1.5e-7]
    connector = [0.7, 0.6, 0.5, 0.6, 0.78, 0.1, 0.06, 0.04, 0.03, 0.027, 0.014]
    lines, watch = run({"encoders.text": text, "encoders.objects": objects, "connector": connector})
    assert [line.split()[0] for line in lines] == ["encoders.objects", "encoders.text"]
    assert set(watch.faded) == {"encoders.objects", "encoders.text"}
    assert "(step " in lines[0] and "smaller rate" in lines[0]


@pytest.mark.parametrize(
    "norms",
    [
        [2.2, 0.32, 0.28, 0.11, 0.17, 0.13, 0.11, 0.23, 0.11, 0.12, 0.2, 0.15, 0.17, 0.097, 0.093],  # a new connector
        [
            0.97,
            0.29,
            0.35,
            0.15,
            0.16,
            0.16,
            0.25,
            0.39,
            0.17,
            0.32,
            0.21,
            0.17,
            0.24,
            0.16,
            0.079,
        ],  # an encoder that is heard
        [0.0] * 15,  # no images in the data: told elsewhere
    ],
)
def test_parts_that_settle_are_not_named(norms):
    assert run({"part": norms})[0] == []


def test_a_loss_that_falls_with_all_its_gradients_fades_nothing():
    watch, lines = FadingParts(), []
    for step in range(10 * WINDOW):
        scale = 0.98**step
        lines += watch(step, {"connector": 0.5 * scale, "language_model": scale}, 1.1 * scale)
    assert lines == []


def test_the_warm_up_is_not_the_measure():
    high = [50.0] * 2 + [0.3] * 8
    assert run({"connector": high})[0] == [] and run({"connector": [500.0] * 2 + [0.003] * 8})[0] != []
    assert run({"connector": [500.0] * 2 + [0.003] * 8}, quiet=40)[0] == []
