"""Tokens of a text by byte-level byte-pair encoding: trained and encoded once, then read from the disk by all ranks.

    <cache>/<digest>/tokenizer.json     for Hugging Face's `tokenizers`: Tokenizer.from_file
    <cache>/<digest>/train.npy          (n,) int16; int32 for a vocabulary of more than 32,768
    <cache>/<digest>/test.npy           (m,)

Frequent pairs of neighbors are joined to new tokens, from the 256 bytes on (Sennrich et al. 2016, arXiv 1508.07909;
Radford et al. 2019, GPT-2). Every text ends with a token of its own, ``<|endoftext|>``.

A tokenizer that exists may be used instead, of a run or of anyone. One of characters is a JSON file, too:
``{"characters": "abc"}``.

The digest is that of texts and vocabulary or tokenizer: a changed file has other tokens, and never those of before. A
folder appears under its name when it is complete, by one rename, so no process reads half of it. The first process does
the work, and the others wait for it; on a file system without locks each does it, and the first to end wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpicomp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.int16] | npt.NDArray[np.int32]

END_OF_TEXT = "<|endoftext|>"
LEAST_VOCABULARY = 257
PIECE = 2**18
"""Characters that are encoded at a time; a piece ends at the end of a line."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, memory-mapped.

    Attributes:
        train: (n,) of the first nine tenths of the characters.
        test: (m,) of the rest.
        vocabulary: how many different tokens there may be.
        tokenizer: the content of ``tokenizer.json``.

    """

    train: Ids
    test: Ids
    vocabulary: int
    tokenizer: str


def read_text(path: Path) -> str:
    """Return the content of a UTF-8 file, with line ends as newlines; raise DataError if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.path: the file {path} is not UTF-8 text ({error}). Check the file.") from error


def byte_pairs(paths: Sequence[Path], vocabulary: int, cache: Path, tokenizer: str | None = None) -> Tokens:
    """Return the tokens of some texts from `cache`; if they are not there, train the tokenizer and encode the texts.

    Args:
        paths: the files, in their order. The tokenizer sees only the first nine tenths of the characters.
        vocabulary: the largest number of tokens; less if no pair of tokens occurs twice.
        cache: the folder for tokens, which is made if it is missing.
        tokenizer: the content of a ``tokenizer.json`` that is to be used; None to train one.

    Raises:
        ConfigError: the vocabulary is too small, or tokenizers is not installed.
        DataError: a file is no UTF-8 text, the cache cannot be written, or is damaged.

    """
    if vocabulary < LEAST_VOCABULARY:
        raise ConfigError(
            f"data.vocabulary = {vocabulary}: must be at least {LEAST_VOCABULARY}, for 256 bytes and the end of a text."
        )
    folder = cache / _digest(paths, str(vocabulary))
    if tokenizer is not None and not (folder.is_dir() and _read_tokenizer(folder) == tokenizer):
        folder = cache / _digest(paths, tokenizer)
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache / "lock"):
                if not folder.is_dir():
                    _make(folder, [read_text(path) for path in paths], vocabulary, tokenizer)
        except OSError as error:
            raise DataError(
                f"data.cache: tokens cannot be written to {cache} ({error}). Set data.cache to a folder that you may "
                "write to."
            ) from error
    try:
        # A private mapping: torch warns of arrays that are read-only, and the file stays as it is in any case.
        train, test = (np.load(folder / f"{part}.npy", mmap_mode="c") for part in ("train", "test"))
        found = _read_tokenizer(folder)
        size = vocabulary_size(found)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"data.cache: the folder {folder} is damaged ({error}). Remove it; it is made anew.") from error
    return Tokens(train, test, size, found)


def _read_tokenizer(folder: Path) -> str:
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


def _digest(paths: Sequence[Path], tokens: str) -> str:
    """Return 32 hexadecimal digits that depend on the files' contents, their order, and what the tokens are."""
    total = hashlib.blake2b(f"byte pairs, {tokens}".encode(), digest_size=16)
    for path in paths:
        content = hashlib.blake2b()
        try:
            with path.open("rb") as file:
                while block := file.read(2**20):
                    content.update(block)
        except OSError as error:
            raise DataError(f"data.path: the file {path} cannot be read ({error}).") from error
        total.update(content.digest())
    return total.hexdigest()


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds `lock`. The system releases it if its holder dies."""
    with lock.open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, texts: Sequence[str], vocabulary: int, given: str | None) -> None:
    """Train a tokenizer unless it is given, encode the texts, and store both, unless another process was faster."""
    total = sum(map(len, texts))
    train, test = _parted(texts, total - total // 10)
    tokenizer = _trained(train, vocabulary) if given is None else _library().Tokenizer.from_str(given)
    content = tokenizer.to_str(pretty=True) if given is None else given
    dtype = np.int16 if vocabulary_size(content) <= 2**15 else np.int32
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        (temporary / "tokenizer.json").write_text(content, encoding="utf-8")
        for name, part in (("train", train), ("test", test)):
            np.save(temporary / f"{name}.npy", _encoded(tokenizer, part, dtype))
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parted(texts: Sequence[str], characters: int) -> tuple[list[str], list[str]]:
    """Return the first `characters` of the texts, and the rest."""
    first, rest = [], []
    for text in texts:
        first.append(text[:characters])
        rest.append(text[characters:])
        characters = max(characters - len(text), 0)
    return [text for text in first if text], [text for text in rest if text]


def vocabulary_size(tokenizer: str) -> int:
    """Return how many tokens a tokenizer has, given the content of its ``tokenizer.json`` of Hugging Face."""
    found = json.loads(tokenizer)
    known = found["model"]["vocab"]  # numbers by token; of some kinds, a list of tokens
    numbers = known.values() if isinstance(known, dict) else range(len(known))
    return 1 + int(max([*numbers, *(token["id"] for token in found.get("added_tokens", []))]))


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "data.tokenizer = 'bpe' needs the package tokenizers: pip install tokenizers, or 'mpicomp[text]'"
        ) from error
    return tokenizers


def _trained(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    library = _library()
    tokenizer: Tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return tokenizer


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], dtype: Any) -> Ids:
    """Return the tokens of the texts, (n,), with an end after each if the tokenizer has a token for it."""
    number = tokenizer.token_to_id(END_OF_TEXT)
    end = np.array([] if number is None else [number], dtype)
    parts = []
    for text in texts:
        parts += [np.array(tokenizer.encode(piece, add_special_tokens=False).ids, dtype) for piece in _pieces(text)]
        parts.append(end)
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text after the first end of a line from `PIECE` characters on, again and again."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:stop]
        start = stop
