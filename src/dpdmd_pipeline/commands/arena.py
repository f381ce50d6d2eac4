"""`arena`: make a page on which people compare two folders of pictures blindly."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dpdmd_pipeline.commands.output import refuse_unwritable, say
from dpdmd_pipeline.publishing import write_text
from dpdmd_pipeline.scoring.arena import ArenaOptions, about_pairs, make_arena
from dpdmd_pipeline.scoring.folders import about_strays, find_pictures
from dpdmd_pipeline.scoring.sets import FileSet
from dpdmd_pipeline.wording import counted, printable

EPILOG = """\
Folders have the layouts of `score` (see `score --help`). Prompts are matched by folder name or id, pictures of a prompt
by name. Pictures without a counterpart are left out, with a note. If no name is on both sides, the last number in the
name makes the pairs, as in 0007.png and a_7.png, if both sides have the same numbers. If names have nothing in common,
their order makes the pairs, with a note. Other folders are refused: a pair must have one seed.

The page needs no server and no network: send it to people. They answer by keyboard (left, right, space, backspace) and
send back the file that the page saves. Then: dpdmd-pipeline score results*.json --by human
"""


def arena(
    a: Annotated[Path, typer.Argument(metavar="A_FOLDER")],
    b: Annotated[Path, typer.Argument(metavar="B_FOLDER")],
    out: Annotated[Path, typer.Option(metavar="PAGE.html")],
    prompts: Annotated[Path | None, typer.Option(help="texts of prompt ids: .txt, .csv or .jsonl (id, text)")] = None,
    singles: Annotated[int, typer.Option(help="pairs of single pictures per prompt, for quality")] = 2,
    sets: Annotated[int, typer.Option(help="pictures per set, for diversity; 0 for no such question")] = 4,
    side: Annotated[int | None, typer.Option(help="reduce the longer side to so many pixels, as WebP")] = None,
    seed: Annotated[int, typer.Option(help="of the choice and of everyone's order")] = 0,
) -> None:
    """Make a page of blind comparisons for people."""
    options = ArenaOptions(singles, sets, side, seed)
    _check(a, b, out, options)
    (ours, strays_of_a), (theirs, strays_of_b) = (find_pictures(folder, prompts) for folder in (a, b))
    names = str(a), str(b)
    html = make_arena(ours, theirs, names, options)
    write_text(out, html)
    questions = counted(len(ours) * (singles + bool(sets)), "question")
    lines = [f"{out}: {questions} about {counted(len(ours), 'prompt')}, {_size(len(html.encode()))}"]
    lines += [about_strays(a, strays_of_a), about_strays(b, strays_of_b), _about_ids(ours, theirs)]
    lines += about_pairs(ours, theirs, names)
    say("\n".join(map(printable, filter(None, lines))))


def _about_ids(a: Sequence[FileSet], b: Sequence[FileSet]) -> str:
    """Note on prompts whose id the page shows because neither side has a text; empty without any."""
    with_text = {one.id for one in b if not one.no_text}
    ids = [one.id for one in a if one.no_text and one.id not in with_text]
    if not ids:
        return ""
    return f"prompts without a text: {len(ids)} of {len(a)}; people see the id ({ids[0]}): give texts with --prompts"


def _size(count: int) -> str:
    """Number of bytes as `38 kB` or `1.2 MB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{math.ceil(count / 1e3)} kB"


def _check(a: Path, b: Path, out: Path, options: ArenaOptions) -> None:
    if options.per_prompt < 0:
        raise ValueError(f"--singles {options.per_prompt} must be at least 0")
    if options.set_size < 0 or options.set_size == 1:
        raise ValueError(f"--sets {options.set_size} must be 0 or at least 2")
    if not options.per_prompt and not options.set_size:
        raise ValueError("--singles 0 --sets 0 leaves no question: set at least one of them")
    if options.side is not None and options.side < 16:
        raise ValueError(f"--side {options.side} must be at least 16 pixels")
    if os.path.realpath(a) == os.path.realpath(b):  # accepts links that lead to themselves
        raise ValueError(f"{a} and {b} are the same folder: give the pictures of two models")
    if out.is_dir():
        raise OSError(f"--out {out} is a folder: name the page in it, as in {out / 'arena.html'}")
    refuse_unwritable("--out", out)
