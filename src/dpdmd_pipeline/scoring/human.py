"""People's answers on an arena page, summarised as shares with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpdmd_pipeline.metrics.summary import ratio_interval
from dpdmd_pipeline.scoring.arena import FORMAT
from dpdmd_pipeline.wording import counted, printable

CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}
_RESULT = {"arena": str, "a": str, "b": str, "participant": str, "questions": int, "answers": list}
_ANSWER = {"question": str, "prompt": str}
_NO_RESULT = "is not a result of an arena page"
_REMEDY = "give the files that the page's button saves"
_Z = 1.959964  # 97.5 % point of the normal distribution


def wilson(wins: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, valid at 0 and 1 too."""
    share, z2 = wins / total, _Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def load_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Load the results that one page has saved, one file per person."""
    results = [_load(Path(file)) for file in files]
    file_of: dict[str, Path] = {}
    for file, result in zip(files, results, strict=True):
        if result["arena"] != results[0]["arena"]:
            raise ValueError(f"{file} and {files[0]} are from different pages: summarise each page separately")
        participant = result["participant"]
        if participant in file_of:
            raise ValueError(f"{file} and {file_of[participant]} are both from {participant!r}: keep the later one")
        file_of[participant] = file
    return results


def _load(file: Path) -> dict[str, Any]:
    """Load and check one person's results."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"{file} cannot be read ({error.strerror}): {_REMEDY}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise ValueError(f"{file} {_NO_RESULT}: {_REMEDY}") from error
    if not isinstance(result, dict) or "format" not in result:
        raise ValueError(f"{file} {_NO_RESULT}: {_REMEDY}")
    if result["format"] != FORMAT:
        raise ValueError(f"{file} has format {result['format']}, not {FORMAT}: make a new page with this version")
    if wrong := _wrong_keys(result, _RESULT):  # `score --json` writes files of format 1 too
        raise ValueError(f"{file} {_NO_RESULT} (no {wrong}): {_REMEDY}")
    for number, answer in enumerate(result["answers"]):
        _check_answer(f"{file}, answer {number}", answer)
    return result


def _check_answer(name: str, answer: Any) -> None:
    if not isinstance(answer, dict):
        raise ValueError(f"{name} is not a JSON object: {_REMEDY}, unchanged")
    choice = answer.get("choice")
    if not isinstance(choice, str) or choice not in CHOICES:
        raise ValueError(f"{name} has the choice {choice!r}, not one of {', '.join(CHOICES)}: {_REMEDY}, unchanged")
    if wrong := _wrong_keys(answer, _ANSWER):
        raise ValueError(f"{name} has no {wrong}: {_REMEDY}, unchanged")


def _wrong_keys(record: dict[str, Any], kinds: dict[str, type]) -> str:
    """Names of missing keys and keys of another type, such as `arena and no answers`."""
    return " and no ".join(name for name, kind in kinds.items() if not isinstance(record.get(name), kind))


def summarise(results: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Share of answers for A, for each kind of question.

    Args:
        results: results of one page, one per person.
        seed: seed of the bootstrap over prompts: answers to the same prompt are not independent.

    Returns:
        Names of A and B, number of people, people with unanswered questions, and per kind of question: n, the counts,
        the share for A (a tie counts half) with its bootstrap interval, and the share among decided answers with its
        Wilson interval.
    """
    answers = [answer for result in results for answer in result["answers"]]
    if not answers:
        raise ValueError("these results have no answer: let someone answer questions of the page first")
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for answer in answers:
        by_kind.setdefault(answer["question"], []).append(answer)
    questions = {kind: _question(by_kind[kind], seed) for kind in sorted(by_kind)}
    sides = {"a": results[0]["a"], "b": results[0]["b"]}
    return sides | {"people": len(results), "unfinished": _unfinished(results), "questions": questions}


def _unfinished(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Numbers of answers and questions of the participants who left some unanswered."""
    numbers = {one["participant"]: {"answers": len(one["answers"]), "questions": one["questions"]} for one in results}
    return {name: one for name, one in numbers.items() if one["answers"] < one["questions"]}


def _question(answers: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    prompts = sorted({answer["prompt"] for answer in answers})
    owners = torch.tensor([prompts.index(answer["prompt"]) for answer in answers])
    marks = torch.tensor([CHOICES[answer["choice"]] for answer in answers])
    counts = {choice: sum(answer["choice"] == choice for answer in answers) for choice in CHOICES}
    decided = counts["a"] + counts["b"]
    share, low, high = (counts["a"] / decided, *wilson(counts["a"], decided)) if decided else (None, None, None)
    return {
        "n": {"answers": len(answers), "prompts": len(prompts)},
        "counts": counts,
        "for_a": ratio_interval(marks, owners, seed) | {"preset": "ties count half, bootstrap over prompts"},
        "for_a_decided": {"value": share, "low": low, "high": high, "preset": "without ties, Wilson interval"},
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [f"A is {summary['a']}, B is {summary['b']}; {counted(summary['people'], 'person', 'people')}"]
    for name, numbers in summary["unfinished"].items():
        lines.append(f"  {name} answered {numbers['answers']} of {numbers['questions']}")
    for question, numbers in summary["questions"].items():
        counts, share, decided = numbers["counts"], numbers["for_a"], numbers["for_a_decided"]
        lines.append(
            f"  {question}: A {counts['a']}, B {counts['b']}, no difference {counts['tie']} "
            f"({counted(numbers['n']['answers'], 'answer')}, {counted(numbers['n']['prompts'], 'prompt')})"
        )
        lines.append(f"    for A {_share(share)} ({share['preset']}); {_share(decided)} ({decided['preset']})")
    return "\n".join(map(printable, lines))


def _share(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "no decided answer"
    spread = "" if figure["low"] is None else f", {figure['low']:.1%} to {figure['high']:.1%}"
    return f"{figure['value']:.1%}{spread}"
