"""Reading TOML: whole texts, and single values of the command line."""

from __future__ import annotations

import sys
from typing import Any

from mpicomp.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(text: str, source: str) -> dict[str, Any]:
    """Return the values of a text.

    Raises:
        ConfigError: it is not TOML; the message begins with `source`.

    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: is not TOML: {error}") from error


def parse_value(text: str) -> Any:
    """Return the value in a text such as ``[4, 2]``; the text itself if it is not one TOML value."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text
