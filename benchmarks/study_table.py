"""Tables of docs/study.md, both worlds side by side, from the committed results.

python benchmarks/study_table.py        # writes them into docs/study.md
"""

import json
import re
from pathlib import Path

from dpdmd_pipeline.pipelines.study.nodes import SHOWN, describe, mean_and_spread, summarise

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/study.md"
WORLDS = {"": "flow", "shapes_sdxl": "eps"}  # folder of data/08_reporting -> the teacher's prediction type
DIGITS = {"aligned": 3, "effective_modes": 1, "gap_recovered": 2}
PARTS = ("study", "beyond", "variety")


def load(part: str) -> dict[str, dict]:
    """One part of the study, by world."""
    reporting = ROOT / "data/08_reporting"
    return {world: json.loads((reporting / folder / f"{part}.json").read_text()) for folder, world in WORLDS.items()}


def make_table(studies: dict[str, dict]) -> str:
    """Markdown table with a row per run; cells stay empty for a world that lacks the run."""
    titles = [f"{world}: {name.replace('_', ' ')}" for world in studies for name in DIGITS]
    rows = [["run", "changes", *titles], ["---"] * (len(titles) + 2), ["teacher", "", *_teacher_cells(studies)]]
    summaries = {world: summarise(study) for world, study in studies.items()}
    num_seeds = max(len(summaries[world][study["baseline"]]["aligned"]) for world, study in studies.items())
    for run in dict.fromkeys(run for summary in summaries.values() for run in summary):
        changes = {", ".join(describe(study["runs"][run])) for study in studies.values() if run in study["runs"]}
        if len(changes) > 1:
            raise SystemExit(f"Error: {run} differs between the worlds: {' and '.join(sorted(changes))}")
        cells = [cell for world in studies for cell in _run_cells(summaries[world].get(run), num_seeds)]
        rows.append([run, *changes, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _teacher_cells(studies: dict[str, dict]) -> list[str]:
    """Aligned and effective modes of each world's teacher; the cell of the gap stays empty."""
    return [
        mean_and_spread([study["teacher"][SHOWN[name]][name]["value"]], digits) if name in SHOWN else ""
        for study in studies.values()
        for name, digits in DIGITS.items()
    ]


def _run_cells(values: dict[str, list] | None, usual_seeds: int) -> list[str]:
    """Means and spreads over the seeds; an unusual number of seeds is written behind them."""
    if values is None:
        return [""] * len(DIGITS)
    seeds = len(values["aligned"])
    cells = [mean_and_spread(values[name], digits) for name, digits in DIGITS.items()]
    return cells if seeds == usual_seeds else [*cells[:-1], f"{cells[-1]} ({seeds} seed{'s' * (seeds > 1)})"]


def fill_tables(text: str) -> str:
    """Replace the table between each pair of markers."""
    for part in PARTS:
        marks = f"(<!-- {part} -->\n).*?(<!-- end -->)"
        table = make_table(load(part))
        text, count = re.subn(marks, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"Error: {PAGE.name} has {count} tables marked <!-- {part} -->, not one")
    return text


if __name__ == "__main__":
    PAGE.write_text(fill_tables(PAGE.read_text()))
