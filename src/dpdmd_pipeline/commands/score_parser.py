"""The arguments and the help of `score`."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpdmd_pipeline.scoring.preset import AXES
from dpdmd_pipeline.scoring.presets import LEFT_OUT, PRESETS

DEFAULT_WEIGHTS = Path("data/06_models/metrics")
DEFAULT_SEED = 0  # for resampling only
DEFAULT_BATCH = 32  # on a GPU only

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
pixels count as white; EXIF rotates pictures as in a viewer.

Features of networks that several metrics share lie in the temporary folder (TMPDIR) during the run, 3 to 8 kB per
picture and network.

With --by human, IMAGES are the results that an arena page has saved: score results.json --by human

Exit code: 0 everything was measured; 1 or 2 refused; 3 measured, but something is missing or was left out, and the
table says what.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m dpdmd_pipeline score",
        description="Score any folder of pictures.",
        epilog=f"{_LAYOUTS}\n{_metrics()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGES", help="folder of pictures")
    add("--by", required=True, help=f"axes ({', '.join(AXES)}) or metrics below, or human")
    add("--reference", type=Path, help="folder to compare with: the teacher's pictures, or real ones with any names")
    add("--teacher", type=Path, help="the teacher's pictures; with --baseline, for the gap recovered")
    add("--baseline", type=Path, help="pictures of plain DMD for the same prompts")
    add("--prompts", type=Path, help="texts of prompt ids: .txt (line number), .csv or .jsonl (id, text)")
    add("--geneval", type=Path, help="GenEval's evaluation_metadata.jsonl, for alignment.geneval_vqa")
    add("--duplicates-above", type=float, metavar="COSINE", help="cosine from which two pictures are near-duplicates")
    add("--weights", type=Path, help=f"folder of all weights ({DEFAULT_WEIGHTS} here, else in the project)")
    add("--json", type=Path, help="write all results, also per prompt, to this file")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--processes", type=int, default=1, help="processes that share the prompts (%(default)s)")
    add("--batch-size", type=int, default=DEFAULT_BATCH, help="pictures per pass on a GPU (%(default)s)")
    seed_help = "seed of the bootstrap and of the subsets of large sets (%(default)s)"
    add("--seed", type=int, default=DEFAULT_SEED, help=seed_help)
    return parser


def _metrics() -> str:
    """List of the metrics, and of those that need another environment."""
    metrics = [f"  {preset.full_name:28}{'*' if preset.by_default else ' '} {preset.protocol}" for preset in PRESETS]
    left_out = [f"  {name:29} {reason}" for name, reason in LEFT_OUT.items()]
    titles = "Metrics (* included by the axis alone):", "Not available, because they need another environment:"
    return "\n".join([titles[0], *metrics, "", titles[1], *left_out])
