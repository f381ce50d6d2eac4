"""Clean, deduplicate and split prompts, with a few dozen bytes per line in memory."""

import hashlib
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from dpdmd_pipeline.datasets.prompt_file import PromptFile

MAX_LISTED = 1000  # dropped lines per file in the report's list; its counts include all


def clean_text(text: str) -> str:
    """Normalise a text to NFC without byte order marks, and collapse white space; the words do not change."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    return " ".join(text.split())


def _hash(text: str) -> int:
    """64-bit hash of a text; a million texts all have different hashes with probability 1 - 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Survey:
    """Result of one pass over a prompt file; n of its lines are not blank."""

    file: PromptFile
    num_lines: int  # of the file, blank lines included
    empty: np.ndarray  # line numbers of the blank lines
    numbers: np.ndarray  # line numbers of the others, [n]
    hashes: np.ndarray  # of their clean texts, uint64 [n]
    first: np.ndarray  # index, among the n, of the first line with the same text, [n]
    kept: np.ndarray  # True for the lines that become prompts, bool [n]

    def texts(self) -> Iterator[str]:
        """Read the n clean texts again."""
        return filter(None, (clean_text(line.text) for line in self.file.lines()))

    def dropped(self) -> Iterator[dict[str, Any]]:
        """Every dropped line with the reason, in the order of the file."""
        repeated = np.flatnonzero(self._repeated)
        numbers = np.concatenate([self.empty, self.numbers[repeated]])
        originals = np.concatenate([np.zeros_like(self.empty), self.numbers[self.first[repeated]]])
        for index in np.argsort(numbers):
            reason = f"repeats line {originals[index]}" if originals[index] else "empty"
            yield {"file": self.file.path.name, "line": int(numbers[index]), "reason": reason}

    @property
    def _repeated(self) -> np.ndarray:
        return self.first != np.arange(len(self.first))

    def report(self) -> dict[str, Any]:
        """Counts, and the first MAX_LISTED dropped lines."""
        return {
            "file": self.file.path.name,
            "numbered_list": self.file.is_numbered_list(),
            "lines": self.num_lines,
            "kept": int(self.kept.sum()),
            "empty": len(self.empty),
            "repeated": int(self._repeated.sum()),
            "not_taken": int((~self.kept & ~self._repeated).sum()),
            "dropped": list(islice(self.dropped(), MAX_LISTED)),
        }


def survey(file: PromptFile) -> Survey:
    """Read a prompt file once."""
    num_lines, empty, numbers, hashes = 0, array("L"), array("L"), array("Q")
    for line in file.lines():
        num_lines += 1
        if text := clean_text(line.text):
            numbers.append(line.number)
            hashes.append(_hash(text))
        else:
            empty.append(line.number)
    if not num_lines:
        raise ValueError(f"prompt file {file.path} is empty: write one prompt a line")
    if not hashes:
        raise ValueError(f"prompt file {file.path} has no prompt: its {num_lines} lines are blank")
    codes = np.array(hashes, dtype=np.uint64)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    first = first[inverse]
    kept = first == np.arange(len(first))
    return Survey(file, num_lines, np.array(empty, np.int64), np.array(numbers, np.int64), codes, first, kept)


def take(result: Survey, count: int, seed: int) -> Survey:
    """Keep `count` of the prompts, chosen by a hash of text and seed: a file that grows changes few of them."""
    rows = np.flatnonzero(result.kept)
    if count > len(rows):
        raise ValueError(
            f"prompts.take={count}, but {result.file.path} has {len(rows)} different prompts: give at most as many, "
            "or null for all"
        )
    # `split_by_hash` reads the hash's high bits; those of the product follow from all lower ones.
    order = (result.hashes[rows] ^ np.uint64(_hash(str(seed)))) * np.uint64(0x9E3779B97F4A7C15)
    kept = np.zeros_like(result.kept)
    kept[rows[np.argpartition(order, count - 1)[:count]]] = True
    return replace(result, kept=kept)


@dataclass(frozen=True)
class CleanPrompts:
    """Records {"text": unique, "train": bool, "eval": bool}, streamed from the files in each iteration.

    Attributes:
        selections: for each file its survey, and for its n texts [3, n] bool: is kept, trains, evaluates.
    """

    selections: list[tuple[Survey, np.ndarray]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for survey, flags in self.selections:
            for text, is_kept, train, evaluate in zip(survey.texts(), *flags.tolist(), strict=True):
                if is_kept:
                    yield {"text": text, "train": train, "eval": evaluate}

    def count(self) -> dict[str, int]:
        """Count unique prompts: all, per use, and with both uses."""
        unique, train, evaluate = np.concatenate([flags[:, flags[0]] for _, flags in self.selections], axis=1)
        uses = {"prompts": unique, "train": train, "eval": evaluate, "both": train & evaluate}
        return {name: int(use.sum()) for name, use in uses.items()}


def split_by_files(train: Survey, evaluation: Survey) -> CleanPrompts:
    """Take training prompts, then the other evaluation prompts; a text in both files has both uses."""
    shared = np.isin(train.hashes, evaluation.hashes)
    new = evaluation.kept & ~np.isin(evaluation.hashes, train.hashes[train.kept])
    trained = np.stack([train.kept, np.ones_like(shared), shared])
    return CleanPrompts([(train, trained), (evaluation, np.stack([new, np.zeros_like(new), np.ones_like(new)]))])


def split_by_hash(train: Survey, share: float) -> CleanPrompts:
    """Assign about `share` of the prompts to evaluation, the others to training; a text's use never changes."""
    evaluate = train.hashes < np.uint64(share * 2**64)
    prompts = CleanPrompts([(train, np.stack([train.kept, ~evaluate, evaluate]))])
    counts = prompts.count()
    for use in ("train", "eval"):
        if not counts[use]:
            raise ValueError(
                f"prompts.eval_share {share} leaves no {use} prompt of the {counts['prompts']} in {train.file.path}: "
                "change it, give more prompts, or set it to null and give an evaluation file"
            )
    return prompts
