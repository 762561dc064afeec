"""What a failure prints, and with which code all ranks end."""

import sys

import pytest

from mpicomp.errors import ConfigError, DivergenceError
from mpicomp.exchange import loopback
from mpicomp.exchange.guard import describe, guard, install_excepthook, together


def fail(world, error, debug=False, rank=1):
    with guard(world, debug=debug):
        if world.rank == rank:
            raise error
        world.barrier()


def code_of(error, **kwargs):
    with pytest.raises(SystemExit) as caught:
        loopback.run(3, lambda world: fail(world, error, **kwargs))
    return caught.value.code


def test_an_error_of_ours_is_one_line_with_rank_and_host(capsys):
    assert code_of(DivergenceError("loss is NaN at step 7")) == 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mpicomp: error: rank 1 on ")
    assert lines[0].endswith(": loss is NaN at step 7")


def test_debug_adds_the_traceback(capsys):
    assert code_of(DivergenceError("loss is NaN"), debug=True) == 5
    err = capsys.readouterr().err
    assert "Traceback" in err and "raise error" in err and "loss is NaN" in err


def test_any_other_error_has_its_traceback(capsys):
    assert code_of(ZeroDivisionError("of theirs")) == 1
    err = capsys.readouterr().err
    assert err.startswith("mpicomp: error: rank 1 on ")
    assert "Traceback" in err and "ZeroDivisionError: of theirs" in err
    assert err.count("Traceback") == 1


def test_interrupts_are_quiet(capsys):
    assert code_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""


def test_sys_exit_keeps_its_code(capsys):
    assert code_of(SystemExit(9)) == 9
    assert code_of(SystemExit("because")) == 1
    assert "because" in capsys.readouterr().err


def test_leaving_with_zero_is_no_failure():
    with pytest.raises(SystemExit) as caught:
        loopback.run(1, lambda world: fail(world, SystemExit(0), rank=0))
    assert caught.value.code == 0


def test_an_agreed_error_is_printed_once(capsys):
    def function(world):
        with guard(world), together(world):
            if world.rank != 1:
                raise ConfigError("run.seed = 'x': not an integer")

    with pytest.raises(SystemExit) as caught:
        loopback.run(3, function)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "mpicomp: error: run.seed = 'x': not an integer (on ranks 0, 2)\n"


def test_together_lets_other_exceptions_through():
    def function(world):
        with together(world):
            raise KeyError("not ours")

    with pytest.raises(KeyError):
        loopback.run(2, function)


def test_description_of_an_error():
    error = ConfigError("bad")
    assert describe(error) == "bad"
    assert "ConfigError: bad" in describe(error, debug=True)


def test_the_hook_is_installed_once(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)

    def function(world):
        install_excepthook(world)
        hook = sys.excepthook
        install_excepthook(world)
        assert sys.excepthook is hook
        try:
            raise DivergenceError("NaN")
        except DivergenceError as error:
            hook(type(error), error, error.__traceback__)

    with pytest.raises(SystemExit) as caught:
        loopback.run(1, function)
    assert caught.value.code == 5
