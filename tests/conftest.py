"""Options of all tests, and Triton's interpreter.

``--sample N`` runs about one in N cases of each test that has more than `FEW`, always the same ones, unless the test is
marked as ``every_case``, and leaves out what is marked as ``long``. A test's cases are its parameters: methods,
compressors, graphs, sizes.

Where there is no GPU, Triton's interpreter must be chosen before anything imports triton, as torch does.
"""

import os
import zlib
from collections import defaultdict

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


FEW = 2
"""Of tests with so many cases, all are run."""


def pytest_addoption(parser):
    help = "run one in N cases of tests that have many, and no long tests"
    parser.addoption("--sample", type=int, default=1, metavar="N", help=help)


def pytest_collection_modifyitems(config, items):
    one_in = config.getoption("--sample")
    if one_in == 1:
        return
    cases = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("long"):
            cases[item.nodeid.partition("[")[0]].append(item)
    kept = {
        item
        for of_test in cases.values()
        for place, item in enumerate(of_test)
        if len(of_test) <= FEW
        or place == 0
        or item.get_closest_marker("every_case")
        or zlib.crc32(item.nodeid.encode()) % one_in == 0
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
