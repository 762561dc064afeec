"""A failure on one rank ends all of them, with one clear message and the error's exit code.

Without this, a rank that raises leaves the others waiting for its messages. Under MPICH 5.0.2 and Open MPI 5.0.11,
plain ``python`` then hangs in ``MPI_Finalize``.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

from mpicomp.errors import MpicompError
from mpicomp.exchange.base import Stopped, World

T = TypeVar("T")

_INTERRUPTED = 130
"""The exit code of a program ended by Ctrl-C."""

_agreed: weakref.WeakSet[MpicompError] = weakref.WeakSet()
"""Errors that all ranks have agreed on."""


_failed: weakref.WeakSet[World] = weakref.WeakSet()
"""Worlds whose program ends with an error."""


class Ranks(Protocol):
    """What an agreement needs of all ranks; a `World` has it."""

    size: int

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank; collective on all ranks."""


def agree(world: Ranks, error: MpicompError | None) -> None:
    """Raise an error on every rank if one rank has an error; collective on all ranks.

    For set-up, where each rank checks what only it can see (its data, its device). The error has the class and the exit
    code of the first rank that failed, and names the ranks.
    """
    failures = world.all_gather(None if error is None else (type(error), str(error)))
    if not any(failures):
        return
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    kind = next(iter(failed.values()))[0]
    verdict = kind(_summary({rank: message for rank, (_, message) in failed.items()}, world.size))
    _agreed.add(verdict)
    raise verdict from error


@contextmanager
def together(world: World) -> Iterator[None]:
    """Run a block of set-up on every rank, then `agree` on its errors; collective on all ranks.

    The block must not communicate, because a rank that fails in it would leave the others waiting.
    """
    error = None
    try:
        yield
    except MpicompError as failure:
        error = failure
    agree(world, error)


def is_agreed(error: BaseException) -> bool:
    """Return whether every rank raises `error`."""
    return isinstance(error, MpicompError) and error in _agreed


def has_failed(world: World) -> bool:
    """Return whether the program of `world` ends with an error that has been reported."""
    return world in _failed


def _summary(messages: dict[int, str], size: int) -> str:
    """Return what went wrong, and on which ranks unless `size` is one."""
    ranks: dict[str, list[int]] = {}
    for rank, message in messages.items():
        ranks.setdefault(message, []).append(rank)
    if size == 1:
        return next(iter(ranks))
    return "\n".join(f"{message} ({_ranks(where, size)})" for message, where in ranks.items())


def _ranks(ranks: list[int], size: int) -> str:
    if len(ranks) == size:
        return "on all ranks"
    return f"on rank {ranks[0]}" if len(ranks) == 1 else f"on ranks {', '.join(map(str, ranks))}"


@contextmanager
def guard(world: World, *, debug: bool = False) -> Iterator[None]:
    """End all ranks when the block raises on one: print error and rank to stderr, and exit with the error's code.

    An `MpicompError` is printed without its traceback, unless `debug`. An error that all ranks have agreed on is
    printed once, and each rank exits with its code. After Ctrl-C nothing is printed. SIGTERM keeps its default action.
    """
    try:
        yield
    except Stopped:
        raise
    except SystemExit as error:
        if error.code not in (None, 0):
            _end(world, error, debug)
        raise
    except BaseException as error:
        _end(world, error, debug)


def install_excepthook(world: World, *, debug: bool = False) -> None:
    """Make an uncaught exception of this program end all ranks, as `guard` does; a second call changes nothing.

    So does an uncaught ``sys.exit`` with another code than 0. Python calls no hook for ``raise SystemExit`` itself.
    """
    if isinstance(sys.excepthook, _Hook):
        return
    sys.excepthook = _Hook(world, debug)
    plain, pid = sys.exit, os.getpid()

    def leave(code: Any = None, /) -> NoReturn:
        # A process that was forked has no ranks to end, and a thread ends alone.
        if code in (None, 0) or os.getpid() != pid or threading.current_thread() is not threading.main_thread():
            plain(code)
        raise _Exit(code, world, debug)

    sys.exit = leave


class _Hook:
    """A `sys.excepthook`."""

    def __init__(self, world: World, debug: bool) -> None:
        self._world = world
        self._debug = debug

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        _end(self._world, error, self._debug)


class _Exit(SystemExit):
    """A `SystemExit` that ends all ranks if nobody catches it.

    Python reads the code of one that nobody has caught, with no frame of the program left; whoever catches one and
    reads its code has a frame.
    """

    def __init__(self, code: Any, world: World, debug: bool) -> None:
        super().__init__(code)
        self._code = code
        self._world = world
        self._debug = debug

    @property
    def code(self) -> Any:  # type: ignore[override]
        """The code with which the program ends."""
        if _is_uncaught():
            _end(self._world, self, self._debug)
        return self._code


def _is_uncaught() -> bool:
    """Return whether the property that calls this was read by Python itself, not by a program."""
    try:
        sys._getframe(2)
    except ValueError:
        return True
    return False


def _end(world: World, error: BaseException, debug: bool) -> NoReturn:
    _failed.add(world)
    if is_agreed(error):
        if world.rank == 0:
            _print(describe(error, debug=debug))
        world.barrier()  # Open MPI's launcher kills the other ranks as soon as one exits with an error.
        raise SystemExit(_exit_code(error))
    if not isinstance(error, KeyboardInterrupt):
        _print(f"rank {world.rank} on {world.host}: {describe(error, debug=debug)}")
    world.abort(_exit_code(error))


def describe(error: BaseException, *, debug: bool = False) -> str:
    """Return the lines to print for `error`; with its traceback if `debug`, or if it is no `MpicompError`."""
    if isinstance(error, SystemExit):
        return str(error) if isinstance(error.code, str) else f"exit code {error.code}"
    if isinstance(error, MpicompError) and not debug:
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    return "".join(traceback.format_exception(error)).rstrip()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, MpicompError) else 1


def _print(text: str) -> None:
    # One write, so that lines of several ranks do not mix.
    sys.stdout.flush()
    sys.stderr.write(f"mpicomp: error: {text}\n")
    sys.stderr.flush()
