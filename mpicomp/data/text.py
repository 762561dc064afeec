"""Data sets of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpicomp.data.arguments import require_positive
from mpicomp.data.dataset import Dataset, Samples
from mpicomp.data.files import damaged, data_folder, find, folder_origin
from mpicomp.data.tokens import byte_pairs, read_text, vocabulary_size
from mpicomp.errors import ConfigError, DataError

TINYSHAKESPEARE_CHARACTERS = 1_115_394


def tinyshakespeare(folder: Path | None, context: int = 64) -> Dataset:
    """1,115,394 characters of Shakespeare (Karpathy 2015, char-rnn); the last tenth for testing."""
    path = find("tinyshakespeare", "tinyshakespeare.txt", folder)
    try:
        text = read_text(path)
    except DataError as error:
        raise damaged("tinyshakespeare", path, "it is not UTF-8 text") from error
    if len(text) != TINYSHAKESPEARE_CHARACTERS:
        raise damaged("tinyshakespeare", path, f"{len(text)} characters instead of {TINYSHAKESPEARE_CHARACTERS}")
    return _character_windows("tinyshakespeare", path, text, context)


def text(
    folder: Path | None,
    file: str | tuple[str, ...] = ("**/*.txt", "**/*.md"),
    context: int = 64,
    tokenizer: str = "characters",
    vocabulary: int = 4096,
    cache: Path | None = None,
) -> Dataset:
    """UTF-8 text of one's own, a file or a folder of files, cut into windows; the last tenth for testing.

    Args:
        folder: the file, or the folder with the files.
        file: the files of the folder, by name or pattern. They are taken in the order of their paths. Patterns do not
            match hidden files.
        context: how many tokens a model sees.
        tokenizer: ``"characters"``: a token is a character, of at most 256 different ones, and the texts are joined by
            newlines. ``"bpe"``: byte-level byte-pair encoding, trained on the training part; see
            `mpicomp.data.tokens`. Or the path of a ``tokenizer.json``: that of a run, or of Hugging Face's
            `tokenizers`.
        vocabulary: the largest number of different tokens of ``"bpe"``.
        cache: the folder that keeps the tokens of ``"bpe"``; by default ``.mpicomp`` beside the files.

    Raises:
        ConfigError: a value is out of its range, or ``"bpe"`` needs a package that is missing.
        DataError: there are no files, one is no UTF-8 text, or all are shorter than ten contexts; or a text has a
            character that the tokenizer of a run lacks.

    """
    given = None if tokenizer in ("characters", "bpe") else _read_tokenizer(tokenizer)
    characters = None if given is None else json.loads(given).get("characters")
    source, paths = data_folder(folder), _text_files(file, folder)
    if tokenizer == "characters" or characters is not None:
        return _character_windows("text", source, "\n".join(map(read_text, paths)), context, characters)
    cache = cache or (source.parent if source.is_file() else source) / ".mpicomp"
    found = byte_pairs(paths, vocabulary, cache, given)
    return _windows("text", source, (found.train, found.test), found.vocabulary, context, found.tokenizer)


def _read_tokenizer(name: str) -> str:
    """Return the content of the tokenizer file `name`; raise ConfigError if it is none."""
    if not name.endswith(".json"):
        raise ConfigError(
            f"data.tokenizer = {name!r} must be 'characters', 'bpe', or the path of a tokenizer.json, as in the folder "
            "of a run"
        )
    try:
        content = Path(name).read_text(encoding="utf-8")
        if "characters" not in json.loads(content):
            vocabulary_size(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data.tokenizer = {name!r} is no tokenizer.json: {error}") from error
    return content


def _text_files(file: str | tuple[str, ...], path: Path | None) -> list[Path]:
    """Return the files that `file` names in the data folder, in the order of their paths; or `path` if it is a file."""
    folder = data_folder(path)
    if folder.is_file():
        return [folder]
    wanted = [file] if isinstance(file, str) else file
    found: set[Path] = set()
    for name in wanted:
        if (folder / name).is_file():
            found.add(folder / name)
            continue
        try:
            matches = [match for match in folder.glob(name) if match.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"data.file = {name!r} is no name or pattern of files in {folder}: {error}") from error
        found.update(m for m in matches if not any(part.startswith(".") for part in m.relative_to(folder).parts))
    if not found:
        raise DataError(
            f"data.kind = 'text' needs {' or '.join(wanted)}, and there is no such file in {folder.absolute()} "
            f"({folder_origin(path)}). Set data.path to a text or to a folder of texts, or data.file to their names."
        )
    return sorted(found, key=lambda path: path.as_posix())


def _character_windows(kind: str, source: Path, text: str, context: int, known: str | None = None) -> Dataset:
    """Return a text of which each character is a token: its own, in their order, or the `known` ones."""
    characters, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    own = "".join(map(chr, characters))
    if known is not None:
        if unknown := set(own) - set(known):
            raise DataError(f"data.tokenizer: the text {source} has the character {min(unknown)!r}, which it lacks.")
        ids = np.array([known.index(character) for character in own])[ids]
    elif len(characters) > 256:
        raise DataError(
            f"data.kind = {kind!r}: the text {source} has {len(characters)} different characters, but at most 256 can "
            "be tokens. Set data.tokenizer = 'bpe'."
        )
    coded, tests = ids.astype(np.uint8), len(ids) // 10
    parts = coded[: len(ids) - tests], coded[len(ids) - tests :]
    used = own if known is None else known
    return _windows(kind, source, parts, len(used), context, json.dumps({"characters": used}))


def _windows(
    kind: str, source: Path, tokens: Sequence[npt.NDArray[Any]], vocabulary: int, context: int, tokenizer: str
) -> Dataset:
    """Cut training and test tokens into windows of ``context + 1`` that overlap by one: each is predicted once.

    The windows are views of the tokens.
    """
    require_positive("data", context=context)
    train, test = map(len, tokens)
    if min(train, test) < context + 1:
        raise DataError(
            f"data.context = {context}: the text {source} has {train} tokens for training and, in its last tenth, "
            f"{test} for testing, but each must be a window of {context + 1} at least. Take a longer text or a shorter "
            "context."
        )
    windows = [torch.from_numpy(part).unfold(0, context + 1, context) for part in tokens]
    first, last = (Samples(part, torch.zeros(len(part), dtype=torch.int64)) for part in windows)
    return Dataset(kind, "language", vocabulary, first, last, tokenizer=tokenizer)
