"""The README's tables of the study, both worlds side by side, from the committed results.

python benchmarks/study_table.py        # writes them into README.md
"""

import json
import re
from pathlib import Path

from dpdmd_pipeline.pipelines.study.nodes import SHOWN, describe, mean_and_spread, summarise

ROOT = Path(__file__).parents[1]
WORLDS = {"": "flow", "shapes_sdxl": "eps"}  # folder in data/08_reporting -> its teacher's prediction
DIGITS = {"aligned": 3, "effective_modes": 1, "gap_recovered": 2}
PARTS = ("study", "beyond")


def load(part: str) -> dict[str, dict]:
    """One part of the study, by world."""
    reporting = ROOT / "data/08_reporting"
    return {world: json.loads((reporting / folder / f"{part}.json").read_text()) for folder, world in WORLDS.items()}


def table(studies: dict[str, dict]) -> str:
    """A Markdown table with a row per run; cells of a world without the run are empty."""
    titles = [f"{world}: {name.replace('_', ' ')}" for world in studies for name in DIGITS]
    rows = [["run", "changes", *titles], ["---"] * (len(titles) + 2), ["teacher", "", *_teacher(studies)]]
    summaries = {world: summarise(study) for world, study in studies.items()}
    seeds = max(len(summaries[world][study["baseline"]]["aligned"]) for world, study in studies.items())
    for run in dict.fromkeys(run for summary in summaries.values() for run in summary):
        changes = {", ".join(describe(study["runs"][run])) for study in studies.values() if run in study["runs"]}
        if len(changes) > 1:
            raise SystemExit(f"Error: {run} has other changes in each world: {' and '.join(sorted(changes))}")
        cells = [cell for world in studies for cell in _cells(summaries[world].get(run), seeds)]
        rows.append([run, *changes, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _teacher(studies: dict[str, dict]) -> list[str]:
    """Cells of the teacher, world by world; it has no gap."""
    return [
        mean_and_spread([study["teacher"][SHOWN[name]][name]["value"]], digits) if name in SHOWN else ""
        for study in studies.values()
        for name, digits in DIGITS.items()
    ]


def _cells(values: dict[str, list] | None, usual: int) -> list[str]:
    """Means and spreads over the seeds; an unusual number of seeds is added."""
    if values is None:
        return [""] * len(DIGITS)
    seeds = len(values["aligned"])
    cells = [mean_and_spread(values[name], digits) for name, digits in DIGITS.items()]
    return cells if seeds == usual else [*cells[:-1], f"{cells[-1]} ({seeds} seed{'s' * (seeds > 1)})"]


def fill(text: str) -> str:
    """The text with each table between its marks."""
    for part in PARTS:
        marks = f"(<!-- {part} -->\n).*?(<!-- end -->)"
        text, count = re.subn(marks, lambda m, part=part: f"{m[1]}{table(load(part))}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"Error: README.md has {count} tables marked <!-- {part} -->, not one")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
