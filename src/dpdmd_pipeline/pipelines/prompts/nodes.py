"""Nodes of the prompts stage."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.datasets.lineage import code_hash, text_side_hash
from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, fingerprint
from dpdmd_pipeline.pipelines.prompts.cleaning import CleanPrompts, split_by_files, split_by_hash, survey
from dpdmd_pipeline.pipelines.prompts.encoding import Rows, encode_rows, rows_of, truncated_rows
from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions

log = logging.getLogger(__name__)

CODE = ("pipelines/prompts/encoding.py",)  # embeddings are only taken up by the code that makes them, and the family's
MAX_WARNINGS = 20  # truncated prompts that are logged one by one
MAX_LISTED = 1000  # truncated prompts that the manifest lists; it counts all


def clean_prompts(
    raw_prompts: PromptFile, raw_eval_prompts: PromptFile, options: PromptsOptions
) -> tuple[CleanPrompts, dict[str, Any]]:
    """Unique, normalised prompts with their uses, and what was dropped.

    Bad input is refused here, before a file is written.

    Returns:
        Records {"text": str, "train": bool, "eval": bool}, and a report: `counts`, and per file its
        counts and the dropped lines (the first 1,000).

    Raises:
        ValueError, OSError: see PromptFile and `survey`; also if several machines would write the same files.
    """
    if options.launch.machines > 1:
        raise ValueError(
            f"prompts.launch.machines={options.launch.machines}: each would clean the prompts into the same file: "
            "run --nodes clean_prompts on one with machines=1, then --nodes encode_prompts on all"
        )
    surveys = [survey(raw_prompts)]
    if options.eval_share is None:
        surveys.append(survey(raw_eval_prompts))
        prompts = split_by_files(*surveys)
    else:
        prompts = split_by_hash(surveys[0], options.eval_share)
    files = [found.report() for found in surveys]
    for report in files:
        _log_survey(report)
    return prompts, {"counts": prompts.count(), "files": files}


def _log_survey(report: dict[str, Any]) -> None:
    name, lines = report["file"], report["lines"]
    if report["numbered_list"]:
        log.info("prompts: %s is a numbered list, its numbers were taken off", name)
    if report["dropped"]:
        log.warning(
            "prompts: %s: %d of %d lines kept, %d empty and %d repeated dropped (line by line in prompts_report)",
            *(report[key] for key in ("file", "kept", "lines", "empty", "repeated")),
        )
    else:
        log.info("prompts: %s: all %d lines kept", name, lines)


def encode_prompts(
    prompts: PromptFile, teacher: Path, backbone: BackboneOptions, options: PromptsOptions
) -> LazyShards:
    """Each prompt encoded once, in its order, and the empty prompt last.

    The text encoders are loaded by the first shard that is missing, and go when the last is written.

    Raises:
        ValueError: if there are no prompts, or the device is not there.
        FileNotFoundError: if the teacher has no text encoder.
    """
    from dpdmd_pipeline.backbones.base import token_limits

    resolve_device(options.device)  # before the work, not after
    rows = rows_of(prompts)
    settings = {
        "teacher_text": text_side_hash(teacher),
        **backbone.model_dump(mode="json", include={"family", "max_sequence_length", "dtype"}),
    }
    limits = token_limits(backbone.family, teacher, backbone.max_sequence_length)
    manifest = {
        "prompts": rows.num_prompts,
        "texts": rows.digest,
        **settings,
        "token_limits": {name: limit.tokens for name, limit in limits.items()},
        "truncated": _truncated(rows, teacher, limits),
    }
    load = LastLoaded(partial(backbone.load, teacher, options.device))
    starts = range(0, len(rows), options.shard_size)
    shards = {
        f"{index:05d}": partial(encode_rows, rows, start, start + options.shard_size, load, options.batch_size)
        for index, start in enumerate(starts)
    }
    code = code_hash(*CODE, f"backbones/{backbone.family}.py")
    identity = fingerprint(rows.digest, settings, options.shard_size, code)
    return LazyShards(shards, identity, manifest, options.launch.of_shards(identity[:16], options.device))


def _truncated(rows: Rows, teacher: Path, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Warn of prompts the tokenizers cut off, and list them for the manifest."""
    count, listed = 0, []
    for row, text, lost in truncated_rows(rows, teacher, limits):
        count += 1
        if count <= MAX_LISTED:
            listed.append({"row": row, "tokens_lost": lost})
        if count <= MAX_WARNINGS:
            losses = ", ".join(
                f"{name} cuts off {tokens} of {tokens + limits[name].tokens} tokens" for name, tokens in lost.items()
            )
            log.warning("prompts: %s line %d: %s: %.120s", rows.prompts.path.name, row + 1, losses, text)
    if count > MAX_WARNINGS:
        log.warning(
            "prompts: %d more prompts are cut off (the first %d are in the manifest of embeddings)",
            count - MAX_WARNINGS,
            MAX_LISTED,
        )
    return {"count": count, "listed": listed}
