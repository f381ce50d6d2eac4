"""What is found out before anything is made: prompts that the exact reader of the embedded world cannot judge."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dpdmd_pipeline.planning.messages import describe
from dpdmd_pipeline.wording import counted, listed

USERS = {"make_anchors", "train_dmd", "train_student", "judged_prompts", "run_study"}  # nodes that prompts are for
FEW, LETTERS = 3, 40  # how many foreign prompts are named, and how much of each


def refuse_prompts(pipeline: Any, catalog: Any, env: str | None = None) -> list[str]:
    """What stands against the prompts of a run of the line, before its first node; for the hooks.

    Prompts that are trained on count too: the embedded teacher has never seen other words, and draws nothing by them.
    """
    if not USERS & {node.name for node in pipeline.nodes} or "params:evaluate" not in catalog:
        return []
    if _option(catalog, "evaluate", "judge") != "shapes":
        return []
    try:
        line = foreign_line(_texts(pipeline, catalog))
    except (ValueError, OSError) as error:
        return [describe(error, env)]
    return [line] if line else []


def foreign_line(texts: Iterable[str]) -> str | None:
    """The line that refuses what is not of the embedded world; None if all is."""
    from dpdmd_pipeline.shapes.world import COLOURS, SHAPES

    foreign = [text for text in texts if not _is_of_the_world(text)]
    if not foreign:
        return None
    named = listed([repr(text if len(text) <= LETTERS else f"{text[:LETTERS]}...") for text in foreign], FEW)
    return (
        f"{counted(len(foreign), 'prompt is', 'prompts are')} not of the shapes world, the only one that "
        f"evaluate.judge=shapes reads ({named}): name one colour of {', '.join(COLOURS)} and one shape of "
        f"{', '.join(SHAPES)} in each, take an --env with a teacher of your own, or set evaluate.judge=null"
    )


def _is_of_the_world(text: str) -> bool:
    from dpdmd_pipeline.shapes.world import prompt_index

    try:
        prompt_index(text)
    except ValueError:
        return False
    return True


def _texts(pipeline: Any, catalog: Any) -> Iterator[str]:
    """The prompts; where they are yet to be cleaned, the lines of their files.

    Raises:
        ValueError, OSError: see PromptFile.
    """
    if "prompts" not in pipeline.all_outputs():
        yield from (record["text"] for record in catalog.get("prompts").load())
        return
    own_file = _option(catalog, "prompts", "eval_share") is None
    for name in ("raw_prompts", "raw_eval_prompts") if own_file else ("raw_prompts",):
        yield from (line.text for line in catalog.get(name).load().lines() if line.text.strip())


def _option(catalog: Any, group: str, name: str) -> Any:
    """One option of a stage; plain where the stage itself is not asked for."""
    options = catalog.get(f"params:{group}").load()
    return options.get(name) if isinstance(options, Mapping) else getattr(options, name)
