"""Nodes of the report stage."""

from collections.abc import Iterable
from typing import Any

from dpdmd_pipeline.pipelines.report.charts import make_bars, make_scatter, prompt_table
from dpdmd_pipeline.pipelines.report.curves import kept_turns, make_curves
from dpdmd_pipeline.pipelines.report.options import ReportOptions
from dpdmd_pipeline.pipelines.report.page import render
from dpdmd_pipeline.pipelines.report.pictures import picture_rows
from dpdmd_pipeline.pipelines.report.plots import prompt_rows, turn_rows
from dpdmd_pipeline.pipelines.report.provenance import option_tables, plain_options, versions
from dpdmd_pipeline.pipelines.report.tables import (
    figure_rows,
    gap_cell,
    gaps_missing,
    missing_metrics,
    result_words,
    to_know,
)
from dpdmd_pipeline.pipelines.report.wording import DASH, MODELS, make_verdict, metric_named


def make_report(
    metrics: dict[str, Any],
    scores: dict[str, Any],
    prompts: Iterable[dict],
    train_history: list[dict],
    train_history_dmd: list[dict],
    grid_teacher: Any,
    grid_dmd: Any,
    grid_dp_dmd: Any,
    options: ReportOptions,
    environment: str,
    **stage_options: Any,
) -> tuple[str, str]:
    """One page as HTML and as Markdown; the same inputs and versions give the same bytes.

    Args:
        metrics: of the three models.
        scores: the same prompt by prompt.
        prompts: the evaluation ones label the rows of the grids, in their order.
        train_history, train_history_dmd: rows of step and losses.
        grid_teacher, grid_dmd, grid_dp_dmd: PIL images, a row for each of the first evaluation prompts
            (evaluate.grid_prompts), all of equal height.
        options: of this stage.
        environment: name of the folder of conf/ that the run was made with.
        stage_options: of the other stages, `<stage>_options`: plain, or as the models that their own nodes ask for.

    Returns:
        report.html, which needs no other file, and report.md, which shows the pictures beside it.

    Raises:
        ValueError: if a grid does not divide into the evaluation prompts.
    """
    texts = [" ".join(record["text"].split()) for record in prompts if record["eval"]]
    grids = {"teacher": grid_teacher, "dmd": grid_dmd, "dp_dmd": grid_dp_dmd}
    groups = {name.removesuffix("_options"): plain_options(group) for name, group in stage_options.items()}
    shown = texts[: int(groups["evaluate"]["grid_prompts"])]
    page = {
        **result_words(metrics),
        "prompts": shown,
        "num_prompts": len(texts),
        "pictures": picture_rows(grids, shown, options),
        "scatter": make_scatter(scores),
        "prompt_table": prompt_table(scores, options.max_prompts),
        "bars": make_bars(scores["attributes"]),
        "kept": kept_turns({"DMD": train_history_dmd, "DP-DMD": train_history}),
        "curves": make_curves({"dmd": train_history_dmd, "dp_dmd": train_history}, options.curve_points),
        "options": option_tables({**groups, "report": plain_options(options)}),
        "environment": environment,
        "versions": versions(),
    }
    return render("report.html.j2", page), render("report.md.j2", page)


def make_plots(
    scores: dict[str, Any], train_history: list[dict], train_history_dmd: list[dict]
) -> tuple[list[dict], list[dict], list[dict]]:
    """Some of the page's drawings as rows for `dvc plots`: the DMD loss, diversity while training, prompt by prompt."""
    runs = {"dmd": train_history_dmd, "dp_dmd": train_history}
    return turn_rows(runs, "dmd_loss"), turn_rows(runs, "latent_diversity"), prompt_rows(scores)


def show_result(metrics: dict[str, Any], report_html: str, report_md: str) -> None:
    """Print the result; takes the reports only to come after them."""
    from rich import box
    from rich.console import Console

    screen = Console()
    # piped, it must neither be cut to 80 columns nor hold boxes
    console = screen if screen.is_terminal else Console(width=120)
    console.print(_result_table(metrics, box.SIMPLE if console.is_terminal else None))
    if any(metrics[model]["figures"] for model in MODELS):
        console.print(_figure_table(metrics, box.SIMPLE if console.is_terminal else None))
    for names, reason in missing_metrics(metrics):
        console.print(f"not measured: {names}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for note in to_know(metrics):
        console.print(f"to know: {note}", markup=False, highlight=False, soft_wrap=True)
    if gaps_missing(metrics):
        console.print(
            "-: DMD lost nothing in this, or no more than by chance: there is no gap to recover", soft_wrap=True
        )
    console.print(make_verdict(metrics), style="bold", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _result_table(metrics: dict[str, Any], box: Any) -> Any:
    from rich.table import Table

    table = Table(box=box, pad_edge=False, collapse_padding=True)
    kinds = [(kind, name) for kind in ("quality", "diversity") for name in metrics["teacher"][kind]]
    measured = [
        (kind, name)
        for kind, name in kinds
        if name != "residual" and all(name in metrics[model][kind] for model in MODELS)
    ]
    table.add_column("", no_wrap=True)
    for metric in (metric_named(name) for _, name in measured):
        table.add_column(f"{metric.title}, {metric.unit}" if metric.unit else metric.title, justify="right")
    table.add_column("NFE", justify="right")
    for model, title in MODELS.items():
        values = [metric_named(name).number(metrics[model][kind][name]["value"]) for kind, name in measured]
        table.add_row(title, *values, str(metrics[model]["nfe"]))
    gaps = metrics["dp_dmd"]["gap_recovered"]
    cells = [gap_cell(gaps[name]) if name in gaps else ("", "") for _, name in measured]
    table.add_row("gap recovered", *(share.replace(DASH, "-") for share, _ in cells), "")
    table.add_row("  95 % interval", *(spread for _, spread in cells), "")
    return table


def _figure_table(metrics: dict[str, Any], box: Any) -> Any:
    from rich.table import Table

    table = Table(box=box, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for title in (*MODELS.values(), "gap recovered, %"):
        table.add_column(title, justify="right")
    for row in figure_rows(metrics):
        gap = (row["gap"] or "").replace(DASH, "-").replace(" %", "")
        table.add_row(row["title"], *(value for value, _ in row["cells"]), gap)
    return table
