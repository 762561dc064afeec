"""The README, its neighbors and the pages under docs/: marked commands run, all commands exist, links lead somewhere.

A comment before a block, which a reader does not see, says what to do with it:

    <!-- run -->                               run its commands; all blocks of a page, in order, in one folder
    <!-- run, exit 2 -->                       the same, of commands that end with this exit code
    <!-- run: --set training.steps=40 -->      the same, with further options for every `mpicomp train`
    <!-- file: round_robin.py -->              write the block into that file of the folder
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from mpicomp.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [
    *map(ROOT.joinpath, ("README.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PARTS = ("configs", "scripts", "slurm")
"""Folders of the repository that commands name."""

BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = re.compile(r"run(?:, exit (?P<code>\d+))?(?:: (?P<options>.+))?")
FILE = re.compile(r"file: (?P<name>[\w.]+)")

over_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block, with the comment before it."""

    mark: str
    kind: str
    text: str

    @property
    def commands(self):
        """What stands behind the prompts; a command goes on in the lines up to the next prompt."""
        if self.kind != "console":
            return []
        return [command.strip() for command in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]]


def blocks(page):
    return [Block(found["mark"] or "", found["kind"], found["text"]) for found in BLOCK.finditer(page.read_text())]


def to_run(page):
    """The commands of the blocks that are marked, with the exit code of each and further options for training."""
    for block in blocks(page):
        if found := RUN.fullmatch(block.mark):
            for command in block.commands:
                yield command, int(found["code"] or 0), found["options"] or ""


def words(command):
    """The words of a shell command without comments, with those of a command in quotes in the place of it."""
    for word in shlex.split(command.replace("\\\n", " "), comments=True):
        yield from words(word) if " " in word else [word]


def calls(command):
    """The arguments of each `mpicomp` in a shell command."""
    found = None
    for word in [*words(command), ";"]:
        if word in ("mpicomp", ";", "&&", "||", "|", "&"):
            if found is not None:
                yield found
            found = [] if word == "mpicomp" else None
        elif found is not None:
            found.append(word)


@pytest.fixture
def parse(monkeypatch):
    """Click's own parser: `mpicomp` with these arguments, of which no command does anything."""

    def disarm(command):
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                disarm(command.get_command(context, name))
        else:
            monkeypatch.setattr(command, "callback", lambda **_: None)

    context = click.Context(main)
    disarm(main)
    return lambda arguments: main(list(arguments), prog_name="mpicomp", standalone_mode=False)


@pytest.mark.parametrize(
    "arguments", [["trian"], ["checkpoint", "lss", "x"], ["train", "x.toml", "--loopbak", "4"], ["slurm", "submit"]]
)
def test_the_parser_refuses_what_does_not_exist(parse, arguments):
    with pytest.raises(click.UsageError):
        parse(arguments)


def test_words_of_a_command():
    command = "A=1 mpiexec -n 2 sh -c 'mpicomp train x.toml --set a=1 || sleep 1'   # and so on\n"
    assert list(calls(command)) == [["train", "x.toml", "--set", "a=1"]]
    assert list(calls("mpicomp a \\\n  --b && mpicomp c")) == [["a", "--b"], ["c"]]


@over_pages
def test_every_command_exists(parse, page):
    for block in blocks(page):
        for command in block.commands:
            for arguments in calls(command):
                try:
                    parse(arguments)
                except click.ClickException as error:
                    pytest.fail(f"{command}: {error.format_message()}")


@over_pages
def test_every_command_in_a_sentence_exists(parse, page):
    prose = BLOCK.sub("", page.read_text())
    for command in re.findall(r"`(mpicomp [^`|]+)`", prose):
        try:
            parse(shlex.split(command)[1:])
        except (click.BadParameter, click.BadOptionUsage, click.exceptions.NoArgsIsHelpError):
            pass  # the sentence says the rest, or has N for a number
        except click.ClickException as error:
            pytest.fail(f"{command}: {error.format_message()}")


@over_pages
def test_files_that_commands_name_exist(page):
    commands = [command for block in blocks(page) for command in block.commands]
    named = {word for command in commands for word in words(command) if word.split("/")[0] in PARTS and "/" in word}
    missing = sorted(word for word in named if not (ROOT / word).exists())
    assert not missing


@over_pages
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    paths = [page.parent / target for target in targets if target and not target.startswith(("http:", "https:"))]
    assert not [path for path in paths if not path.exists()]


def test_marks_are_known():
    marks = [block.mark for page in PAGES for block in blocks(page) if block.mark]
    assert not [mark for mark in marks if not RUN.fullmatch(mark) and not FILE.fullmatch(mark)]
    written = sum(len(re.findall(r"^<!-- (?:run|file)", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert written == len(marks)  # each stands right before its block


def test_many_commands_run():
    assert sum(1 for page in PAGES for _ in to_run(page)) >= 12


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(to_run(page))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_marked_commands_run(tmp_path, monkeypatch, page):
    for part in PARTS:
        (tmp_path / part).symlink_to(ROOT / part)
    for block in blocks(page):
        if found := FILE.fullmatch(block.mark):
            (tmp_path / found["name"]).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    for command, code, options in to_run(page):
        line, comment, rest = command.partition(" #")
        line = f"{line} {options}{comment}{rest}" if "mpicomp train" in line else command
        ended_with, output, errors = execute(line)
        assert ended_with == code, f"{line}\n{output[-2000:]}\n{errors[-4000:]}"
        if code:
            shown = [block.text.strip() for block in blocks(page) if block.kind == "text"]
            assert errors.strip() in shown, errors


def execute(line):
    """Return the exit code and both outputs of a command; a plain `mpicomp` runs here, which saves its start."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "mpicomp" and arguments[0] != "doctor" and not set("|&;<>$") & set(line):  # the doctor starts MPI
        done = CliRunner().invoke(main, arguments, prog_name="mpicomp")
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout, done.stderr
