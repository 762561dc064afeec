"""The search for settings on a geometric grid."""

import math

from mpicomp.run.search import Axis, search

LR = Axis("optimizer.lr", 0.1, 2)
GAMMA = Axis("algorithm.gamma", 0.5, 2)


def bowl(optimum):
    """Return a score with its best value at `optimum`, and the list of the points that were run."""
    seen = []

    def score(values):
        seen.append(values)
        return -sum(math.log(values[key] / best) ** 2 for key, best in optimum.items())

    return score, seen


def test_the_search_follows_an_optimum_that_lies_far_from_the_start():
    score, seen = bowl({"optimizer.lr": 1.6, "algorithm.gamma": 0.0625})
    points, is_inside = search((LR, GAMMA), 25, score)
    assert points[0] == {"optimizer.lr": 1.6, "algorithm.gamma": 0.0625}
    assert is_inside
    assert len(seen) == len(points) == 25
    assert len({tuple(point.values()) for point in seen}) == 25


def test_the_search_halves_its_steps_when_the_neighbors_are_worse():
    score, _ = bowl({"optimizer.lr": 0.141})
    points, is_inside = search((LR,), 6, score)
    assert points[0] == {"optimizer.lr": 0.141} and is_inside


def test_an_optimum_at_the_edge_is_said_to_be_there():
    score, _ = bowl({"optimizer.lr": 100.0})
    points, is_inside = search((LR,), 4, score)
    assert points[0] == {"optimizer.lr": 0.8} and not is_inside


def test_points_that_diverge_are_the_worst():
    points, is_inside = search((LR,), 3, lambda values: -math.inf if values["optimizer.lr"] > 0.1 else 0.5)
    assert points[-1] == {"optimizer.lr": 0.2} and points[0] == {"optimizer.lr": 0.1} and is_inside


def test_without_axes_there_is_one_run():
    assert search((), 9, lambda values: 1.0) == ([{}], True)


def test_a_start_that_diverges_like_its_neighbors_is_left_downwards():
    seen = []

    def score(values):
        seen.append(values["algorithm.gamma"])
        return -math.inf if seen[-1] > 0.05 else -abs(math.log(seen[-1] / 0.03))

    points, _ = search((GAMMA,), 8, score)
    assert seen[:6] == [0.5, 1.0, 0.25, 0.125, 0.0625, 0.0312]
    assert points[0]["algorithm.gamma"] in (0.0312, 0.0221)
    points, _ = search((LR, GAMMA), 9, lambda values: -math.inf if max(values.values()) > 0.2 else 1.0)
    assert max(points[0].values()) <= 0.2


def test_two_keys_go_down_at_once_when_the_start_and_its_neighbors_diverge():
    seen = []

    def score(values):
        seen.append(tuple(values.values()))
        return -math.inf if values["optimizer.lr"] * values["algorithm.gamma"] > 0.001 else 1.0

    points, _ = search((LR, GAMMA), 8, score)
    assert seen[:5] == [(0.1, 0.5), (0.2, 0.5), (0.05, 0.5), (0.1, 1.0), (0.1, 0.25)]
    assert seen[5:] == [(0.05, 0.25), (0.025, 0.125), (0.0125, 0.0625)]
    assert points[0] == {"optimizer.lr": 0.0125, "algorithm.gamma": 0.0625}


def test_a_search_ends_where_values_hardly_differ():
    points, _ = search((LR,), 40, bowl({"optimizer.lr": 0.26})[0])
    values = [point["optimizer.lr"] for point in points]
    assert len(values) == len(set(values)) < 12
    assert min(values, key=lambda value: abs(value - 0.26)) == values[0]
