"""Is the order of samples a pure function of seed and position, and does every process get its fair, exact share?"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from mllm.data.mixture import Mixture, permute
from mllm.data.plan import PackedPlan, Position, make_plan
from mllm.data.sources import Source
from mllm.data.spec import DatasetSpec
from mllm.errors import ConfigError, DataError
from mllm.types import Sample, Turn


class Counted(Source):
    """A source of numbered samples, for order tests."""

    def __init__(self, name: str, size: int, random_access: bool = True):
        super().__init__(DatasetSpec(name=name, format="messages", path=f"/nowhere/{name}.jsonl"))
        self.size = size
        self.random_access = random_access  # type: ignore[misc]
        self.asked: list[int] = []

    fingerprint = "f"  # type: ignore[assignment]

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> Sample:
        self.asked.append(index)
        return Sample(f"{self.name}-{index}", [Turn("user", "q"), Turn("assistant", "a")])


def mixture(
    sizes: dict[str, int], items: dict[str, dict] | None = None, *, stream: tuple[str, ...] = (), **options
) -> Mixture:
    entries = [
        {"dataset": {"name": n, "format": "messages", "path": f"/nowhere/{n}.jsonl"}, **(items or {}).get(n, {})}
        for n in sizes
    ]
    epoch_size = options.pop("epoch_size", None)
    spec = {"datasets": entries, **({"epoch_size": epoch_size} if epoch_size else {})}
    return Mixture(spec, sources=[Counted(n, s, n not in stream) for n, s in sizes.items()], **options)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 4097])
def test_permute_is_a_permutation_that_depends_on_the_key(size):
    whole = permute(np.arange(size), size, ("a", 1))
    assert sorted(whole.tolist()) == list(range(size))
    assert np.array_equal(permute(np.array([size - 1, 0]), size, ("a", 1)), whole[[size - 1, 0]])
    if size >= 17:
        assert not np.array_equal(whole, permute(np.arange(size), size, ("a", 2)))
        assert not np.array_equal(whole, np.arange(size))


def test_permute_shuffles_evenly():
    size, trials = 8, 4000
    seen = np.zeros((size, size))
    for trial in range(trials):
        for place, value in enumerate(permute(np.arange(size), size, (trial,))):
            seen[place, value] += 1
    expected = trials / size
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert statistic < 100  # chi square, 49 degrees of freedom: p < 1e-4 above


def test_known_order_is_kept_across_versions():
    assert permute(np.arange(10), 10, (0, "epoch", 0)).tolist() == GOLDEN_PERMUTATION


GOLDEN_PERMUTATION = [7, 4, 0, 3, 9, 8, 2, 1, 6, 5]


def test_every_row_comes_once_an_epoch_in_a_new_order_each_time():
    mixed = mixture({"a": 30, "b": 12})
    assert len(mixed) == 42
    epochs = [[(d.dataset, d.row) for d in mixed.locate(range(e * 42, (e + 1) * 42))] for e in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter([(0, i) for i in range(30)] + [(1, i) for i in range(12)])
    assert epochs[0] != epochs[1] != epochs[2]
    again = mixture({"a": 30, "b": 12})
    assert [(d.dataset, d.row) for d in again.locate(range(42))] == epochs[0]
    other = mixture({"a": 30, "b": 12}, seed=1)
    assert [(d.dataset, d.row) for d in other.locate(range(42))] != epochs[0]


def test_locate_is_pure_in_any_order_and_batching():
    mixed = mixture({"a": 30, "b": 12}, {"b": {"repeat": 2.5}})
    forwards = mixed.locate(range(200))
    assert [mixed.locate(k)[0] for k in range(200)] == forwards
    assert mixed.locate(range(199, -1, -1))[::-1] == forwards


def test_unshuffled_order_is_the_files_order():
    mixed = mixture({"a": 3, "b": 2}, shuffle=False)
    assert [(d.dataset, d.row) for d in mixed.locate(range(6))] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 0)]


def test_repeats_and_limits_set_the_shares_and_fractions_move_on():
    mixed = mixture({"a": 10, "b": 8, "c": 100}, {"a": {"repeat": 3}, "b": {"repeat": 0.5}, "c": {"limit": 5}})
    assert mixed.counts == [30, 4, 5]
    first = mixed.locate(range(39))
    assert Counter(d.row for d in first if d.dataset == 0) == dict.fromkeys(range(10), 3)
    assert max(d.row for d in first if d.dataset == 2) == 4
    second = mixed.locate(range(39, 78))
    halves = [{d.row for d in epoch if d.dataset == 1} for epoch in (first, second)]
    assert len(halves[0]) == len(halves[1]) == 4 and halves[0] | halves[1] == set(range(8))


def test_weights_are_shares_of_the_samples():
    mixed = mixture({"a": 10, "b": 1000}, {"a": {"weight": 3}, "b": {"weight": 1}}, epoch_size=200)
    assert mixed.counts == [150, 50]
    counts = Counter(d.dataset for d in mixed.locate(range(200)))
    assert counts == {0: 150, 1: 50}
    assert set(Counter(d.row for d in mixed.locate(range(200)) if d.dataset == 0).values()) == {15}
    over = mixed.locate(range(200 * 20))
    assert {d.row for d in over if d.dataset == 1} == set(range(1000))  # twenty epochs of 50 cover all 1000 rows
    with pytest.raises(DataError, match="gives it no sample"):
        mixture({"a": 10, "b": 10}, {"a": {"weight": 1000}, "b": {"weight": 1}}, epoch_size=20)


def test_quarantined_rows_never_come_and_the_epoch_shrinks(tmp_path):
    file = tmp_path / "d.jsonl"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    file.write_text("".join(json.dumps({"id": i, **row}) + "\n" for i in range(20)))
    declared = {"format": "messages", "path": str(file)}
    fingerprint = Mixture(declared).fingerprints["d"]
    lines = [{"fingerprint": fingerprint, "rows": 20}, *({"row": r, "reason": "bad"} for r in (3, 7, 19))]
    (tmp_path / "d.jsonl.quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixed = Mixture(declared)
    assert len(mixed) == 17 and sorted(d.row for d in mixed.locate(range(17))) == sorted(set(range(20)) - {3, 7, 19})
    everything = [{"fingerprint": fingerprint}, *({"row": r} for r in range(20))]
    (tmp_path / "d.jsonl.quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in everything))
    with pytest.raises(DataError, match="all 20 rows are on the quarantine list"):
        Mixture(declared)


def test_a_streaming_dataset_is_read_in_order_and_each_row_once():
    mixed = mixture({"a": 9000, "s": 3000}, stream=("s",))
    draws = mixed.locate(range(24_000))
    streamed = [d.row for d in draws if d.dataset == 1]
    assert streamed == list(range(3000)) * 2
    assert sorted(d.row for d in draws[:12_000] if d.dataset == 0) == list(range(9000))
    assert [mixed.locate(k)[0] for k in (0, 5000, 11_999, 23_999)] == [draws[k] for k in (0, 5000, 11_999, 23_999)]


# --------------------------------------------------------------------------------------------------------------- plans


def rows_of(plan, rank: int, start: Position | None = None, limit: int = 10_000):
    batches = []
    for batch in plan.batches(rank, start):
        batches.append(batch)
        if len(batches) == limit:
            break
    return batches


def lengths_of(mixed: Mixture, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 200, len(source)) for source in mixed.sources]


KINDS = {"sequential": {}, "grouped": {"group_by_length": True}, "packed": {"packing": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "batch"), [(1, 1), (2, 3), (4, 2)])
def test_ranks_see_disjoint_samples_equal_steps_and_together_everything(kind, world, batch):
    mixed = mixture({"a": 333, "b": 120})
    plan = make_plan(
        mixed, batch_size=batch, world_size=world, total=453, lengths=lengths_of(mixed), max_length=256, **KINDS[kind]
    )
    per_rank = [rows_of(plan, rank) for rank in range(world)]
    assert len({len(batches) for batches in per_rank}) == 1 and len(per_rank[0]) == plan.num_batches()
    numbers = [d.number for batches in per_rank for b in batches for row in b.rows for d in row]
    assert len(numbers) == len(set(numbers)), "a sample was seen twice"
    assert set(range(453)) <= set(numbers), "a sample was never seen"
    assert len(numbers) < 453 + world * batch, "more than one filled-up step"
    assert all(len(b.rows) == batch for batches in per_rank for b in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_at_any_batch_gives_exactly_the_rest(kind):
    mixed = mixture({"a": 200, "b": 77}, seed=3)
    options = {"batch_size": 2, "world_size": 2, "lengths": lengths_of(mixed), "max_length": 256, **KINDS[kind]}
    whole = rows_of(make_plan(mixed, total=700, **options), 1)
    for cut in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        fresh = make_plan(mixture({"a": 200, "b": 77}, seed=3), total=700, **options)
        place = Position.from_dict(json.loads(json.dumps(whole[cut].position.as_dict())))
        assert rows_of(fresh, 1, place) == whole[cut:]
        assert fresh.num_batches(place) == len(whole) - cut
    assert rows_of(make_plan(mixed, total=700, **options), 1, whole[-1].following) == []
    epochs = [batch.epoch for batch in whole]
    assert epochs == sorted(epochs) and epochs[0] == 0 and epochs[-1] <= 700 / len(mixed)


def test_grouped_batches_have_similar_lengths_and_the_longest_comes_first():
    mixed = mixture({"a": 3000})
    lengths = lengths_of(mixed)
    options = {"batch_size": 4, "world_size": 2, "lengths": lengths, "total": 3000}
    grouped = rows_of(make_plan(mixed, group_by_length=True, **options), 0)
    plain = rows_of(make_plan(mixed, **{**options, "lengths": None}), 0)

    def padding(batches):
        sizes = [[lengths[0][row[0].row] for row in b.rows] for b in batches]
        return 1 - sum(map(sum, sizes)) / sum(max(s) * len(s) for s in sizes)

    assert padding(grouped) < 0.03 < 0.3 < padding(plain)
    window = [d.row for d in mixed.locate(range(400))]
    assert lengths[0][grouped[0].rows[0][0].row] == max(lengths[0][window])
    totals = [
        sum(lengths[0][r[0].row] for b in rows_of(make_plan(mixed, group_by_length=True, **options), k) for r in b.rows)
        for k in (0, 1)
    ]
    assert abs(totals[0] - totals[1]) / totals[0] < 0.01  # neither process gets all the long ones


def test_packed_rows_fit_and_are_full():
    mixed = mixture({"a": 4000})
    lengths = lengths_of(mixed)
    plan = make_plan(mixed, batch_size=4, world_size=2, total=4000, packing=True, lengths=lengths, max_length=512)
    batches = [b for rank in (0, 1) for b in rows_of(plan, rank)]
    used = [sum(lengths[0][d.row] for d in row) for b in batches for row in b.rows]
    assert max(used) <= 512 and sum(used) / (512 * len(used)) > 0.97


def test_packing_leaves_out_rows_of_length_zero_and_counts_long_ones_as_full():
    mixed = mixture({"a": 50})
    lengths = [np.full(50, 10)]
    lengths[0][:5] = 0
    lengths[0][5] = 900
    plan = PackedPlan(mixed, batch_size=1, lengths=lengths, max_length=100, total=50, window=50)
    rows = [[d.row for d in b.rows[0]] for b in rows_of(plan, 0)]
    seen = [row for packed in rows for row in packed]
    assert sorted(seen) == list(range(5, 50)) and [5] in rows
    nothing = PackedPlan(mixed, batch_size=1, lengths=[np.zeros(50)], max_length=100, total=50)
    with pytest.raises(DataError, match="none of the samples 0 to 49"):
        rows_of(nothing, 0)


def test_packing_with_one_sample_a_row_repeats_to_fill_the_step():
    mixed = mixture({"a": 7})
    plan = PackedPlan(mixed, batch_size=2, world_size=2, lengths=[np.full(7, 90)], max_length=100, total=7)
    rows = [row for rank in (0, 1) for b in rows_of(plan, rank) for row in b.rows]
    assert len(rows) == 8 and {d.row for row in rows for d in row} == set(range(7))


def test_another_number_of_processes_goes_on_near_the_same_sample():
    mixed = mixture({"a": 5000})
    for kind in KINDS.values():
        options = {"lengths": lengths_of(mixed), "max_length": 256, "total": 5000, **kind}
        old = make_plan(mixed, batch_size=2, world_size=4, **options)
        done = rows_of(old, 0, limit=100)[-1].following
        new = make_plan(mixed, batch_size=2, world_size=2, **options)
        place = new.resume(done, window_size=old.window_size, rows_per_step=old.rows_per_step)
        left = {d.number for b in rows_of(new, 0, place) for row in b.rows for d in row}
        consumed = {d.number for rank in range(4) for b in rows_of(old, rank, limit=100) for row in b.rows for d in row}
        assert len(left & consumed) <= new.window_size / 2
        assert old.resume(done, window_size=old.window_size, rows_per_step=old.rows_per_step) == done


def test_wrong_settings_are_refused():
    mixed = mixture({"a": 10}, stream=("a",))
    with pytest.raises(ConfigError, match="exclude each other"):
        make_plan(mixed, batch_size=1, packing=True, group_by_length=True)
    with pytest.raises(ConfigError, match="is streamed; set streaming: false"):
        make_plan(mixed, batch_size=1, packing=True, lengths=[np.ones(10)], max_length=5)
    with pytest.raises(ConfigError, match="10 rows and 4 lengths"):
        make_plan(mixture({"a": 10}), batch_size=1, group_by_length=True, lengths=[np.ones(4)])
    with pytest.raises(ConfigError, match="give total"):
        make_plan(mixed, batch_size=1).num_batches()
