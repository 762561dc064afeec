"""One graph for all ranks of a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec
from weakref import WeakValueDictionary

from mpicomp.topology.base import Topology

P = ParamSpec("P")


def shared(build: Callable[P, Topology]) -> Callable[P, Topology]:
    """Let `build` return the graph that it has made of the same arguments, as long as somebody holds it.

    Ranks that are threads of one process build a graph once so, and find out once how fast it mixes.
    """
    graphs: WeakValueDictionary[str, Topology] = WeakValueDictionary()

    @wraps(build)
    def find_or_build(*args: P.args, **kwargs: P.kwargs) -> Topology:
        # Text tells 1 from True and 1.0, which are equal as keys, and may be made of lists.
        key = repr((args, sorted(kwargs.items())))
        found = graphs.get(key)
        return found if found is not None else graphs.setdefault(key, build(*args, **kwargs))

    return find_or_build
