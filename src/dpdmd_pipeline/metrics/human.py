"""What people preferred on an arena page: answers in, shares with intervals out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpdmd_pipeline.metrics.summary import ratio_interval
from dpdmd_pipeline.wording import counted

FORMAT = 1
CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}
_RESULT = {"arena": str, "a": str, "b": str, "participant": str, "questions": int, "answers": list}
_ANSWER = {"question": str, "prompt": str}
_REMEDY = "give the files that the page's button saves"
_Z = 1.959964  # 97.5 % point of the normal distribution


def wilson(wins: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, right at 0 and 1 too."""
    share, z2 = wins / total, _Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * (share * (1 - share) / total + z2 / (4 * total**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def load_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Results that the page has saved, all of one comparison.

    Raises:
        ValueError: for what is no such file, for files of different pages, or a person counted twice.
        OSError: for what cannot be read.
    """
    results = [_load(Path(file)) for file in files]
    seen: dict[tuple, Path] = {}
    for file, result in zip(files, results, strict=True):
        if result["arena"] != results[0]["arena"]:
            raise ValueError(f"{file} is of another page than {files[0]}: summarise each page by itself")
        if result["participant"] in seen:
            raise ValueError(
                f"{file} and {seen[result['participant']]} are both of participant {result['participant']!r}: "
                "keep the later one"
            )
        seen[result["participant"]] = file
    return results


def _load(file: Path) -> dict[str, Any]:
    """One person's results, with all that is read of them."""
    result = _read(file)
    if not isinstance(result, dict) or "format" not in result:
        raise ValueError(f"{file} is no result of an arena page: {_REMEDY}")
    if result["format"] != FORMAT:
        raise ValueError(f"{file} has format {result['format']}, this version reads {FORMAT}: make the page anew")
    if wrong := _wrong_keys(result, _RESULT):  # `score --json` writes files of format 1 as well
        raise ValueError(f"{file} is no result of an arena page, it has no {wrong}: {_REMEDY}")
    for number, answer in enumerate(result["answers"]):
        _check_answer(f"{file}, answer {number}", answer)
    return result


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:  # it is a folder, or not there
        raise OSError(f"{file} cannot be read ({error.strerror}): {_REMEDY}") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{file} is no result of an arena page: {_REMEDY}") from error


def _check_answer(place: str, answer: Any) -> None:
    if not isinstance(answer, dict):
        raise ValueError(f"{place} is no object: {_REMEDY}, as it was saved")
    choice = answer.get("choice")
    if not isinstance(choice, str) or choice not in CHOICES:
        raise ValueError(f"{place}: choice {choice!r} is none of {', '.join(CHOICES)}: {_REMEDY}, as it was saved")
    if wrong := _wrong_keys(answer, _ANSWER):
        raise ValueError(f"{place} has no {wrong}: {_REMEDY}, as it was saved")


def _wrong_keys(record: dict[str, Any], kinds: dict[str, type]) -> str:
    """What is absent or of another kind: `arena and no answers`."""
    return " and no ".join(name for name, kind in kinds.items() if not isinstance(record.get(name), kind))


def summarise(results: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Share of answers for A, for each question asked.

    Args:
        results: of one page, one per person.
        seed: of the bootstrap over prompts, which people's answers to the same prompt move together.

    Returns:
        names of A and B, number of people, those who have not answered all questions of the page with their numbers,
        and per kind of question: n, the counts, the share for A (a tie counts half) with its bootstrap interval, and
        the share among decided answers with its Wilson interval.
    """
    answers = [answer for result in results for answer in result["answers"]]
    if not answers:
        raise ValueError("no answer in these results: someone has to finish a page first")
    questions = {}
    for question in sorted({answer["question"] for answer in answers}):
        asked = [answer for answer in answers if answer["question"] == question]
        questions[question] = _question([(answer["prompt"], answer["choice"]) for answer in asked], seed)
    sides = {"a": results[0]["a"], "b": results[0]["b"]}
    return sides | {"people": len(results), "unfinished": _unfinished(results), "questions": questions}


def _unfinished(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Numbers of answers and of questions by participant, where some are unanswered: the page saves these too."""
    numbers = {one["participant"]: {"answers": len(one["answers"]), "questions": one["questions"]} for one in results}
    return {name: found for name, found in numbers.items() if found["answers"] < found["questions"]}


def _question(answers: Sequence[tuple[str, str]], seed: int) -> dict[str, Any]:
    prompts = sorted({prompt for prompt, _ in answers})
    owners = torch.tensor([prompts.index(prompt) for prompt, _ in answers])
    marks = torch.tensor([CHOICES[choice] for _, choice in answers])
    counts = {choice: sum(given == choice for _, given in answers) for choice in CHOICES}
    decided = counts["a"] + counts["b"]
    low, high = wilson(counts["a"], decided) if decided else (None, None)
    return {
        "n": {"answers": len(answers), "prompts": len(prompts)},
        "counts": counts,
        "for_a": ratio_interval(marks, owners, seed) | {"preset": "ties count half, bootstrap over prompts"},
        "for_a_decided": {
            "value": counts["a"] / decided if decided else None,
            "low": low,
            "high": high,
            "preset": "without ties, Wilson interval",
        },
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    lines = [f"A is {summary['a']}, B is {summary['b']}; {counted(summary['people'], 'person', 'people')}"]
    for name, found in summary["unfinished"].items():
        lines.append(f"  {name} answered {found['answers']} of {found['questions']}")
    for question, found in summary["questions"].items():
        counts, share, decided = found["counts"], found["for_a"], found["for_a_decided"]
        lines.append(
            f"  {question}: A {counts['a']}, B {counts['b']}, no difference {counts['tie']} "
            f"({counted(found['n']['answers'], 'answer')}, {counted(found['n']['prompts'], 'prompt')})"
        )
        lines.append(f"    for A {_share(share)} ({share['preset']}); {_share(decided)} ({decided['preset']})")
    return "\n".join(lines)


def _share(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "no decided answer"
    spread = "" if found["low"] is None else f", {found['low']:.1%} to {found['high']:.1%}"
    return f"{found['value']:.1%}{spread}"
