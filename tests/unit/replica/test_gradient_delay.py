"""How long gradients take."""

import pytest

from mpicomp.config.sections import SimulationSection, SlowSection
from mpicomp.replica.gradient_delay import SLICE_S, GradientDelay


def slept(pace, *computed_s):
    """Return the seconds of every sleep."""
    seconds = []
    pace.sleep = seconds.append
    for each in computed_s:
        pace.keep(each)
    return seconds


def test_no_rank_is_slow_unless_asked():
    assert slept(GradientDelay(), 1.0) == []


def test_factor_and_seconds_add_up():
    assert slept(GradientDelay(factor=4.0, seconds=0.5), 0.2) == pytest.approx([1.1])


@pytest.mark.parametrize("spread", ["exponential", "uniform", "jitter"])
def test_a_random_time_has_that_mean_and_can_be_repeated(spread):
    first, second = (slept(GradientDelay(seconds=0.5, spread=spread, seed=3, rank=1), *[0.0] * 4000) for _ in range(2))
    assert sum(first) / len(first) == pytest.approx(0.5, rel=0.1)
    assert first == second
    assert len(set(first)) > 3990


def test_a_pace_goes_on_where_it_was():
    whole = slept(GradientDelay(seconds=0.5, spread="exponential"), *[0.0] * 10)
    pace = GradientDelay(seconds=0.5, spread="exponential")
    pace.gradients = 6
    assert slept(pace, *[0.0] * 4) == whole[6:]


def test_only_the_chosen_ranks_are_slow():
    section = SlowSection(ranks=[1], seconds=0.25)
    assert [slept(section.build(rank, 0, None), 0.1) for rank in range(3)] == [[], [0.25], []]


def test_each_rank_may_have_a_time_of_its_own():
    section = SlowSection(ranks=[2, 0], factor=[1.0, 3.0], seconds=[0.5, 0.0])
    assert [slept(section.build(rank, 0, None), 0.1) for rank in range(3)] == [[pytest.approx(0.2)], [], [0.5]]
    with pytest.raises(ValueError, match=r"needs as many slow\.seconds as slow\.ranks, or one number: 1 are given"):
        SlowSection(ranks=[0, 1], seconds=[0.5])


def test_simulated_time_takes_the_place_of_the_real_one():
    simulation = SimulationSection(gradient_s=2.0)
    section = SlowSection(ranks=[1], factor=4.0)
    assert [slept(section.build(rank, 0, simulation), 0.1) for rank in range(2)] == [[2.0], [8.0]]


def test_a_slow_rank_looks_at_its_messages_until_they_are_there():
    pace, seconds, looks = GradientDelay(seconds=0.1), [], iter([False] * 3 + [True])
    pace.sleep = seconds.append
    pace.keep(0.5, lambda: next(looks))
    assert seconds[:3] == [SLICE_S] * 3
    assert len(seconds) == 4 and sum(seconds) == pytest.approx(0.1)


def test_a_rank_in_simulated_time_rests_until_a_message_arrives():
    pace, left, seconds = GradientDelay(gradient_s=1.0), [], []
    pace.sleep, pace.rest = seconds.append, lambda s: left.append(s) or s - 0.25
    pace.keep(0.5, lambda: len(left) == 3)
    assert left == [1.0, 0.75, 0.5] and seconds == [0.25]
