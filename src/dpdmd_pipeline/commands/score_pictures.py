"""Body of `score`: score any folder of pictures, from any model, without a pipeline."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpdmd_pipeline.backbones.options import resolve_device
from dpdmd_pipeline.commands.output import refuse_unwritable, say
from dpdmd_pipeline.commands.score import DEFAULT_WEIGHTS
from dpdmd_pipeline.metrics.libraries import versions
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.publishing import write_text
from dpdmd_pipeline.scoring.folders import FolderContents, UnnamedError, about_names, about_strays, find_pictures
from dpdmd_pipeline.scoring.gap import gaps_recovered
from dpdmd_pipeline.scoring.human import as_text, load_results, summarise
from dpdmd_pipeline.scoring.preset import Preset, Settings
from dpdmd_pipeline.scoring.presets import LEFT_OUT, PRESETS, choose
from dpdmd_pipeline.scoring.published import CLIP_SHAPES
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference, Scores
from dpdmd_pipeline.scoring.table import as_gap_table, as_record, as_table
from dpdmd_pipeline.scoring.texts import read_parts
from dpdmd_pipeline.wording import listed

INCOMPLETE = 3  # exit code: measured, but with missing metrics or faults
SHIPPED_CLIP = Path("data/06_models/shapes_clip")  # the embedded world's CLIP, in the project's git
PROJECT = Path(__file__).resolve().parents[3]  # the checkout that this package runs from
_FEW = 3  # metrics in a message


def list_metrics() -> str:
    """List of the metrics, and of those that need another environment."""
    lines = ["Metrics (* included by the axis alone):"]
    lines += [f"  {preset.full_name:28}{'*' if preset.by_default else ' '} {preset.protocol}" for preset in PRESETS]
    lines += ["", "Not available, because they need another environment:"]
    lines += [f"  {name:29} {reason}" for name, reason in LEFT_OUT.items()]
    return "\n".join(lines)


def score_folders(options: SimpleNamespace) -> None:
    """Score, print the table, write the file; exit with 3 if something is missing.

    Errors that the user can correct are a ValueError or an OSError of one line.
    """
    if options.json:
        if options.json.is_dir():
            raise OSError(f"--json {options.json} is a folder: name a file in it")
        refuse_unwritable("--json", options.json)
    metrics = [name.strip() for name in options.by.split(",") if name.strip()]
    if not metrics:
        raise ValueError(f"--by {options.by!r} names no metric: name axes or metrics, as in --by diversity,quality")
    if "human" not in metrics:
        _score_pictures(options)
    elif metrics == ["human"]:
        summary = summarise(load_results(options.images), options.seed)
        say(as_text(summary))
        _write(options.json, summary)
    else:
        raise ValueError("--by human reads results of a page, the other metrics read pictures: use --by human alone")


def _score_pictures(options: SimpleNamespace) -> None:
    _check(options)
    presets, settings = choose(options.by), _settings(options)
    folders = {"images": options.images[0]}
    folders |= {name: getattr(options, name) for name in ("teacher", "baseline") if getattr(options, name)}
    contents = {name: _find(folder, options.prompts, presets) for name, folder in folders.items()}
    about_gap = _check_gap(folders, contents, presets)
    reference, about_reference = _reference(options, contents)
    with _feature_folder(presets, len(contents)) as features:
        shared = replace(settings, features=features and Path(features))
        scored = {name: score(sets, presets, shared, reference) for name, (sets, _) in contents.items()}
    for name, (sets, strays) in contents.items():
        notes = about_names(folders[name], sets), about_strays(folders[name], strays), about_reference, about_gap
        for note in filter(None, notes):
            scored[name].note(note)
    record, text = _results(scored, settings.seed)
    say(text)
    _write(options.json, {"images": str(options.images[0]), "libraries": versions(), **record})
    if record.get("gap_notes") or any(scores.missing or scores.faults for scores in scored.values()):
        sys.exit(INCOMPLETE)


def _check(options: SimpleNamespace) -> None:
    if len(options.images) != 1:
        raise ValueError(f"{len(options.images)} folders given: score one at a time (--teacher, --baseline compare)")
    if bool(options.teacher) != bool(options.baseline):
        raise ValueError("the gap recovered needs both --teacher and --baseline")
    for name, least, most in (("processes", 1, 1024), ("batch_size", 1, 2**16), ("seed", 0, 2**63 - 1)):
        if not least <= getattr(options, name) <= most:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be {least} to {most}")
    if options.duplicates_above is not None and not -1 <= options.duplicates_above <= 1:
        raise ValueError(f"--duplicates-above {options.duplicates_above} must be a cosine, -1 to 1")


def _find(folder: Path, prompts: Path | None, presets: Sequence[Preset]) -> FolderContents:
    """Find the sets of a folder; names must tell prompts if a metric reads the text or compares seeds."""
    need_prompts = [preset.full_name for preset in presets if preset.axis == "diversity" or preset.needs_text]
    try:
        return find_pictures(folder, prompts, any_name=not need_prompts)
    except UnnamedError as error:
        raise ValueError(
            f"{error}, or leave out {listed(need_prompts, _FEW)}: only quality and distribution accept any names"
        ) from error


def _check_gap(folders: Mapping[str, Path], contents: Mapping[str, FolderContents], presets: Sequence[Preset]) -> str:
    """Note on the prompts that the gap recovered leaves out; empty without any."""
    if len(folders) == 1:
        return ""
    if not any(preset.axis == "diversity" for preset in presets):
        raise ValueError("the gap recovered is one of diversity: name a diversity metric with --by")
    ids = {name: {one.id for one in sets} for name, (sets, _) in contents.items()}
    common, union = set.intersection(*ids.values()), set.union(*ids.values())
    if not common:
        examples = ", ".join(f"{folder} ({min(ids[name])!r} ...)" for name, folder in folders.items())
        raise ValueError(f"no prompt id is in all of {examples}: the gap recovered compares the same prompts")
    if common == union:
        return ""
    return f"the gap recovered is over the {len(common)} of {len(union)} prompts that are in all folders"


def _reference(options: SimpleNamespace, contents: Mapping[str, FolderContents]) -> tuple[Reference | None, str]:
    """The pictures to compare with, and a note on stray files beside them."""
    if options.reference:
        sets, strays = find_pictures(options.reference, any_name=True)  # no metric reads the reference's texts
        return Reference(sets), about_strays(options.reference, strays, " (the reference)")
    return (Reference(contents["teacher"][0]), "") if options.teacher else (None, "")


def _settings(options: SimpleNamespace) -> Settings:
    parts = read_parts(options.geneval) if options.geneval else {}
    passes = Passes(resolve_device(options.device).type, options.batch_size)
    weights = options.weights or _in_project(DEFAULT_WEIGHTS)
    has_clip = (weights / CLIP_SHAPES.folder).is_dir()
    elsewhere = {} if has_clip else {CLIP_SHAPES.folder: _in_project(SHIPPED_CLIP)}
    return Settings(weights, passes, options.processes, options.seed, options.duplicates_above, parts, elsewhere)


def _in_project(path: Path) -> Path:
    """A folder of the project, below the working folder if it exists there, else in this package's checkout.

    Without a checkout the path is absolute, so that an error shows where it was expected.
    """
    if path.exists() or Path.cwd() == PROJECT:
        return path
    return PROJECT / path if (PROJECT / "pyproject.toml").is_file() else path.absolute()


def _feature_folder(presets: Sequence[Preset], folders: int) -> AbstractContextManager[str | None]:
    """A temporary folder for features if a network would see the same pictures twice, else None."""
    networks = Counter(weights.folder for preset in presets for weights in preset.weights)
    is_shared = folders > 1 or max(networks.values(), default=0) > 1
    return tempfile.TemporaryDirectory() if is_shared else nullcontext()


def _results(scored: Mapping[str, Scores], seed: int) -> tuple[dict[str, Any], str]:
    """Record and text of the scores of the images and, if given, of teacher and baseline with the gap recovered."""
    first, *others = scored
    record, texts = as_record(scored[first]), [as_table(scored[first])]
    for name in others:
        record[name] = as_record(scored[name])
        texts.append(f"{name}: {as_table(scored[name], already_named=scored[first].missing)}")
    if others:
        models = [scored[name] for name in (*others, first)]
        record["gap_recovered"], record["gap_notes"] = gaps_recovered(*models, seed)
        texts.append(as_gap_table(record["gap_recovered"], record["gap_notes"]))
    return record, "\n\n".join(texts)


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path:
        write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
