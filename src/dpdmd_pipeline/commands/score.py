"""`score`: its options and its help; the work is in `score_pictures`, which loads torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

DEFAULT_WEIGHTS = Path("data/06_models/metrics")
_LAYOUTS = """\
IMAGES is a folder in one of three layouts:
  a folder per prompt    IMAGES/a red circle/01.png ...     The text is in prompt.txt beside the pictures, else in
                                                            --prompts, else it is the folder's name, unless that is an
                                                            id: digits and no space, such as 00000 or prompt_12.
  a file per picture     IMAGES/<prompt-id>_<seed>.png ...  The text is in --prompts, else it is the id if that has a
                                                            space.
  a manifest             IMAGES/manifest.csv or .jsonl      Records with file, prompt and, optionally, id.
A folder per prompt may also be GenEval's own: IMAGES/00000/samples/0000.png with the text in
IMAGES/00000/metadata.jsonl.
Metrics that need neither prompts nor seeds (quality, distribution) accept any names in a flat folder, and so does
--reference: each picture then counts as one prompt.
Pictures of one prompt must have different seeds, and as many as in the pictures that you compare with.
With --prompts, every id without a prompt.txt must be in that file; a manifest has its own texts. Metrics that read the
text (alignment, preference, the exact reader of the embedded world) leave out prompts without one. Transparent
pixels count as white; EXIF rotates pictures as in a viewer. Hidden files and those of the system, such as .DS_Store and
__MACOSX, are ignored.

Features of networks that several metrics share lie in the temporary folder (TMPDIR) during the run, 3 to 8 kB per
picture and network.

With --by human, IMAGES are the results that an arena page has saved: score results.json --by human

Exit code: 0 everything was measured; 1 or 2 refused; 3 measured, but something is missing or was left out, and the
table says what.
"""


class ScoreCommand(TyperCommand):
    """A command whose help ends with the layouts of folders and the metrics."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from dpdmd_pipeline.commands.score_pictures import list_metrics

        formatter.write(f"\n{_LAYOUTS}\n{list_metrics()}\n")


def score(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="folder of pictures")],
    by: Annotated[str, typer.Option(help="axes, such as diversity or quality, metrics below, or human")],
    reference: Annotated[
        Path | None, typer.Option(help="folder to compare with: the teacher's, or real pictures")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="the teacher's pictures; with --baseline, for the gap")] = None,
    baseline: Annotated[Path | None, typer.Option(help="pictures of plain DMD for the same prompts")] = None,
    prompts: Annotated[Path | None, typer.Option(help="texts of prompt ids: .txt, .csv or .jsonl (id, text)")] = None,
    geneval: Annotated[Path | None, typer.Option(help="GenEval's evaluation_metadata.jsonl")] = None,
    duplicates_above: Annotated[float | None, typer.Option(metavar="COSINE", help="of near-duplicates")] = None,
    weights: Annotated[
        Path | None, typer.Option(help=f"folder of weights: {DEFAULT_WEIGHTS}, else the project's")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write all results, also per prompt, to this file")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    processes: Annotated[int, typer.Option(help="processes that share the prompts")] = 1,
    batch_size: Annotated[int, typer.Option(help="pictures per pass on a GPU")] = 32,
    seed: Annotated[int, typer.Option(help="of the bootstrap and of the subsets of large sets")] = 0,
) -> None:
    """Score any folder of pictures, from any model."""
    options = SimpleNamespace(**locals())
    from dpdmd_pipeline.commands.score_pictures import score_folders

    score_folders(options)
