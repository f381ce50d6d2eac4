"""Nodes of the report stage."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box, get_console
from rich.table import Table
from rich.text import Text

from dpdmd_pipeline.pipelines.report.charts import make_bars, make_curves, make_scatter, prompt_table, scatter_points
from dpdmd_pipeline.pipelines.report.options import ReportOptions
from dpdmd_pipeline.pipelines.report.page import data_uri, picture_rows, render
from dpdmd_pipeline.pipelines.report.provenance import option_tables, plain_options, student_options, versions
from dpdmd_pipeline.pipelines.report.tables import describe_metrics
from dpdmd_pipeline.pipelines.report.wording import DASH, MODELS, student_cycles
from dpdmd_pipeline.screen import screen
from dpdmd_pipeline.wording import made


def make_report(
    metrics: dict[str, Any],
    scores: dict[str, Any],
    prompts: Iterable[dict],
    train_history: list[dict],
    train_history_dmd: list[dict],
    grid_teacher: Any,
    grid_dmd: Any,
    grid_dp_dmd: Any,
    train_strip: Any,
    student: Path,
    student_dmd: Path,
    options: ReportOptions,
    prompts_options: Any,
    evaluate_options: Any,
    run_arguments: str,
) -> tuple[str, str]:
    """Render the page as HTML, which needs no other file, and as Markdown, which links pictures in its own folder.

    Args:
        grid_teacher, ...: PIL images; a grid has a row for each of the first `evaluate.grid_prompts` prompts.
        prompts_options, evaluate_options: a dict, or the model of the stage's own nodes.
    """
    described = describe_metrics(metrics)
    groups = student_options({"dmd": student_dmd, "dp_dmd": student}, metrics)
    groups |= {"prompts": prompts_options, "evaluate": evaluate_options, "report": options}
    histories, grids = {"dmd": train_history_dmd, "dp_dmd": train_history}, (grid_teacher, grid_dmd, grid_dp_dmd)
    texts = [" ".join(record["text"].split()) for record in prompts if record["eval"]]
    shown = texts[: int(plain_options(evaluate_options)["grid_prompts"])]
    page = {
        **described,
        "prompts": shown,
        "num_prompts": len(texts),
        "pictures": picture_rows(dict(zip(("teacher", *histories), grids, strict=True)), shown, options),
        "scatter": make_scatter(scores),
        "prompt_table": prompt_table(scores, options.max_prompts),
        "bars": make_bars(scores["attributes"]),
        "student_cycles": student_cycles({"DMD": train_history_dmd, "DP-DMD": train_history}),
        "strip": data_uri(train_strip, options),
        "curves": make_curves(histories, options.curve_points),
        "options": option_tables(groups),
        "run_arguments": run_arguments,
        "versions": versions(),
    }
    return render("report.html.j2", page), render("report.md.j2", page)


def make_plots(
    scores: dict[str, Any], train_history: list[dict], train_history_dmd: list[dict]
) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows for `dvc plots`, each with all keys: DMD loss, diversity during training, quality against diversity."""
    runs = {"dmd": train_history_dmd, "dp_dmd": train_history}
    return _cycle_rows(runs, "dmd_loss"), _cycle_rows(runs, "latent_diversity"), _prompt_rows(scores)


def _cycle_rows(runs: dict[str, Sequence[dict]], key: str) -> list[dict[str, Any]]:
    """A row per cycle that has the measurement, a column per model; the teacher's is `<key>_teacher`, if any."""
    rows: dict[int, dict[str, Any]] = {}
    for model, history in runs.items():
        for record in history:
            if record.get(key) is not None:
                row = rows.setdefault(record["step"], {"step": record["step"], **dict.fromkeys(MODELS.values())})
                row |= {MODELS[model]: record[key], MODELS["teacher"]: record.get(f"{key}_teacher")}
    return [rows[step] for step in sorted(rows)]


def _prompt_rows(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per point of the page's scatter, with the quality in the model's own column."""
    x_name, y_name, points = scatter_points(scores)
    axes = {"diversity_is": x_name, "quality_is": y_name}
    empty = dict.fromkeys(MODELS.values())
    return [{"prompt": text, "diversity": x, **empty, MODELS[model]: y, **axes} for model, x, y, text in points]


def show_result(metrics: dict[str, Any], report_html: str, report_md: str) -> None:
    """Show the result at the end of the run; the reports are inputs so that this node runs after them."""
    made.info("report.html, report.md")
    described = describe_metrics(metrics)
    lines = [f"not measured: {names}: {reason}" for names, reason in described["missing"]]
    lines += [f"note: {note}" for note in described["notes"]]
    if described["has_missing_gap"]:
        lines.append("-: no gap to recover: DMD lost nothing in this metric, or no more than chance explains")
    notes = [Text(line, style="dim") for line in lines]
    screen.at_end(_result_table(described), *notes, Text(described["verdict"], style="bold"))


def _result_table(described: dict[str, Any]) -> Table:
    """A row per metric, below the name of its axis; with intervals of the gap recovered if there is room."""
    is_terminal = get_console().is_terminal
    is_wide = not is_terminal or get_console().width >= 100
    table = Table(box=box.SIMPLE_HEAD if is_terminal else None, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for title in (*described["titles"].values(), "gap recovered"):
        table.add_column(title, justify="right", max_width=None if is_wide else 9)
    axis = ""
    for row in described["rows"]:
        if row["axis"] != axis:
            axis = row["axis"]
            table.add_row(Text(axis, style="bold"))
        gap = row["gap"].replace(DASH, "-")
        cells = [value.removesuffix(" bits") for value, _ in row["cells"]]
        table.add_row(f"  {row['title'].removeprefix(f'{axis}.')}", *cells, gap if is_wide else gap.partition(" (")[0])
    table.add_row("network evaluations", *(str(described["metrics"][model]["nfe"]) for model in described["titles"]))
    return table
