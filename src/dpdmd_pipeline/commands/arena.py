"""`arena`: make a page on which people compare two folders of pictures blindly."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from dpdmd_pipeline.commands.output import refuse_unwritable, say
from dpdmd_pipeline.publishing import write_text
from dpdmd_pipeline.scoring.arena import ArenaOptions, about_pairs, make_arena
from dpdmd_pipeline.scoring.folders import about_strays, find_pictures
from dpdmd_pipeline.scoring.sets import FileSet
from dpdmd_pipeline.wording import counted, printable

_EPILOG = """\
Folders have the layouts of `score` (see `score --help`). Prompts are matched by folder name or id, pictures of a prompt
by name. Pictures without a counterpart are left out, with a note. If no name is on both sides, the last number in the
name makes the pairs, as in 0007.png and a_7.png, if both sides have the same numbers. If names have nothing in common,
their order makes the pairs, with a note. Other folders are refused: a pair must have one seed.
The page needs no server and no network: send it to people. They answer by keyboard (left, right, space, backspace) and
send back the file that the page saves. Then: python -m dpdmd_pipeline score results*.json --by human
"""


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpdmd_pipeline arena",
        description="Make one HTML page of blind side-by-side comparisons.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A_FOLDER")
    add("b", type=Path, metavar="B_FOLDER")
    add("--out", type=Path, required=True, metavar="PAGE.html")
    add("--prompts", type=Path, help="texts of prompt ids: .txt (line number), .csv or .jsonl (id, text)")
    add("--singles", type=int, default=2, help="pairs of single pictures per prompt, for quality (%(default)s)")
    add("--sets", type=int, default=4, help="pictures per set, for diversity; 0 for no such question (%(default)s)")
    add("--side", type=int, help="reduce the longer side to this many pixels, as WebP; the default keeps the files")
    add("--seed", type=int, default=0, help="seed of the choice and of everyone's order (%(default)s)")
    return parser


def main(arguments: list[str]) -> None:
    """Write the page; errors that the user can correct are a ValueError or an OSError of one line."""
    options = _make_parser().parse_args(arguments)
    _check(options)
    (a, strays_of_a), (b, strays_of_b) = (find_pictures(folder, options.prompts) for folder in (options.a, options.b))
    names = str(options.a), str(options.b)
    html = make_arena(a, b, names, ArenaOptions(options.singles, options.sets, options.side, options.seed))
    write_text(options.out, html)
    questions = counted(len(a) * (options.singles + bool(options.sets)), "question")
    lines = [f"{options.out}: {questions} about {counted(len(a), 'prompt')}, {_size(len(html.encode()))}"]
    lines += [about_strays(options.a, strays_of_a), about_strays(options.b, strays_of_b), _about_ids(a, b)]
    lines += about_pairs(a, b, names)
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


def _check(options: argparse.Namespace) -> None:
    if options.singles < 0:
        raise ValueError(f"--singles {options.singles} must be at least 0")
    if options.sets < 0 or options.sets == 1:
        raise ValueError(f"--sets {options.sets} must be 0 or at least 2")
    if not options.singles and not options.sets:
        raise ValueError("--singles 0 --sets 0 leaves no question: set at least one of them")
    if options.side is not None and options.side < 16:
        raise ValueError(f"--side {options.side} must be at least 16 pixels")
    if os.path.realpath(options.a) == os.path.realpath(options.b):  # accepts links that lead to themselves
        raise ValueError(f"{options.a} and {options.b} are the same folder: give the pictures of two models")
    if options.out.is_dir():
        raise OSError(f"--out {options.out} is a folder: name the page in it, as in {options.out / 'arena.html'}")
    refuse_unwritable("--out", options.out)
