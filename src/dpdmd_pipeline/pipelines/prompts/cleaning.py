"""From lines of a prompt file to unique, normalised texts, with some dozen bytes a line in memory."""

import hashlib
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from dpdmd_pipeline.datasets.prompt_file import PromptFile

MAX_LISTED = 1000  # dropped lines a file that the report lists; it counts all


def clean_text(text: str) -> str:
    """The text in NFC, without byte order marks, its white space collapsed; the words stay as they are."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    return " ".join(text.split())


def text_hash(text: str) -> int:
    """64 bits that stand for a text; two of a million differ in it with probability 1 - 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def first_places(hashes: np.ndarray) -> np.ndarray:
    """For each entry the place of the first equal one, [n]."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


@dataclass(frozen=True)
class Survey:
    """What one pass over a prompt file found.

    Attributes:
        num_lines: blank ones included.
        empty: their line numbers.
        numbers: line numbers of the others, [n].
        hashes: of their clean texts, uint64 [n].
        first: place among the n of the first line with the same text, [n].
    """

    file: PromptFile
    num_lines: int
    empty: np.ndarray
    numbers: np.ndarray
    hashes: np.ndarray
    first: np.ndarray

    @property
    def is_first(self) -> np.ndarray:
        """Which of the n lines are kept, bool [n]."""
        return self.first == np.arange(len(self.first))

    def texts(self) -> Iterator[str]:
        """The n clean texts, read anew."""
        return filter(None, (clean_text(line.text) for line in self.file.lines()))

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Every dropped line and why, in the order of the file."""
        repeated = np.flatnonzero(~self.is_first)
        numbers = np.concatenate([self.empty, self.numbers[repeated]])
        originals = np.concatenate([np.zeros_like(self.empty), self.numbers[self.first[repeated]]])
        for place in np.argsort(numbers):
            reason = f"repeats line {originals[place]}" if originals[place] else "empty"
            yield {"file": self.file.path.name, "line": int(numbers[place]), "reason": reason}

    def report(self) -> dict[str, Any]:
        """The counts, and the first MAX_LISTED dropped lines."""
        return {
            "file": self.file.path.name,
            "numbered_list": self.file.is_numbered_list(),
            "lines": self.num_lines,
            "kept": int(self.is_first.sum()),
            "empty": len(self.empty),
            "repeated": int((~self.is_first).sum()),
            "dropped": list(islice(self.dropped(), MAX_LISTED)),
        }


def survey(file: PromptFile) -> Survey:
    """Read a prompt file once.

    Raises:
        ValueError: if the file is empty, has blank lines only, or is malformed.
        OSError: if it cannot be read.
    """
    num_lines, empty, numbers, hashes = 0, array("L"), array("L"), array("Q")
    for line in file.lines():
        num_lines += 1
        if text := clean_text(line.text):
            numbers.append(line.number)
            hashes.append(text_hash(text))
        else:
            empty.append(line.number)
    if not num_lines:
        raise ValueError(f"prompt file {file.path} is empty: write one prompt a line")
    if not hashes:
        raise ValueError(f"prompt file {file.path} has no prompt: its {num_lines} lines are blank")
    codes = np.array(hashes, dtype=np.uint64)
    return Survey(file, num_lines, np.array(empty, np.int64), np.array(numbers, np.int64), codes, first_places(codes))


@dataclass(frozen=True)
class Selection:
    """Lines of a survey that become records.

    Attributes:
        kept, train, evaluate: bool [n].
    """

    survey: Survey
    kept: np.ndarray
    train: np.ndarray
    evaluate: np.ndarray

    def records(self) -> Iterator[dict[str, Any]]:
        flags = zip(self.kept.tolist(), self.train.tolist(), self.evaluate.tolist(), strict=True)
        for text, (kept, train, evaluate) in zip(self.survey.texts(), flags, strict=True):
            if kept:
                yield {"text": text, "train": train, "eval": evaluate}


@dataclass(frozen=True)
class CleanPrompts:
    """Records {"text": unique, "train": bool, "eval": bool}, streamed from the files at each iteration."""

    selections: list[Selection]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for selection in self.selections:
            yield from selection.records()

    def count(self) -> dict[str, int]:
        """Unique prompts in all, per use, and in both."""
        kept = [(part.train[part.kept], part.evaluate[part.kept]) for part in self.selections]
        return {
            "prompts": sum(len(train) for train, _ in kept),
            "train": int(sum(train.sum() for train, _ in kept)),
            "eval": int(sum(evaluate.sum() for _, evaluate in kept)),
            "both": int(sum((train & evaluate).sum() for train, evaluate in kept)),
        }


def split_by_files(train: Survey, evaluation: Survey) -> CleanPrompts:
    """Training prompts, then those that are in the evaluation file only; a text of both files is both."""
    shared = np.isin(train.hashes, evaluation.hashes)
    new = evaluation.is_first & ~np.isin(evaluation.hashes, train.hashes)
    return CleanPrompts(
        [
            Selection(train, train.is_first, np.ones_like(shared), shared),
            Selection(evaluation, new, np.zeros_like(new), np.ones_like(new)),
        ]
    )


def split_by_hash(train: Survey, share: float) -> CleanPrompts:
    """About `share` of the prompts for evaluation, the others for training; a text's side never changes.

    Raises:
        ValueError: if either side is empty.
    """
    evaluate = train.hashes < np.uint64(share * 2**64)
    prompts = CleanPrompts([Selection(train, train.is_first, ~evaluate, evaluate)])
    counts = prompts.count()
    for use in ("train", "eval"):
        if not counts[use]:
            raise ValueError(
                f"prompts.eval_share {share} leaves no {use} prompt of the {counts['prompts']} in {train.file.path}: "
                "change it, give more prompts, or set it to null and give an evaluation file"
            )
    return prompts
