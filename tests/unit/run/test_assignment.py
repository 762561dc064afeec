"""Which samples a rank visits when the number of ranks changes."""

from functools import partial

import numpy as np
import pytest

from mpicomp.data.partition import partition
from mpicomp.run.assignment import BatchAssignment


def assignment(size, samples=96, batch_size=2):
    labels = np.arange(samples) % 4
    return BatchAssignment(partial(partition, "iid", labels, seed=7), samples, size, batch_size, seed=7)


def visited(given, epoch, start, stop):
    """Return the samples of some steps of an epoch, over all ranks."""
    orders = [
        given.order(epoch, rank)[start * given.batch_size : stop * given.batch_size] for rank in range(given.size)
    ]
    return np.concatenate(orders).tolist()


@pytest.mark.parametrize("sizes", [(4, 3), (4, 8), (2, 5, 3), (8, 1, 4)])
def test_no_sample_of_an_epoch_comes_twice_when_the_number_of_ranks_changes(sizes):
    current, seen, step = assignment(sizes[0]), [], 0
    step = current.per_epoch  # begin in epoch 1
    for size in sizes[1:]:
        epoch, place = current.position(step)
        seen += visited(current, epoch, place, place + 2)
        step += 2
        current = current.resized(step, size)
    epoch, place = current.position(step)
    assert epoch == 1
    seen += visited(current, epoch, place, current.per_epoch)
    assert -1 not in seen
    assert len(set(seen)) == len(seen)
    assert len(seen) > 96 - 2 * 2 * max(sizes) * len(sizes)  # at most a step of each is dropped
    step += current.per_epoch - place
    assert current.position(step) == (2, 0)
    assert np.array_equal(current.order(2, 0), assignment(sizes[-1]).order(2, 0))


def test_a_change_at_the_end_of_an_epoch_begins_the_next():
    before = assignment(4)
    after = before.resized(before.per_epoch, 3)
    assert after.position(before.per_epoch) == (1, 0)
    full = assignment(3)
    assert sorted(visited(after, 1, 0, after.per_epoch)) == list(range(96))
    assert len(visited(after, 1, 0, after.per_epoch)) == len(visited(full, 1, 0, full.per_epoch))
