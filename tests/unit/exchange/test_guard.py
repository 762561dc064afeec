"""What a failure prints, and with which code all ranks end."""

import subprocess
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


LEAVES = """
import argparse, os, sys, threading
from mpicomp.exchange.guard import install_excepthook

class World:
    rank, host = 1, "node"
    def abort(self, code):
        print(f"ends all ranks with {code}", flush=True)
        os._exit(code)

install_excepthook(World())
try:
    BODY
finally:
    print("cleaned up", flush=True)
"""
CAUGHT = """
    try:
        sys.exit(3)
    except SystemExit as error:
        print(error.code)
"""
FORKED = """
    if os.fork() == 0:
        sys.exit(3)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(
    ("body", "code", "output"),
    [
        ("sys.exit(3)", 3, "cleaned up\nends all ranks with 3\n"),
        ("sys.exit('rank 1 gives up')", 1, "cleaned up\nends all ranks with 1\n"),
        ("argparse.ArgumentParser().parse_args(['--no'])", 2, "cleaned up\nends all ranks with 2\n"),
        ("sys.exit()", 0, "cleaned up\n"),
        ("sys.exit(0)", 0, "cleaned up\n"),
        (CAUGHT, 0, "3\ncleaned up\n"),
        ("thread = threading.Thread(target=sys.exit, args=(3,)); thread.start(); thread.join()", 0, "cleaned up\n"),
        (FORKED, 0, "cleaned up\n3\ncleaned up\n"),
    ],
    ids=["code", "text", "argparse", "none", "zero", "caught", "thread", "fork"],
)
def test_sys_exit_on_one_rank_ends_all_of_them(body, code, output):
    program = LEAVES.replace("    BODY", body if body.startswith("\n") else f"    {body}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, output), done.stderr
    assert ("mpicomp: error: rank 1 on node: " in done.stderr) == ("ends" in output)
    assert ("rank 1 gives up" in done.stderr) == ("gives up" in body)


def test_the_hook_is_installed_once(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "exit", sys.exit)

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
