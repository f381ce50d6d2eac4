"""Check before a run that the exact reader of the embedded world can judge every prompt."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dpdmd_pipeline.planning.messages import describe
from dpdmd_pipeline.wording import counted, listed, short

USERS = {"make_anchors", "train_dmd", "train_student", "judged_prompts", "run_study"}  # nodes that use prompts
FEW, LETTERS = 3, 40  # foreign prompts in the message, and characters of each


def refuse_prompts(pipeline: Any, catalog: Any, env: str | None = None) -> list[str]:
    """Errors about the prompts of a run, before its first node; for the hooks.

    Training prompts count too: the embedded teacher has never seen other words, so it cannot draw them.
    """
    uses_prompts = USERS & {node.name for node in pipeline.nodes} and "params:evaluate" in catalog
    if not uses_prompts or option(catalog, "evaluate", "judge") != "shapes":
        return []
    try:
        line = foreign_line(_texts(pipeline, catalog))
    except (ValueError, OSError) as error:
        return [describe(error, env)]
    return [line] if line else []


def foreign_line(texts: Iterable[str]) -> str | None:
    """Error message about prompts outside the embedded world; None if there are none."""
    from dpdmd_pipeline.shapes.world import COLOURS, SHAPES

    foreign = [text for text in texts if not _is_in_the_world(text)]
    if not foreign:
        return None
    examples = listed([repr(short(text, LETTERS)) for text in foreign], FEW)
    return (
        f"{counted(len(foreign), 'prompt is', 'prompts are')} not of the shapes world ({examples}), and "
        f"evaluate.judge=shapes reads no other pictures: name one colour ({', '.join(COLOURS)}) and one shape "
        f"({', '.join(SHAPES)}) in each prompt, choose an environment with your own teacher, or set evaluate.judge=null"
    )


def _is_in_the_world(text: str) -> bool:
    from dpdmd_pipeline.shapes.world import prompt_index

    try:
        prompt_index(text)
    except ValueError:
        return False
    return True


def _texts(pipeline: Any, catalog: Any) -> Iterator[str]:
    """Texts of the prompts, or the lines of their files if this run cleans them first."""
    if "prompts" not in pipeline.all_outputs():
        yield from (record["text"] for record in catalog.get("prompts").load())
        return
    own_file = option(catalog, "prompts", "eval_share") is None
    for name in ("raw_prompts", "raw_eval_prompts") if own_file else ("raw_prompts",):
        yield from (line.text for line in catalog.get(name).load().lines() if line.text.strip())


def option(catalog: Any, group: str, name: str) -> Any:
    """One option of a stage; its group is a dict if the stage itself does not run."""
    options = catalog.get(f"params:{group}").load()
    return options.get(name) if isinstance(options, Mapping) else getattr(options, name)
