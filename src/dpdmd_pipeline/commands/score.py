"""`score`: any folder of pictures, from any model, judged without a pipeline."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdmd_pipeline.commands.target import refuse_unwritable
from dpdmd_pipeline.wording import listed

if TYPE_CHECKING:
    from dpdmd_pipeline.metrics.pictures import FileSet
    from dpdmd_pipeline.metrics.presets import Preset, Settings
    from dpdmd_pipeline.metrics.score import Reference, Scores

INCOMPLETE = 3  # exit code: measured, but not everything that was asked for
DEFAULT_WEIGHTS = Path("data/06_models/metrics")
SHIPPED_CLIP = Path("data/06_models/shapes_clip")  # of the embedded world, in the project's git
PROJECT = Path(__file__).resolve().parents[3]  # where this package is run from a checkout
DEFAULT_SEED = 0  # of resampling only
DEFAULT_BATCH = 32  # on a GPU only
_FEW = 3  # metrics that an error names

_LAYOUTS = """\
IMAGES is a folder in one of three layouts:
  a folder per prompt    IMAGES/a red circle/01.png ...     the text is in prompt.txt beside them, else in --prompts,
                                                            else it is the name, unless that is an id: digits and no
                                                            space, as in 00000 or prompt_12
  a file per picture     IMAGES/<prompt-id>_<seed>.png ...  the text is in --prompts, else it is the id if that has a
                                                            space
  a manifest             IMAGES/manifest.csv or .jsonl      records with file, prompt, and if you like id
A folder per prompt may also be GenEval's own: IMAGES/00000/samples/0000.png, the text in IMAGES/00000/metadata.jsonl.
For what asks neither for prompts nor for seeds (quality, distribution), names in a flat folder may be any, as may be
those of --reference: each picture then counts as a prompt of its own.
Pictures of one prompt must come from different seeds, and from as many as in what you compare with.
With --prompts, every id without a prompt.txt must be in that file; a manifest has its own texts. What asks for the
text (alignment, preference, the exact reader of the embedded world) leaves out prompts without one. Transparent
pixels count as white, EXIF turns pictures as a viewer does.

Features of networks that several metrics look through are kept in the temporary folder (TMPDIR) while this runs,
3 to 8 kB a picture and network.

With --by human, IMAGES are the results that an arena page has saved: score results.json --by human

Exit code: 0 all measured, 1 or 2 refused, 3 measured but something is missing or was left out; the table says what.
"""

Found = tuple[list["FileSet"], list[str]]  # sets of pictures, and files that are none


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    from dpdmd_pipeline.metrics.presets import AXES

    found = argparse.ArgumentParser(
        prog="python -m dpdmd_pipeline score",
        description="Score any folder of pictures.",
        epilog=f"{_LAYOUTS}\n{_metrics()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="folder of pictures")
    found.add_argument("--by", required=True, help=f"axes ({', '.join(AXES)}) or metrics below, or human")
    found.add_argument("--reference", type=Path, help="folder to compare with: the teacher's, or real ones of any name")
    found.add_argument("--teacher", type=Path, help="the teacher's pictures; with --baseline, for the gap recovered")
    found.add_argument("--baseline", type=Path, help="pictures of plain DMD, of the same prompts")
    found.add_argument(
        "--prompts", type=Path, help="texts of prompt ids: .txt (line number), .csv or .jsonl (id, text)"
    )
    found.add_argument("--geneval", type=Path, help="GenEval's evaluation_metadata.jsonl, for alignment.geneval_vqa")
    found.add_argument("--duplicates-above", type=float, metavar="COSINE", help="what counts as a near-duplicate")
    found.add_argument(
        "--weights", type=Path, help=f"folder of all weights ({DEFAULT_WEIGHTS} here, else in the project)"
    )
    found.add_argument("--json", type=Path, help="write everything, per prompt too, to this file")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    found.add_argument("--processes", type=int, default=1, help="prompts are spread over them (%(default)s)")
    found.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help="pictures a pass on a GPU (%(default)s)")
    seeded = "of the bootstrap, and of the parts by which large sets are compared (%(default)s)"
    found.add_argument("--seed", type=int, default=DEFAULT_SEED, help=seeded)
    return found


def _metrics() -> str:
    """What can be asked for, and what cannot."""
    from dpdmd_pipeline.metrics.presets import LEFT_OUT, PRESETS

    here = [f"  {preset.full_name:28}{'*' if preset.by_default else ' '} {preset.protocol}" for preset in PRESETS]
    left_out = [f"  {name:29} {reason}" for name, reason in LEFT_OUT.items()]
    titles = "Metrics (* those that the axis alone means):", "Not here, since they cannot live in this environment:"
    return "\n".join([titles[0], *here, "", titles[1], *left_out])


def main(arguments: list[str]) -> None:
    """Score, print the table, write the file; exits with 3 if something is missing.

    Raises:
        ValueError, OSError: in one line, for what the user can mend.
    """
    try:
        asked = parser().parse_args(arguments)
    finally:
        _flush()  # the help may be long
    _check_file(asked.json)
    wanted = [name.strip() for name in asked.by.split(",") if name.strip()]
    if not wanted:
        raise ValueError(f"--by {asked.by!r} names no metric: name axes or metrics, as in --by diversity,quality")
    if "human" in wanted:
        if wanted != ["human"]:
            raise ValueError("--by human reads results of a page, the others read pictures: ask for it alone")
        _score_people(asked)
        return
    _score_pictures(asked)


def _score_people(asked: argparse.Namespace) -> None:
    from dpdmd_pipeline.metrics.human import as_text, load_results, summarise

    summary = summarise(load_results(asked.images), asked.seed)
    _say(as_text(summary))
    _write(asked.json, summary)


def _score_pictures(asked: argparse.Namespace) -> None:
    from dpdmd_pipeline.metrics.libraries import versions
    from dpdmd_pipeline.metrics.pictures import about_names, about_strays
    from dpdmd_pipeline.metrics.presets import choose
    from dpdmd_pipeline.metrics.score import score

    _check(asked)
    presets, settings = choose(asked.by), _settings(asked)
    folders = _judged(asked)
    found = {name: _find(folder, asked.prompts, presets) for name, folder in folders.items()}
    told = _check_gap(folders, found, presets)
    reference, strays = _reference(asked, found)
    with _shared_features(settings, presets, len(found)) as shared:
        scored = {name: score(sets, presets, shared, reference) for name, (sets, _) in found.items()}
    for name, (sets, rest) in found.items():
        notes = about_names(folders[name], sets), about_strays(folders[name], rest), strays, told
        for note in filter(None, notes):
            scored[name].note(note)
    record, text = _told(scored, settings.seed)
    _say(text)
    _write(asked.json, {"images": str(asked.images[0]), "libraries": versions(), **record})
    if record.get("gap_notes") or any(scores.missing or scores.faults for scores in scored.values()):
        sys.exit(INCOMPLETE)


def _find(folder: Path, prompts: Path | None, presets: Sequence[Preset]) -> Found:
    """Sets of a folder, of which names tell the prompt where a metric asks for it, or for its other seeds."""
    from dpdmd_pipeline.metrics.pictures import UnnamedError, find_pictures

    asking = [preset.full_name for preset in presets if preset.axis == "diversity" or preset.needs_text]
    try:
        return find_pictures(folder, prompts, any_name=not asking)
    except UnnamedError as error:
        remedy = f"leave out {listed(asking, _FEW)}: quality and distribution, asked for alone, take any names"
        raise ValueError(f"{error}, or {remedy}") from error


@contextmanager
def _shared_features(settings: Settings, presets: Sequence[Preset], folders: int) -> Iterator[Settings]:
    """With a temporary folder for features, where a network is asked for the same pictures twice."""
    networks = Counter(needed.folder for preset in presets for needed in preset.weights)
    if folders == 1 and max(networks.values(), default=0) < 2:
        yield settings
        return
    with tempfile.TemporaryDirectory() as features:
        yield replace(settings, features=Path(features))


def _told(scored: Mapping[str, Scores], seed: int) -> tuple[dict[str, Any], str]:
    """Scores of the images, and of teacher and baseline where they are there: for a file, and for people."""
    from dpdmd_pipeline.metrics.score import gap_notes, gaps_recovered
    from dpdmd_pipeline.metrics.table import as_gap_table, as_record, as_table

    first, *others = scored
    record, texts = as_record(scored[first]), [as_table(scored[first])]
    for name in others:
        record[name] = as_record(scored[name])
        texts.append(f"{name}: {as_table(scored[name], said=scored[first].missing)}")
    if others:
        models = [scored[name] for name in (*others, first)]
        record["gap_recovered"], record["gap_notes"] = gaps_recovered(*models, seed), gap_notes(*models)
        texts.append(as_gap_table(record["gap_recovered"], record["gap_notes"]))
    return record, "\n\n".join(texts)


def _check_file(path: Path | None) -> None:
    if path and path.is_dir():
        raise OSError(f"--json {path} is a folder: name a file in it")
    if path:
        refuse_unwritable("--json", path)


def _check(asked: argparse.Namespace) -> None:
    if len(asked.images) != 1:
        raise ValueError(f"{len(asked.images)} folders given: score one at a time (--teacher, --baseline compare)")
    if bool(asked.teacher) != bool(asked.baseline):
        raise ValueError("the gap recovered needs both --teacher and --baseline")
    for name, least in (("processes", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(asked, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(asked, name)} must be at least {least}")
    if asked.seed >= 2**63:
        raise ValueError(f"--seed {asked.seed} must be below 2^63")
    if asked.duplicates_above is not None and not -1 <= asked.duplicates_above <= 1:
        raise ValueError(f"--duplicates-above {asked.duplicates_above} must be a cosine, -1 to 1")


def _judged(asked: argparse.Namespace) -> dict[str, Path]:
    """Folders that are scored, by their part in it."""
    others = {name: getattr(asked, name) for name in ("teacher", "baseline") if getattr(asked, name)}
    return {"images": asked.images[0], **others}


def _check_gap(folders: Mapping[str, Path], found: Mapping[str, Found], presets: Sequence[Preset]) -> str:
    """What a reader of the gap should know of its prompts, if anything; refuses a gap that cannot be.

    Raises:
        ValueError: if no diversity is measured, or no prompt is in all folders.
    """
    if len(folders) == 1:
        return ""
    if not any(preset.axis == "diversity" for preset in presets):
        raise ValueError("the gap recovered is one of diversity: name a diversity metric with --by")
    ids = {name: {one.id for one in sets} for name, (sets, _) in found.items()}
    common = set.intersection(*ids.values())
    if not common:
        named = ", ".join(f"{folder} ({min(ids[name])!r} ...)" for name, folder in folders.items())
        raise ValueError(f"no prompt is in all of {named}: the gap recovered compares the same prompts, by id")
    every = set.union(*ids.values())
    if common == every:
        return ""
    return f"the gap recovered is over the {len(common)} of {len(every)} prompts that are in all folders"


def _reference(asked: argparse.Namespace, found: Mapping[str, Found]) -> tuple[Reference | None, str]:
    """What pictures are compared with, and a note about its stray files. Nothing asks for the texts of its prompts."""
    from dpdmd_pipeline.metrics.pictures import about_strays, find_pictures
    from dpdmd_pipeline.metrics.score import Reference

    if asked.reference:
        sets, rest = find_pictures(asked.reference, any_name=True)
        return Reference(sets), about_strays(asked.reference, rest, " (the reference)")
    return (Reference(found["teacher"][0]), "") if asked.teacher else (None, "")


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
    weights = asked.weights or _of_project(DEFAULT_WEIGHTS)
    is_own = (weights / CLIP_SHAPES.folder).is_dir()
    elsewhere = {} if is_own else {CLIP_SHAPES.folder: _of_project(SHIPPED_CLIP)}
    return Settings(weights, passes, asked.processes, asked.seed, asked.duplicates_above, parts, elsewhere)


def _of_project(place: Path) -> Path:
    """A folder of the project below the working folder, else in the checkout that this package is run from.

    Where neither can be, it is named in full, so that who lacks it sees where it was looked for.
    """
    if place.exists() or Path.cwd() == PROJECT:
        return place
    return PROJECT / place if (PROJECT / "pyproject.toml").is_file() else place.absolute()


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text)
    _flush()


def _flush() -> None:
    """Hand over what was printed. A reader that has gone, as in `| head`, is no error: the rest goes nowhere."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(path: Path | None, record: dict[str, Any]) -> None:
    from dpdmd_pipeline.publishing import write_text

    if path:
        write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
