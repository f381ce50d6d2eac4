"""`score`: any folder of pictures, from any model, judged without a pipeline."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpdmd_pipeline.metrics.presets import Preset, Settings
    from dpdmd_pipeline.metrics.score import Reference, Scores

INCOMPLETE = 3  # exit code: measured, but not everything that was asked for
DEFAULT_WEIGHTS = Path("data/06_models/metrics")
SHIPPED_CLIP = Path("data/06_models/shapes_clip")  # of the embedded world, in the project's git
DEFAULT_SEED = 0  # of resampling only
DEFAULT_BATCH = 32  # on a GPU only

_LAYOUTS = """\
IMAGES is a folder in one of three layouts:
  a folder per prompt    IMAGES/a red circle/01.png ...     the text is in prompt.txt beside them, else its name
  a file per picture     IMAGES/<prompt-id>_<seed>.png ...  the texts come from --prompts, else the id is the text
  a manifest             IMAGES/manifest.csv or .jsonl      records with file, prompt, and if you like id
Pictures of one prompt must come from different seeds, and from as many as in what you compare with.

With --by human, IMAGES are the results that an arena page has saved: score results.json --by human

Exit code: 0 all measured, 1 refused, 3 measured but something is missing or was left out; the table says what.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from dpdmd_pipeline.metrics.presets import AXES, PRESETS

    metrics = "\n".join(
        f"  {preset.full_name:28}{'*' if preset.by_default else ' '} {preset.protocol}" for preset in PRESETS
    )
    found = argparse.ArgumentParser(
        prog="python -m dpdmd_pipeline score",
        description="Score any folder of pictures.",
        epilog=f"{_LAYOUTS}\nMetrics (* those that the axis alone means):\n{metrics}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="folder of pictures")
    found.add_argument("--by", required=True, help=f"axes ({', '.join(AXES)}) or metrics below, or human")
    found.add_argument("--reference", type=Path, help="folder to compare with: the teacher's pictures, or real ones")
    found.add_argument("--teacher", type=Path, help="the teacher's pictures; with --baseline, for the gap recovered")
    found.add_argument("--baseline", type=Path, help="pictures of plain DMD, of the same prompts")
    found.add_argument(
        "--prompts", type=Path, help="texts of prompt ids: .txt (line number), .csv or .jsonl (id, text)"
    )
    found.add_argument("--geneval", type=Path, help="GenEval's evaluation_metadata.jsonl, for alignment.geneval_vqa")
    found.add_argument("--duplicates-above", type=float, metavar="COSINE", help="what counts as a near-duplicate")
    found.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="folder of all weights (%(default)s)")
    found.add_argument("--json", type=Path, help="write everything, per prompt too, to this file")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    found.add_argument("--processes", type=int, default=1, help="prompts are spread over them (%(default)s)")
    found.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help="pictures a pass on a GPU (%(default)s)")
    found.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the bootstrap (%(default)s)")
    return found


def main(arguments: list[str]) -> None:
    """Score, print the table, write the file; exits with 3 if something is missing.

    Raises:
        ValueError, OSError: in one line, for what the user can mend.
    """
    asked = parser().parse_args(arguments)
    if asked.json and not asked.json.parent.is_dir():
        raise OSError(f"--json {asked.json}: there is no folder {asked.json.parent}")
    wanted = [name.strip() for name in asked.by.split(",") if name.strip()]
    if "human" in wanted:
        if wanted != ["human"]:
            raise ValueError("--by human reads results of a page, the others read pictures: ask for it alone")
        _score_people(asked)
        return
    _score_pictures(asked)


def _score_people(asked: argparse.Namespace) -> None:
    from dpdmd_pipeline.metrics.human import as_text, load_results, summarise

    summary = summarise(load_results(asked.images), asked.seed)
    print(as_text(summary))
    _write(asked.json, summary)


def _score_pictures(asked: argparse.Namespace) -> None:
    from dpdmd_pipeline.metrics.pictures import find_pictures
    from dpdmd_pipeline.metrics.presets import choose
    from dpdmd_pipeline.metrics.score import Reference, gaps_recovered
    from dpdmd_pipeline.metrics.table import as_gap_table, as_record, as_table

    _check(asked)
    presets, settings = choose(asked.by), _settings(asked)
    compared = asked.reference or asked.teacher
    reference = Reference(find_pictures(compared, asked.prompts)[0]) if compared else None
    others = {name: getattr(asked, name) for name in ("teacher", "baseline") if getattr(asked, name)}
    scored = {
        name: _scored(folder, presets, settings, reference, asked.prompts)
        for name, folder in {"images": asked.images[0], **others}.items()
    }
    record = {"images": str(asked.images[0]), **as_record(scored["images"])}
    print(as_table(scored["images"]))
    for name in others:
        record[name] = as_record(scored[name])
        print(f"\n{name}: {as_table(scored[name], said=scored['images'].missing)}")
    if others:
        gaps = gaps_recovered(scored["teacher"], scored["baseline"], scored["images"], settings.seed)
        record["gap_recovered"] = gaps
        print(f"\n{as_gap_table(gaps)}")
    _write(asked.json, record)
    if any(scores.missing or scores.faults for scores in scored.values()):
        sys.exit(INCOMPLETE)


def _check(asked: argparse.Namespace) -> None:
    if len(asked.images) != 1:
        raise ValueError(f"{len(asked.images)} folders given: score one at a time (--teacher, --baseline compare)")
    if bool(asked.teacher) != bool(asked.baseline):
        raise ValueError("the gap recovered needs both --teacher and --baseline")
    for name, least in (("processes", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(asked, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(asked, name)} must be at least {least}")
    if asked.duplicates_above is not None and not -1 <= asked.duplicates_above <= 1:
        raise ValueError(f"--duplicates-above {asked.duplicates_above} must be a cosine, -1 to 1")


def _settings(asked: argparse.Namespace) -> Settings:
    import torch

    from dpdmd_pipeline.metrics.passes import Passes
    from dpdmd_pipeline.metrics.pictures import read_parts
    from dpdmd_pipeline.metrics.presets import Settings
    from dpdmd_pipeline.metrics.weights import CLIP_SHAPES

    there = torch.cuda.is_available()
    if asked.device == "cuda" and not there:
        raise ValueError("--device cuda: PyTorch sees no GPU here: use cpu")
    device = asked.device if asked.device != "auto" else "cuda" if there else "cpu"
    parts = read_parts(asked.geneval) if asked.geneval else {}
    passes = Passes(device, asked.batch_size)
    elsewhere = {CLIP_SHAPES.folder: SHIPPED_CLIP} if not (asked.weights / CLIP_SHAPES.folder).is_dir() else {}
    return Settings(asked.weights, passes, asked.processes, asked.seed, asked.duplicates_above, parts, elsewhere)


def _scored(
    folder: Path,
    presets: list[Preset],
    settings: Settings,
    reference: Reference | None,
    prompts: Path | None,
) -> Scores:
    from dpdmd_pipeline.metrics.pictures import find_pictures
    from dpdmd_pipeline.metrics.score import score

    sets, rest = find_pictures(folder, prompts)
    scores = score(sets, presets, settings, reference)
    if rest:
        scores.note(f"{len(rest)} files in {folder} are no pictures: {', '.join(rest[:5])}")
    return scores


def _write(path: Path | None, record: dict[str, Any]) -> None:
    from dpdmd_pipeline.publishing import write_atomically

    if path:
        content = json.dumps(record, indent=2, allow_nan=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(content))
