"""The pages of the documentation that are made from the code; `scripts/docs` builds the site of them."""

import posixpath
import re
import sys
from pathlib import Path

import click
import pytest

from mpicomp.algorithms import ALGORITHMS
from mpicomp.cli import COMMANDS, main
from mpicomp.compression import COMPRESSORS
from mpicomp.config.sections import SECTIONS

sys.path.insert(0, str(Path(__file__).parents[3] / "docs" / "site"))

import generator.links
import generator.pages
from generator.links import relink
from generator.pages import generated, measured


@pytest.fixture(scope="module")
def pages():
    return generated()


def test_each_algorithm_has_a_page_with_equations_advice_and_source(pages):
    for kind, algorithm in ALGORITHMS.items():
        text = pages[f"methods/{kind}.md"]
        assert "## Equations" in text, f"docs/site/methods/{kind}.md is to have the equations"
        assert "## When to use it" in text
        assert f"[`{algorithm.__name__}`][{algorithm.__module__}.{algorithm.__name__}]" in text
        assert f"]({kind}.md)" in pages["methods/index.md"]
        (source,) = re.findall(r"\| Source \| \[`.*?`\]\((.*?)\)", text)
        assert f"class {algorithm.__name__}(" in pages[posixpath.normpath(f"methods/{source}")]


def test_each_compressor_has_a_page_with_what_a_message_takes(pages):
    for kind in COMPRESSORS:
        assert "| Bytes |" in pages[f"compressors/{kind}.md"], f"the docstring of {kind} is to say 'Bytes: ...'"
        assert f"]({kind}.md)" in pages["compressors/index.md"]


def test_each_command_has_a_page_with_all_its_options(pages):
    context = click.Context(main, info_name="mpicomp")
    for name in COMMANDS:
        text = pages[f"cli/{name}.md"]
        for command in subcommands(main.get_command(context, name), context):
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.opts[0] in text, (name, parameter.opts)


def subcommands(command, context):
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from subcommands(command.get_command(context, name), context)


def test_each_section_has_a_page_with_its_keys_and_the_parameters_of_each_kind(pages):
    for name, section in SECTIONS.items():
        text = pages[f"toml/{name}.md"]
        for key in section.model_fields:
            assert f"| `{name}.{key}` |" in text
        for choice in section.choices.values():
            for kind, entry in choice.registry.items():
                assert f"`{kind}`" in text
                for key in choice.parameters(entry):
                    assert f"`{key}`" in text or f"`{key} = " in text or key == "lr", (name, kind, key)


def test_types_defaults_and_texts_are_those_of_the_code(pages):
    assert '| `run.device` | `"auto"` or `"cpu"` or `"cuda"` | `"auto"` | Where to compute;' in pages["toml/run.md"]
    assert (
        "| `training.batch_size` | whole number > 0 | `32` | Samples per rank and step. |" in pages["toml/training.md"]
    )
    assert "| `optimizer.lr` | number > 0 | *required* |" in pages["toml/optimizer.md"]
    assert "| `ratio` | number | *required* | the fraction" in pages["compressors/topk.md"]
    assert "| `momentum` | number | `0.9` | beta in [0, 1). |" in pages["methods/gmc.md"]


def test_each_public_module_has_a_page_of_the_api(pages):
    for module in ("mpicomp.algorithms.gossip.choco", "mpicomp.compression.topk", "mpicomp.topology"):
        assert pages[f"api/{module}.md"].startswith(f"::: {module}\n")
    assert not any(page.startswith("api/mpicomp.cli") for page in pages)


def test_measured_rows_are_those_of_the_method_under_the_first_of_their_table(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    table = "| method | points |\n| --- | --- |\n| SGD, uncompressed | 3 |\n| DGC, 1 % | 2 |\n| DC-ASGD | 1 |\n"
    (tmp_path / "docs/studies.md").write_text(f"# Studies\n\n## A *study*: one\n\n{table}\n")
    for module in (generator.links, generator.pages):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (found,) = measured("DGC, deep gradient compression", "DGC", "methods/dgc.md")
    assert found.splitlines()[0] == "From [A *study*: one](../studies.md#a-study-one):"
    assert found.splitlines()[2:] == table.splitlines()[:4]
    assert list(measured("ASGD", "ASGD", "methods/asgd.md")) == []


def test_links_of_a_file_lead_to_its_page():
    text = (
        "[a](mpicomp/algorithms/gossip/choco.py) [b](docs/lightning.md#x) [c](configs/methods) [d](https://x.y) [e](#z)"
    )
    assert relink(text, "README.md", "index.md") == (
        "[a](source/mpicomp/algorithms/gossip/choco.py.md) [b](lightning.md#x) [c](source/configs/methods/index.md) "
        "[d](https://x.y) [e](#z)"
    )
    assert relink("[a](../README.md)\n```\n[b](../README.md)\n```", "docs/a/b.md", "a/b.md") == (
        "[a](../README.md)\n```\n[b](../README.md)\n```"  # leads nowhere: the build says so
    )
    assert relink("[a](../README.md)", "docs/lightning.md", "lightning.md") == "[a](index.md)"
    assert relink("[a](../site/methods/motef.md#measured)", "docs/studies/a.md", "studies/a.md") == (
        "[a](../methods/motef.md#measured)"
    )
