"""The direction of imports: a module imports only from its own folder or from the left of the line in design order."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx

import mpicomp

ROOT = Path(mpicomp.__file__).parent
ORDER = [
    "errors",
    "plugins",
    "files",
    "timing",
    "state",
    "topology",
    "kernels",
    "compression",
    "exchange",
    "algorithms",
    "checkpoint",
    "replica",
    "data",
    "models",
    "config",
    "run",
    "slurm",
    "integrations",
    "cli",
]


def imports(path):
    """Yield the absolute names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    return [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("__init__.py", "__main__.py")]


def test_imports_go_left():
    wrong = []
    for path in modules():
        own = ORDER.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "mpicomp" and len(parts) > 1 and parts[1] in ORDER and ORDER.index(parts[1]) > own:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    """Not even for types alone: files that need each other's names are one thing, or a third one's."""
    names = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in modules() if p.stem != "__init__"}
    graph = nx.DiGraph((own, name) for own, path in names.items() for name in imports(path) if name in names)
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_only_exchange_and_doctor_import_mpi4py():
    wrong = {p.relative_to(ROOT).as_posix() for p in modules() if any(n.startswith("mpi4py") for n in imports(p))}
    assert {w for w in wrong if not w.startswith("exchange/")} <= {"cli/doctor.py"}


def test_topology_needs_no_torch():
    assert not [
        p
        for p in modules()
        if p.parent.name == "topology" and any(n.startswith("torch") for n in imports(p)) and p.parent.parent == ROOT
    ]


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, mpicomp, mpicomp.cli; mpicomp.topology; "
        "assert 'torch' not in sys.modules, 'torch'; "
        "mpicomp.distribute; assert 'mpi4py' not in sys.modules, 'mpi4py'; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
