"""The group of commands: help, errors, and how long it takes to load."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import mpicomp.cli
from mpicomp.cli import COMMANDS, main
from mpicomp.errors import ConfigError, DataError


def test_help_names_every_command():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, text in COMMANDS.items():
        assert f"  {name} " in result.output
        assert text in result.output


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage: main " + name)


def test_help_loads_neither_torch_nor_mpi():
    program = (
        "import sys\n"
        "from mpicomp.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "loaded = {'torch', 'mpi4py', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_training_loads_no_mpi_before_it_starts():
    program = "import sys, mpicomp.cli.train\nassert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_an_unknown_command_is_a_usage_error():
    result = CliRunner().invoke(main, ["trane"])
    assert result.exit_code == 2
    assert "No such command 'trane'" in result.output


@pytest.fixture
def failing(monkeypatch):
    def install(error):
        @click.command()
        @mpicomp.cli.debug_option
        def fail():
            raise error

        monkeypatch.setattr(mpicomp.cli._Lazy, "get_command", lambda self, ctx, name: fail)

    return install


@pytest.mark.parametrize("error", [ConfigError("run.seed = x"), DataError("no file")])
def test_our_errors_are_one_line_and_an_exit_code(failing, error):
    failing(error)
    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == error.exit_code
    assert result.stderr == f"mpicomp: error: {error}\n"
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_shows_the_traceback(failing, arguments):
    failing(ConfigError("x"))
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, ConfigError)


def test_other_errors_are_not_hidden(failing):
    failing(ZeroDivisionError())
    assert isinstance(CliRunner().invoke(main, ["fail"]).exception, ZeroDivisionError)
