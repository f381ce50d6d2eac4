"""Nodes of the prompts stage."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, fingerprint
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.pipelines.prompts.cleaning import CleanPrompts, split_by_files, split_by_hash, survey, take
from dpdmd_pipeline.pipelines.prompts.encoding import Rows, encode_rows, truncated_rows
from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions
from dpdmd_pipeline.planning.identity import code_hash, text_side_hash, texts_digest
from dpdmd_pipeline.planning.plan import CHOICE
from dpdmd_pipeline.wording import counted, made

log = logging.getLogger(__name__)

MAX_WARNINGS = 20  # truncated prompts to log one by one
MAX_LISTED = 1000  # truncated prompts in the manifest's list; its count includes all


def clean_prompts(
    raw_prompts: PromptFile, raw_eval_prompts: PromptFile, options: PromptsOptions
) -> tuple[CleanPrompts, dict[str, Any]]:
    """Clean and split the prompts; refuse bad input before a file is written.

    Returns:
        Unique records {"text": str, "train": bool, "eval": bool}, and a report: `choice` (the options), `counts`, and
        for each file its counts and the first 1,000 dropped lines.
    """
    surveys = [survey(raw_prompts)]
    if options.take is not None:
        surveys = [take(*surveys, options.take, options.seed)]
    if options.eval_share is None:
        surveys.append(survey(raw_eval_prompts))
        prompts = split_by_files(*surveys)
    else:
        prompts = split_by_hash(surveys[0], options.eval_share)
    files = [result.report() for result in surveys]
    for report in files:
        _log_survey(report)
    choice, counts = options.model_dump(include=set(CHOICE)), prompts.count()
    made.info("%s to train on, %d to evaluate", counted(counts["train"], "prompt"), counts["eval"])
    return prompts, {"choice": choice, "counts": counts, "files": files}


def _log_survey(report: dict[str, Any]) -> None:
    name, lines = report["file"], report["lines"]
    if report["numbered_list"]:
        log.info("prompts: %s is a numbered list, its numbers are removed", name)
    if report["not_taken"]:
        log.info("prompts: %d of %d prompts of %s taken", report["kept"], report["kept"] + report["not_taken"], name)
    if report["dropped"]:
        log.warning(
            "prompts: %s: %d of %d lines kept, %d empty and %d repeated dropped (line by line in prompts_report)",
            *(report[key] for key in ("file", "kept", "lines", "empty", "repeated")),
        )
    elif not report["not_taken"]:
        log.info("prompts: %s: all %d lines kept", name, lines)


def encode_prompts(
    prompts: PromptFile, teacher: Path, backbone: BackboneOptions, options: PromptsOptions
) -> LazyShards:
    """Encode each prompt once, in order, and the empty prompt last.

    The text encoders are loaded for the first missing shard and freed after the last.
    """
    from dpdmd_pipeline.backbones.base import token_limits

    resolve_device(options.device)  # before the work, not after
    rows = Rows(prompts, sum(1 for _ in prompts))
    if not rows.num_prompts:
        raise StageError(f"{prompts.path} has no prompts", stage="prompts")
    digest = texts_digest(prompts)
    settings = {
        "teacher_text": text_side_hash(teacher),
        **backbone.model_dump(mode="json", include={"family", "max_sequence_length", "dtype"}),
    }
    limits = token_limits(backbone.family, teacher, backbone.max_sequence_length)
    manifest = {
        "prompts": rows.num_prompts,
        "texts": digest,
        **settings,
        "shard_size": options.shard_size,
        "token_limits": {name: limit.tokens for name, limit in limits.items()},
        "truncated": _list_truncated(rows, teacher, limits),
    }
    load = LastLoaded(partial(backbone.load, teacher, options.device))
    starts = range(0, len(rows), options.shard_size)
    shards = {
        f"{index:05d}": partial(encode_rows, rows, start, start + options.shard_size, load, options.batch_size)
        for index, start in enumerate(starts)
    }
    code = code_hash("pipelines.prompts.encoding", f"backbones.{backbone.family}")
    identity = fingerprint(digest, settings, options.shard_size, code)
    return LazyShards(shards, identity, manifest, options.launch.of_shards(identity[:16], options.device))


def _list_truncated(rows: Rows, teacher: Path, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Log the prompts that tokenizers truncate, and list them for the manifest."""
    count, listed = 0, []
    for row, text, lost in truncated_rows(rows, teacher, limits):
        count += 1
        if count <= MAX_LISTED:
            listed.append({"row": row, "tokens_lost": lost})
        if count <= MAX_WARNINGS:
            losses = ", ".join(
                f"{name} drops {tokens} of {tokens + limits[name].tokens} tokens" for name, tokens in lost.items()
            )
            log.warning("prompts: %s line %d: %s: %.120s", rows.prompts.path.name, row + 1, losses, text)
    if count > MAX_WARNINGS:
        log.warning(
            "prompts: %d more prompts are truncated (the manifest of embeddings lists the first %d)",
            count - MAX_WARNINGS,
            MAX_LISTED,
        )
    return {"count": count, "listed": listed}
