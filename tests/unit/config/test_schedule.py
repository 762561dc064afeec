"""Learning-rate schedules: values at the corners, warmup, and errors that name the key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpicomp.config.schedule import SCHEDULES, Constant, Cosine, Step
from mpicomp.errors import ConfigError


def test_constant():
    assert {Constant(10)(epoch) for epoch in (0, 3.3, 10, 11)} == {1.0}


def test_step_takes_fractions_and_epochs():
    by_fraction, by_epoch = Step(200), Step(200, milestones=[100, 150])
    assert by_epoch.milestones == (100, 150)
    for schedule in (by_fraction, by_epoch):
        assert schedule(99.9) == 1
        assert schedule(100) == pytest.approx(0.1)
        assert schedule(150) == pytest.approx(0.01)
        assert schedule(199) == pytest.approx(0.01)
    assert Step(10, milestones=(0.5,), factor=0.5)(5) == 0.5


def test_cosine_goes_from_one_to_its_floor():
    schedule = Cosine(10, floor=0.2)
    assert [schedule(epoch) for epoch in (0, 5, 10, 12)] == pytest.approx([1, 0.6, 0.2, 0.2])


def test_cosine_starts_after_warmup():
    schedule = Cosine(10, warmup=2)
    assert [schedule(epoch) for epoch in (2, 6, 10)] == pytest.approx([1, 0.5, 0])


def test_warmup_is_linear_from_its_start():
    schedule = Constant(10, warmup=4, warmup_start=0.2)
    assert [schedule(epoch) for epoch in (0, 1, 2, 4, 5)] == pytest.approx([0.2, 0.4, 0.6, 1, 1])
    assert Cosine(3, warmup=3)(3) == 1


@given(
    kind=st.sampled_from(sorted(SCHEDULES)),
    epochs=st.floats(0.1, 500),
    warm=st.floats(0, 1),
    progress=st.floats(0, 1),
)
def test_every_factor_is_between_zero_and_one(kind, epochs, warm, progress):
    schedule = SCHEDULES[kind](epochs, warmup=warm * epochs)
    assert 0 <= schedule(progress * epochs) <= 1
    assert schedule(progress * epochs) == schedule(progress * epochs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0), r"training\.epochs = 0"),
        (lambda: Constant(float("inf")), r"training\.epochs = inf"),
        (lambda: Constant(5, warmup=6), r"schedule\.warmup = 6: must be between 0 and the 5 epochs"),
        (lambda: Constant(5, warmup=-1), r"schedule\.warmup = -1"),
        (lambda: Constant(5, warmup=float("nan")), r"schedule\.warmup = nan"),
        (lambda: Constant(5, warmup_start=2), r"schedule\.warmup_start = 2"),
        (lambda: Step(10, factor=0), r"schedule\.factor = 0"),
        (lambda: Step(10, milestones=(11,)), r"schedule\.milestones = \[11\]: each must be"),
        (lambda: Step(10, milestones=(0,)), r"schedule\.milestones = \[0\]: each must be"),
        (lambda: Step(10, milestones=(0.75, 0.5)), r"schedule\.milestones = \[0\.75, 0\.5\]: must be ascending"),
        (lambda: Step(10, milestones=(0.5, 5)), r"must be ascending"),
        (lambda: Cosine(10, floor=1.5), r"schedule\.floor = 1\.5"),
    ],
)
def test_values_out_of_range_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
