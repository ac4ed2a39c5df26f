"""Real text: what to train on, and what to keep aside for validation; as the demo's character ids."""

from __future__ import annotations

import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

UNKNOWN = 0  # the id of every character outside the vocabulary
VOCABULARY = 128  # the unknown character and the 127 most frequent ones: Python's library hardly uses more
VALIDATION_EVERY = 10  # every tenth file is kept aside
VALIDATION_STREAMS, VALIDATION_LENGTH = 64, 1600


class TextError(ValueError):
    """There is not enough text to train on; the message says what to do."""


@dataclass(frozen=True)
class Corpus:
    """Character ids, split by files.

    train: (number of characters,) int64, the training files in order of their names.
    validation: (streams, length) int64, pieces spread evenly over the validation files.
    """

    characters: str  # the id of characters[k] is k + 1
    train: np.ndarray
    validation: np.ndarray
    train_files: int
    validation_files: int

    @property
    def vocabulary(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> np.ndarray:
        return _encode(text, self.characters)

    def decode(self, ids: list[int]) -> str:
        return "".join("\N{REPLACEMENT CHARACTER}" if i == UNKNOWN else self.characters[i - 1] for i in ids)


def standard_library() -> Path:
    """The folder of Python's own standard library: real text that is on every machine with Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_files(folder: Path) -> tuple[list[str], list[str]]:
    """The texts of the folder's *.py files to train on, and for validation; sorted, so that every run sees the same.

    Every tenth file is for validation; of fewer than ten files, the last. A single file is cut in two.
    Raises TextError where there are none with text.
    """
    texts = [path.read_text("utf-8", errors="replace") for path in sorted(folder.glob("*.py")) if path.is_file()]
    texts = [text for text in texts if text]
    if not texts:
        raise TextError(f"{folder} has no *.py files with text in them: name another folder with --text.")
    if len(texts) == 1:
        cut = len(texts[0]) * (VALIDATION_EVERY - 1) // VALIDATION_EVERY
        texts = [texts[0][:cut], texts[0][cut:]]
    every = min(VALIDATION_EVERY, len(texts))
    return [text for i, text in enumerate(texts) if i % every != every - 1], texts[every - 1 :: every]


def read_corpus(folder: Path) -> Corpus:
    """The characters of `read_files`. Raises TextError where there is hardly any text."""
    train, validation = read_files(folder)
    train_text = "".join(train)
    characters = "".join(character for character, _ in Counter(train_text).most_common(VOCABULARY - 1))
    validation_ids = _encode("".join(validation), characters)
    if min(len(train_text), len(validation_ids)) < 3:
        raise TextError(f"{folder} has too little text: name another folder with --text.")
    return Corpus(
        characters=characters,
        train=_encode(train_text, characters),
        validation=spread(validation_ids, VALIDATION_STREAMS, VALIDATION_LENGTH),
        train_files=len(train),
        validation_files=len(validation),
    )


def _encode(text: str, characters: str) -> np.ndarray:
    ids = {character: i for i, character in enumerate(characters, start=1)}
    return np.fromiter((ids.get(character, UNKNOWN) for character in text), dtype=np.int64, count=len(text))


def spread(ids: np.ndarray, streams: int, length: int) -> np.ndarray:
    """(streams, length): the beginnings of equal slices of `ids`; few and short ones where there is little text."""
    streams = min(streams, max(1, len(ids) // length))
    slices = ids[: len(ids) // streams * streams].reshape(streams, -1)
    return slices[:, :length]


def windows_of_step(windows: int, batch: int, step: int, seed: int) -> Tensor:
    """Which of a text's windows a step sees, (batch,): from all over it, each once before any comes again."""
    steps_a_pass = windows // batch
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed + step // steps_a_pass))
    return order[step % steps_a_pass * batch :][:batch]
