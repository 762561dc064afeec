"""Values of the command line."""

import pytest

from mpicomp.config.toml import parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        (" 0.5 ", 0.5),
        ("true", True),
        ("'ring'", "ring"),
        ("[4, 2]", [4, 2]),
        ("{ a = 1 }", {"a": 1}),
        ("ring", "ring"),
        ("a b", "a b"),
        ("", ""),
        ("3\nlazy = true", "3\nlazy = true"),
        ("3\n[section]", "3\n[section]"),
    ],
)
def test_a_text_that_is_not_one_toml_value_is_text(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)
