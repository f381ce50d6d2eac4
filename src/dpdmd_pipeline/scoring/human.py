"""People's answers on an arena page, summarised as shares with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from dpdmd_pipeline.metrics.summary import ratio_interval
from dpdmd_pipeline.scoring.arena import FORMAT
from dpdmd_pipeline.scoring.texts import read_json, read_text
from dpdmd_pipeline.wording import counted, grouped, one_line, printable, short, validation_faults

CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}
_REMEDY = "give the files that the page's button saves, unchanged"
_LONGEST = 200  # characters of the faults in a message
_Z = 1.959964  # 97.5 % point of the normal distribution


class Answer(BaseModel):
    """One person's answer to one question of a page."""

    question: str  # its kind
    prompt: str
    choice: Literal["a", "b", "tie"]


class Result(BaseModel):
    """One person's answers, as the page saves them."""

    format: int = Field(strict=True, ge=FORMAT, le=FORMAT)
    arena: str  # identity of the page
    a: str
    b: str
    participant: str
    questions: int = Field(strict=True, ge=0)  # number of questions on the page
    answers: list[Answer]


def wilson(wins: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, valid at 0 and 1 too."""
    share, z2 = wins / total, _Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def load_results(files: Sequence[Path]) -> list[Result]:
    """Load the results that one page has saved, one file per person."""
    results = [_load(Path(file)) for file in files]
    file_of: dict[str, Path] = {}
    for file, result in zip(files, results, strict=True):
        if result.arena != results[0].arena:
            raise ValueError(f"{file} and {files[0]} are from different pages: summarise each page separately")
        first = file_of.setdefault(result.participant, file)
        if first is not file:
            raise ValueError(f"{file} and {first} are both from {result.participant!r}: keep the later one")
    return results


def _load(file: Path) -> Result:
    """Load and check one person's results."""
    try:
        result = Result.model_validate(read_json(read_text(file), str(file)))
    except OSError as error:
        raise OSError(f"{error}: {_REMEDY}") from error
    except ValidationError as error:
        faults = short(one_line(validation_faults(error)), _LONGEST)
        raise ValueError(f"{file} is not a result of an arena page ({faults}): {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{error}: {_REMEDY}") from error
    if len(result.answers) > result.questions:
        raise ValueError(f"{file} has {len(result.answers)} answers to {result.questions} questions: {_REMEDY}")
    return result


def summarise(results: Sequence[Result], seed: int) -> dict[str, Any]:
    """Share of answers for A, for each kind of question.

    Args:
        results: results of one page, one per person.
        seed: seed of the bootstrap over prompts: answers to the same prompt are not independent.

    Returns:
        Names of A and B, number of people, people with unanswered questions, and per kind of question: n, the counts,
        the share for A (a tie counts half) with its bootstrap interval, and the share among decided answers with its
        Wilson interval.
    """
    answers = [answer for result in results for answer in result.answers]
    if not answers:
        raise ValueError("these results have no answer: let someone answer questions of the page first")
    by_kind = grouped((answer.question, answer) for answer in answers)
    questions = {kind: _question(by_kind[kind], seed) for kind in sorted(by_kind)}
    unfinished = {  # participants who left some questions unanswered
        one.participant: {"answers": len(one.answers), "questions": one.questions}
        for one in results
        if len(one.answers) < one.questions
    }
    first = results[0]
    return {"a": first.a, "b": first.b, "people": len(results), "unfinished": unfinished, "questions": questions}


def _question(answers: Sequence[Answer], seed: int) -> dict[str, Any]:
    prompts = sorted({answer.prompt for answer in answers})
    owners = torch.tensor([prompts.index(answer.prompt) for answer in answers])
    marks = torch.tensor([CHOICES[answer.choice] for answer in answers])
    counts = {choice: sum(answer.choice == choice for answer in answers) for choice in CHOICES}
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
