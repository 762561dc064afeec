"""Plans under a launcher: links are tried between the ranks, and all ranks have the same plan."""

import pytest

from mpicomp.cli.plan import mean_plan, try_links
from mpicomp.config.config import RunConfig
from mpicomp.exchange.loopback import Links
from mpicomp.run.plan import plan


def test_all_ranks_try_the_links_and_find_the_same(world):
    if world.size == 1:
        pytest.skip("needs links")
    links = try_links(world)
    assert all(0 < way.latency_s < 10 and 0 < way.bytes_per_s < 1e12 for way in links)
    assert world.all_gather(links) == [links] * world.size


def test_a_plan_is_the_mean_of_those_of_all_ranks(world):
    overrides = ["data.kind=synthetic", "data.samples=100", "model.hidden=[8]", "training.batch_size=4"]
    own = plan(RunConfig.load("configs/methods/choco.toml", overrides), 4, Links(1e-4, 1e6))
    found = mean_plan(world, own)
    seconds = world.all_gather([prediction.seconds for prediction in own.predictions])
    for prediction, of_ranks in zip(found.predictions, zip(*seconds, strict=True), strict=True):
        assert min(of_ranks) <= prediction.seconds <= max(of_ranks)
        assert prediction.seconds == pytest.approx(sum(of_ranks) / world.size)
    names = [(prediction.name, prediction.seconds) for prediction in found.predictions]
    assert world.all_gather(names) == [names] * world.size
