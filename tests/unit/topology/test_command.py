"""``mpicomp topology``."""

import sys

import pytest
from click.testing import CliRunner

from mpicomp.cli.topology import topology
from mpicomp.errors import ConfigError, TopologyError


def run(*arguments):
    result = CliRunner().invoke(topology, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_it_tells_all_about_a_ring():
    output = run("ring", "--ranks", 8)
    for label, value in [
        ("Cartesian grid", "8, around"),
        ("Targets of a rank", "2"),
        ("Bytes a rank sends", "2 x those of its message"),
        ("Connected", "yes"),
        ("Doubly stochastic", "yes"),
        ("Symmetric", "yes"),
        ("Spectral gap", "0.1953"),
    ]:
        assert any(label in line and f" {value} " in line for line in output.splitlines()), label
    assert "1 (0.3333), 7 (0.3333)" in output
    assert output.count("0.333") >= 24


def test_parameters_are_toml_or_plain_text(tmp_path):
    assert "2 x 2 x 2, around" in run("torus", "--ranks", 8, "--set", "dims=[2,2,2]")
    path = tmp_path / "pair.txt"
    path.write_text("0 1\n")
    assert "pair, 2 ranks" in run("file", "--ranks", 2, "--set", f"path={path}")
    assert "0.0976" in run("ring", "--ranks", 8, "--set", "lazy=true")


def test_a_large_graph_is_summed_up():
    output = run("star", "--ranks", 100)
    assert "1 to 99" in output
    assert "and 36 more ranks" in output
    assert "distinct weights" in output


def test_schedules_show_their_steps():
    output = run("one_peer_exponential", "--ranks", 8)
    assert "Neighbors at step 2" in output
    assert "Spectral gap of a period" in output
    assert "Neighbors at step 3" in run("random_matching", "--ranks", 5, "--set", "seed=3")


def test_a_directed_graph_has_no_best_diffusion_step():
    assert "Best diffusion step" not in run("exponential", "--ranks", 8)


@pytest.mark.parametrize("kind", ["ring", "torus", "hypercube", "exponential", "one_peer_exponential"])
def test_picture(tmp_path, kind):
    picture = tmp_path / "graph.png"
    assert str(picture) in run(kind, "--ranks", 8, "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"--picture needs matplotlib: pip install matplotlib"):
        run("ring", "--ranks", 4, "--picture", tmp_path / "graph.png")


def test_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        run("ring", "--ranks", 4, "--picture", tmp_path / "nowhere" / "graph.png")
    with pytest.raises(ConfigError, match="cannot be written"):
        run("ring", "--ranks", 4, "--picture", tmp_path / "graph.nothing")


def test_bad_arguments_are_errors_of_ours():
    with pytest.raises(ConfigError, match=r"topology.kind = 'rings' is unknown. Did you mean 'ring'\?"):
        run("rings", "--ranks", 4)
    with pytest.raises(ConfigError, match="--set 'degree' must have the form KEY=VALUE"):
        run("random_regular", "--ranks", 8, "--set", "degree")
    with pytest.raises(ConfigError, match=r"topology.dims is no parameter of topology.kind = 'ring'"):
        run("ring", "--ranks", 4, "--set", "dims=[2,2]")
    with pytest.raises(TopologyError, match="needs a whole number of ranks, at least 1, not -3"):
        run("ring", "--ranks", -3)
