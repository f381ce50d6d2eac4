import json
import logging
import re
import shutil

import pytest
import torch
from pydantic import ValidationError
from tests.pipelines.conftest import ONE, TWO, shared_by_two
from tests.raising import refuses

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.datasets.prompt_file import PromptFile, PromptFileDataset
from dpdmd_pipeline.datasets.sharded import ShardedDataset
from dpdmd_pipeline.pipelines.prompts import nodes
from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts, encode_prompts
from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions

OPTIONS = {
    "take": None,
    "seed": 0,
    "eval_share": None,
    "batch_size": 2,
    "shard_size": 2,
    "device": "cpu",
    "launch": ONE,
}
BACKBONE = {
    "family": "sd3",
    "resolution": 32,
    "max_sequence_length": 0,
    "num_steps": 30,
    "guidance_scale": 3.5,
    "level_range": [0.02, 0.98],
    "dtype": "float32",
    "teacher_dtype": None,
}
TEXTS = ["a red circle", "a blue square", "one green triangle"]


def options(**changes):
    return PromptsOptions(**OPTIONS | changes)


def backbone(**changes):
    return BackboneOptions(**BACKBONE | changes)


def words(caplog) -> set[str]:
    return set(caplog.text.replace(",", " ").split())


def write_records(path, texts):
    dataset = PromptFileDataset(filepath=str(path))
    dataset.save({"text": text, "train": True, "eval": False} for text in texts)
    return dataset.load()


@pytest.fixture
def prompts(tmp_path):
    return write_records(tmp_path / "prompts.jsonl", TEXTS)


def test_bad_input_is_refused_by_the_node_and_not_while_saving(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ok\n\x00")
    with refuses(ValueError, "line 2, byte 3: NUL"):
        clean_prompts(PromptFile(tmp_path / "a.txt"), PromptFile(tmp_path / "absent.txt"), options())


def test_the_evaluation_file_is_read_only_when_it_decides(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"{index} cats" for index in range(100)))
    files = PromptFile(tmp_path / "a.txt"), PromptFile(tmp_path / "absent.txt")
    _, report = clean_prompts(*files, options(eval_share=0.2))
    assert len(report["files"]) == 1
    with refuses(FileNotFoundError, "absent"):
        clean_prompts(*files, options())


def test_the_report_is_json_and_lists_the_dropped_lines(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("1. a cat\n2. a cat\n")
    with caplog.at_level(logging.INFO):
        prompts, report = clean_prompts(*[PromptFile(tmp_path / "a.txt")] * 2, options())
    assert list(prompts) == [{"text": "a cat", "train": True, "eval": True}]
    dropped = json.loads(json.dumps(report))["files"][0]["dropped"]
    assert dropped == [{"file": "a.txt", "line": 2, "reason": "repeats line 1"}]
    numbered, counts = caplog.messages[:2]
    assert "a.txt" in numbered and "numbered list" in numbered
    assert "a.txt" in counts and re.findall(r"\d+", counts) == ["1", "2", "0", "1"]  # kept, lines, empty, repeated


def test_embeddings_equal_the_diffusers_pipelines_and_the_last_is_of_the_empty_prompt(tmp_path, prompts, tiny_teacher):
    from diffusers import StableDiffusion3Pipeline

    dataset = ShardedDataset(filepath=str(tmp_path / "embeddings"))
    dataset.save(encode_prompts(prompts, tiny_teacher, backbone(), options()))
    stored = dataset.load()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_teacher, text_encoder_3=None, tokenizer_3=None)
    texts = [*TEXTS, ""]
    assert len(stored) == len(texts)
    for start in (0, 2):
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                texts[start : start + 2], None, None, do_classifier_free_guidance=False, max_sequence_length=0
            )
        rows = stored.rows([start, start + 1])
        assert torch.equal(rows["prompt_embeds"], embeds)
        assert torch.equal(rows["pooled_embeds"], pooled)


def test_two_processes_leave_the_bytes_of_one(tmp_path, prompts, tiny_teacher):
    folders = tmp_path / "by_one", tmp_path / "by_two"
    by_one, by_two = (
        encode_prompts(prompts, tiny_teacher, backbone(), options(launch=launch)) for launch in (ONE, TWO)
    )
    for folder, shards in zip(folders, (by_one, shared_by_two(by_two)), strict=True):
        ShardedDataset(filepath=str(folder)).save(shards)
    by_one, by_two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert by_two == by_one and len(by_one) == 3


def test_text_encoders_load_once_and_only_for_a_missing_shard(tmp_path, prompts, tiny_teacher, monkeypatch):
    loads = []
    load = BackboneOptions.load
    monkeypatch.setattr(BackboneOptions, "load", lambda *args: loads.append(args) or load(*args))
    dataset = ShardedDataset(filepath=str(tmp_path / "embeddings"))
    dataset.save(encode_prompts(prompts, tiny_teacher, backbone(), options()))
    assert len(loads) == 1
    dataset.save(encode_prompts(prompts, tiny_teacher, backbone(), options(batch_size=1)))
    assert len(loads) == 1


def test_the_fingerprint_depends_on_the_content_and_nothing_else(tmp_path, prompts, tiny_teacher, monkeypatch):
    def identity(file=prompts, teacher=tiny_teacher, backbone_changes=(), **changes):
        return encode_prompts(file, teacher, backbone(**dict(backbone_changes)), options(**changes)).fingerprint

    copy = shutil.copytree(tiny_teacher, tmp_path / "copy")
    same = identity()
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"trained on")
    assert identity(teacher=copy, batch_size=1, backbone_changes={"num_steps": 9, "guidance_scale": 1.0}) == same
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"model_max_length": 12', '"model_max_length": 11'))
    others = [
        identity(teacher=copy),
        identity(shard_size=3),
        identity(backbone_changes={"dtype": "bfloat16"}),
        identity(write_records(tmp_path / "other.jsonl", TEXTS[::-1])),
        identity(write_records(tmp_path / "more.jsonl", [*TEXTS, "a cat"])),
    ]
    monkeypatch.setattr("dpdmd_pipeline.pipelines.prompts.nodes.code_hash", lambda *paths: "of other code")
    assert len({same, *others, identity()}) == 7


def test_a_truncated_prompt_is_named_with_its_loss(tmp_path, tiny_teacher, caplog):
    from transformers import AutoTokenizer

    long = "a picture of a red [/circle] é"
    prompts = write_records(tmp_path / "prompts.jsonl", [TEXTS[0], long])
    manifest = encode_prompts(prompts, tiny_teacher, backbone(), options()).manifest
    tokens = len(AutoTokenizer.from_pretrained(tiny_teacher / "tokenizer")(long)["input_ids"])
    lost = {"tokenizer": tokens - 12, "tokenizer_2": tokens - 12}
    assert manifest["truncated"] == {"count": 1, "listed": [{"row": 1, "tokens_lost": lost}]}
    assert {"prompts.jsonl", "line", "2:", "tokenizer", "tokenizer_2", str(tokens - 12), str(tokens)} < words(caplog)
    assert long in caplog.text


def test_a_truncated_prompt_of_sana_is_named_too(tmp_path, tiny_sana, caplog):
    fits, long = "circle", "circle,square"  # a token per byte
    prompts = write_records(tmp_path / "prompts.jsonl", [fits, long])
    sana = backbone(family="sana", max_sequence_length=len(fits) + 2)
    manifest = encode_prompts(prompts, tiny_sana, sana, options()).manifest
    assert manifest["token_limits"] == {"tokenizer": len(fits)}
    lost = {"tokenizer": len(long) - len(fits)}
    assert manifest["truncated"] == {"count": 1, "listed": [{"row": 1, "tokens_lost": lost}]}
    assert {"prompts.jsonl", "2:", "tokenizer", str(lost["tokenizer"]), str(len(long))} < words(caplog)


def test_warnings_are_capped_and_counted(tmp_path, tiny_teacher, caplog, monkeypatch):
    monkeypatch.setattr(nodes, "MAX_WARNINGS", 2)
    monkeypatch.setattr(nodes, "MAX_LISTED", 3)
    prompts = write_records(tmp_path / "prompts.jsonl", [f"unknown words everywhere {index}" for index in range(5)])
    truncated = encode_prompts(prompts, tiny_teacher, backbone(), options()).manifest["truncated"]
    assert (truncated["count"], len(truncated["listed"])) == (5, 3)
    *warnings, rest = caplog.messages
    assert len(warnings) == 2 and all("tokenizer_2" in warning for warning in warnings)
    assert {"3", "more"} < set(rest.split())


def test_prompts_that_fit_are_not_logged(prompts, tiny_teacher, caplog):
    assert encode_prompts(prompts, tiny_teacher, backbone(), options()).manifest["truncated"]["count"] == 0
    assert not caplog.records


def test_a_teacher_without_text_encoder_is_refused(tmp_path, prompts):
    with refuses(FileNotFoundError, "text_encoder/"):
        encode_prompts(prompts, tmp_path, backbone(), options())


@pytest.mark.parametrize(
    "changes",
    [
        {"take": 0},
        {"take": 1.5},
        {"seed": -1},
        {"eval_share": 0},
        {"eval_share": 1.0},
        {"eval_share": "x"},
        {"batch_size": 0},
        {"batch_size": 1.5},
        {"shard_size": True},
        {"device": "tpu"},
        {"launch": {**ONE, "processes": 0}},
        {"launch": {**ONE, "machines": 2}},
        {"typo": 1},
    ],
)
def test_bad_prompts_options_are_refused(changes):
    with pytest.raises(ValidationError):
        options(**changes)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"family": "sd9"}, "family"),
        ({"resolution": "32"}, "resolution"),
        ({"max_sequence_length": -1}, "max_sequence_length"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"level_range": [0.9, 0.1]}, "level_range"),
        ({"level_range": [0, 1.5]}, "level_range"),
        ({"dtype": "float8"}, "dtype"),
        ({"typo": 1}, "typo"),
    ],
)
def test_bad_backbone_options_are_refused_by_name(changes, option):
    with pytest.raises(ValidationError, match=option):
        backbone(**changes)


@pytest.mark.parametrize("model", [PromptsOptions, BackboneOptions])
def test_no_option_has_a_default(model):
    assert all(field.is_required() for field in model.model_fields.values())


def test_auto_is_cuda_if_it_exists_and_cuda_without_a_device_is_refused():
    if torch.cuda.is_available():
        assert resolve_device("auto").type == "cuda"
    else:
        assert resolve_device("auto").type == "cpu"
        with refuses(ValueError, "'cuda'"):
            resolve_device("cuda")
