import random

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import default_data_collator

from bissl_hf.data.alternation import (
    AlternatingDataLoader,
    AlternationSampler,
    KeyedDataset,
    KeyedSource,
    StepKey,
    Stream,
    batch_indices,
    keyed_random_state,
    read_rows,
)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        worker = torch.utils.data.get_worker_info()
        return {"row": torch.tensor(index), "worker": torch.tensor(-1 if worker is None else worker.seed % 2**31)}


def test_batches_of_an_epoch_are_disjoint_and_cover_the_data():
    for epoch in range(3):
        batches = [batch_indices(20, 6, 3 * epoch + place, seed=1, stream=0) for place in range(3)]
        assert len(set(np.concatenate(batches))) == 18
    whole = [batch_indices(20, 6, place, seed=1, stream=0, drop_last=False) for place in range(4)]
    assert sorted(np.concatenate(whole)) == list(range(20))


def test_batches_differ_between_epochs_seeds_and_streams_and_not_between_calls():
    def batch(position=0, seed=1, stream=0):
        return batch_indices(100, 50, position, seed=seed, stream=stream).tolist()

    different = [batch(), batch(position=2), batch(seed=2), batch(stream=1)]
    assert len({tuple(rows) for rows in different}) == 4
    [batch(position=position, seed=9) for position in range(40)]  # whatever is cached meanwhile
    assert batch() == different[0]


@pytest.mark.parametrize("size", [0, 21])
def test_a_batch_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=f"batch size is {size}"):
        batch_indices(20, size, 0, seed=0, stream=0)


def test_processes_share_a_batch_without_overlap():
    source = {world: KeyedSource(Rows(20), 6, default_data_collator, 2, world_size=world) for world in (1, 3)}
    key = StepKey(0, 0, 4, 1, 0)
    parts = [source[3].read(key._replace(rank=rank))["row"] for rank in range(3)]
    assert torch.equal(torch.cat(parts), source[1].read(key)["row"])
    with pytest.raises(ValueError, match="cannot be dealt out to 4 processes"):
        KeyedSource(Rows(20), 6, default_data_collator, 2, world_size=4)


def test_the_streams_go_on_from_one_alternation_to_the_next():
    source = KeyedSource(Rows(20), 5, default_data_collator, steps_per_alternation=2)
    epoch = [source.read(StepKey(3, 0, alternation, step, 0))["row"] for alternation in (0, 1) for step in (0, 1)]
    assert sorted(torch.cat(epoch).tolist()) == list(range(20))


def test_rows_are_read_in_one_call_where_the_data_offers_one():
    class Bulk(Rows):
        def __getitems__(self, indices):
            return [("bulk", index) for index in indices]

    assert read_rows(Bulk(5), np.array([3, 1])) == [("bulk", 3), ("bulk", 1)]
    assert [int(row["row"]) for row in read_rows(Rows(5), np.array([3, 1]))] == [3, 1]


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item(), torch.randn(2).sum().item()


def test_a_key_seeds_all_random_states_and_restores_them():
    before = states()
    with keyed_random_state((1, 2, 3)):
        first = draw()
    assert states() == before
    draw()
    with keyed_random_state((1, 2, 3)):
        assert draw() == first
    for other in ((1, 2, 4), (1, 2), (3, 2, 1), (1, 2, 3, 1)):
        with keyed_random_state(other):
            assert draw()[0] != first[0]


def test_random_states_are_restored_after_an_error():
    before = states()

    def fail():
        with keyed_random_state((1,)):
            draw()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert states() == before


def loader(workers=0):
    sources = {
        Stream.LOWER: KeyedSource(Rows(30), 4, default_data_collator, 3),
        Stream.UPPER: KeyedSource(Rows(7), 3, default_data_collator, 2),
    }
    sampler = AlternationSampler([(Stream.LOWER, 3), (Stream.UPPER, 2)], seed=5)
    return AlternatingDataLoader(KeyedDataset(sources, 18), sampler, num_workers=workers)


def read(batches):
    return [(tuple(batch["key"]), batch["inputs"]["row"].tolist()) for batch in batches]


def test_an_alternation_is_its_lower_steps_then_its_upper_ones():
    batches = loader()
    assert (len(batches), len(batches.dataset)) == (5, 18)
    keys = [key for key, _ in read(batches)]
    assert [(key[1], key[3]) for key in keys] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_workers_and_skipping_change_nothing():
    plain, worked = loader(), loader(workers=2)
    seeds = set()
    for alternation in (0, 1, 2):
        for batches in (plain, worked):
            batches.set_epoch(alternation)
        expected = read(plain)
        assert all(key[2] == alternation for key, _ in expected)
        found = list(worked)
        assert read(found) == expected
        seeds |= {batch["inputs"]["worker"][0].item() for batch in found}
        skipped = skip_first_batches(plain, 2)
        skipped.batch_sampler.batch_sampler.set_epoch(alternation)
        assert read(skipped) == expected[2:]
    assert len(seeds) == 2, "the workers must live through all alternations"


@st.composite
def sources(draw):
    """Any sizes that fit: a source for one process and its copies for several."""
    world, share = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    count, steps = draw(st.integers(world * share, 40)), draw(st.integers(1, 6))
    return [KeyedSource(Rows(count), world * share, default_data_collator, steps, world_size=w) for w in (1, world)]


@settings(max_examples=50, deadline=None)
@given(sources(), st.integers(0, 2**32), st.sampled_from(list(Stream)), st.integers(0, 5))
def test_each_rank_reads_its_part_of_the_batch_of_one_process(pair, seed, stream, alternation):
    one, several = pair
    seen: list[int] = []
    for step in range(one.steps_per_alternation):
        key = StepKey(seed, int(stream), alternation, step, 0)
        batch = one.read(key)["row"].tolist()
        parts = [several.read(key._replace(rank=rank))["row"].tolist() for rank in range(several.world_size)]
        assert [row for part in parts for row in part] == batch
        assert len(set(batch)) == one.batch_size
        seen += batch
    batches = len(one.dataset) // one.batch_size
    first = alternation * one.steps_per_alternation
    for epoch in range(first // batches, (first + one.steps_per_alternation) // batches + 1):
        own = range(max(first, epoch * batches), min(first + one.steps_per_alternation, (epoch + 1) * batches))
        rows = [row for n in own for row in seen[(n - first) * one.batch_size : (n - first + 1) * one.batch_size]]
        assert len(set(rows)) == len(rows), "no example twice in a pass over the data"


@settings(max_examples=50, deadline=None)
@given(sources(), sources(), st.integers(0, 2**32), st.integers(0, 2), st.data())
def test_a_loader_goes_on_from_any_step_as_one_that_was_not_interrupted(lower, upper, seed, alternation, data):
    rank = data.draw(st.integers(0, min(lower[1].world_size, upper[1].world_size) - 1))
    phases = [(Stream.LOWER, lower[1].steps_per_alternation), (Stream.UPPER, upper[1].steps_per_alternation)]
    streams = KeyedDataset({Stream.LOWER: lower[1], Stream.UPPER: upper[1]}, 1)

    def batches(skip: int) -> list:
        fresh = AlternatingDataLoader(streams, AlternationSampler(phases, seed=seed, rank=rank))
        skipped = skip_first_batches(fresh, skip) if skip else fresh
        sampler = skipped.batch_sampler
        (sampler.batch_sampler if skip else sampler).set_epoch(alternation)
        return read(skipped)

    whole = batches(0)
    resumed_at = data.draw(st.integers(0, len(whole) - 1))
    assert batches(resumed_at) == whole[resumed_at:]
