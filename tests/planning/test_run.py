"""What is refused before anything large is read, and in which words."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.pipelines.conftest import OPTIMIZER, TRAIN, anchor_options, backbone_options, train_options

from dpdmd_pipeline.planning import checks, run
from dpdmd_pipeline.planning.run import Planned, disk_needs, explain_out_of_memory, refusals
from dpdmd_pipeline.training.cost import Settings, describe_cost

GIB = 2**30
DMD = {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}


@pytest.fixture
def plan(world_teacher):
    """A run that goes well, with some of it changed."""

    def make(teacher=None, backbone=None, anchors=None, prompts=None, folders=None, **changes) -> Planned:
        options = train_options(**changes)
        given = backbone_options(**(backbone or {})), anchor_options(**(anchors or {}))
        return Planned(teacher or world_teacher, *given, {"train": options}, prompts, folders or {})

    return make


@pytest.fixture
def weightless(world_teacher, tmp_path):
    """The teacher's configs without a single weight, as they are before a download."""
    return shutil.copytree(world_teacher, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_run_that_can_go_well_is_not_refused(plan):
    assert refusals(plan()) == refusals(plan(**DMD)) == []


def test_configs_are_enough(plan, weightless):
    assert refusals(plan(weightless), device_memory=64 * GIB) == []


# ---- options against the teacher


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"anchors": {"anchor_levels": [{"steps": 6}]}}, "steps=6 must be below the teacher's backbone.num_steps=6"),
        ({"grid": "trailing"}, "train: .*trailing"),
        ({"grid": [0.5, 0.2], "num_steps": 2, "backbone": {"num_steps": 30}}, "train: the first of anchors.anchor_lev"),
        ({"target": "tangent"}, "train: train.target=tangent needs anchors.with_denoised=true"),
        ({"anchored_steps": 2}, "train: train.anchored_steps=2 needs as many anchors.anchor_levels, there are 1"),
        ({"precision": "bfloat16"}, "train: backbone.dtype=float32 and train.precision=bfloat16 differ"),
        ({"channels_last": True}, "train: train.channels_last=true is for .* of a UNet, .* SD3Transformer2DModel: set"),
        (
            {"guidance_interval": [0.2, 0.8], "backbone": {"guidance_scale": 1.0}},
            "train: .* set guidance_interval=.0.0, 1",
        ),
        ({"backbone": {"resolution": 30}}, "backbone.resolution 30 must be a multiple of"),
    ],
)
def test_options_that_the_teachers_config_does_not_allow_are_refused(plan, changes, message):
    (line,) = refusals(plan(**changes))
    assert re.search(message, line) and "\n" not in line


def test_a_gpu_that_is_asked_for_and_absent_is_refused(plan):
    if torch.cuda.is_available():
        assert refusals(plan(device="cuda")) == []
    else:
        assert refusals(plan(device="cuda")) == [
            "train: device is 'cuda', but torch finds no CUDA device here: set it to 'auto' or 'cpu', "
            "or install a torch that fits your driver"
        ]


EIGHT_BITS = {"kind": "adamw_8bit"}


@pytest.mark.parametrize("roles", [("student",), ("fake_score",), ("student", "fake_score")])
def test_moments_in_8_bits_are_refused_where_their_library_or_cuda_is_absent(plan, monkeypatch, roles):
    asked = {role: {**OPTIMIZER, **EIGHT_BITS} for role in roles}
    kinds = " and ".join(f"{role}.kind=adamw_8bit" for role in roles)
    (line,) = refusals(plan(**asked))
    assert line == f"train: {kinds}: 8-bit moments need a CUDA device, this student trains on cpu: set kind=adamw"
    monkeypatch.setattr(checks, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    (line,) = refusals(plan(**asked))
    assert line.startswith(f"train: {kinds}: 8-bit moments need bitsandbytes") and "`pip install bitsandbytes`" in line
    monkeypatch.setattr(checks, "find_spec", lambda _: object())
    assert refusals(plan(**asked)) == []


def test_a_teacher_of_another_family_is_refused(plan, tmp_path, world_teacher):
    copy = shutil.copytree(world_teacher, tmp_path / "teacher")
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dynamic_shifting": True}))
    (line,) = refusals(plan(copy))
    assert "scheduler" in line and "static shift" in line


def test_adapters_that_match_no_layer_are_refused(plan):
    lora = {**TRAIN["lora"], "targets": ["no_such_layer"]}
    (line,) = refusals(plan(roles="lora", lora=lora), device_memory=64 * GIB)
    assert line.startswith("train: train.lora.targets=['no_such_layer']: ")


# ---- memory


def test_a_student_that_does_not_fit_is_refused_with_what_helps_and_by_how_much(plan):
    (line,) = refusals(plan(batch_size=64, student_micro_batch=64, fake_score_micro_batch=64), device_memory=GIB)
    assert line.startswith("train needs about 1.") and "of GPU memory, 1.0 GiB are free: " in line
    for remedy in ("train.roles=lora spares 0.", "train.gradient_checkpointing=true spares 0."):
        assert remedy in line
    assert "\n" not in line


def test_where_it_fits_the_log_tells_cost_work_and_memory(plan, caplog):
    with caplog.at_level("INFO"):
        assert refusals(plan(), device_memory=64 * GIB) == []
    assert "forwards per sample and cycle" in caplog.text and "TFLOP each" in caplog.text
    assert "estimated GPU memory: 1." in caplog.text


def test_the_cost_that_is_told_is_that_of_the_options(plan, caplog):
    asked = plan(anchors={"mode": "online"}, gradient_checkpointing=True)
    with caplog.at_level("INFO"):
        refusals(asked)
    settings = Settings(3.5, gradient_checkpointing=True, online_anchors=[2])
    assert describe_cost(asked.trained["train"], settings)[0] in caplog.text


def test_a_gpu_out_of_memory_is_explained_in_one_line(plan):
    asked = plan(batch_size=64, student_micro_batch=64, fake_score_micro_batch=64)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    line = explain_out_of_memory(error, asked.teacher, asked.backbone, asked.trained["train"])
    assert line.startswith("out of GPU memory while training (Tried to allocate 2.00 GiB); the estimate was 1.")
    assert "train.roles=lora spares 0." in line and line.endswith("finished steps are kept") and "\n" not in line


# ---- disk


def full_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_caches_that_do_not_fit_together_are_refused_with_what_helps(plan, tmp_path, monkeypatch):
    asked = plan(
        prompts=(20_000_000, 10_000_000), folders={name: tmp_path / name for name in ("embeddings", "anchors")}
    )
    sizes = disk_needs(asked)
    full_disk(monkeypatch, sum(sizes.values()) - 1)
    (line,) = refusals(asked)
    gib = {name: size / GIB for name, size in sizes.items()}
    assert line.startswith(
        f"disk of {tmp_path}: embeddings {gib['embeddings']:.2f} GiB, anchors {gib['anchors']:.2f} GiB are needed, "
    )
    assert f"half as many prompts spare {gib['embeddings'] / 2:.1f} GiB" in line
    assert f"anchors.dtype=float16 spares {gib['anchors'] / 2:.1f} GiB" in line and "\n" not in line
    full_disk(monkeypatch, sum(sizes.values()))
    assert refusals(asked) == []


def test_an_unfinished_cache_needs_no_room_for_what_is_there(plan, tmp_path, monkeypatch):
    asked = plan(prompts=(9, 9), folders={"anchors": tmp_path / "anchors"})
    need = disk_needs(asked)["anchors"]
    full_disk(monkeypatch, need // 2)
    assert len(refusals(asked)) == 1
    (tmp_path / ".anchors.partial").mkdir()
    (tmp_path / ".anchors.partial" / "00000.safetensors").write_bytes(bytes(need))
    assert refusals(asked) == []


def test_a_published_cache_needs_no_room_where_it_is_this_runs_and_stays_beside_the_new_one_where_not(
    plan, tmp_path, monkeypatch
):
    asked = plan(prompts=(9, 9), folders={"anchors": tmp_path / "anchors"})
    need = disk_needs(asked)["anchors"]
    (tmp_path / "anchors").mkdir()
    (tmp_path / "anchors" / "00000.safetensors").write_bytes(bytes(need))
    full_disk(monkeypatch, need - 1)
    assert len(refusals(asked)) == 1
    assert refusals(replace(asked, made=frozenset({"anchors"}))) == []


def test_states_need_no_room_for_this_students_and_room_beside_all_others(plan, tmp_path, monkeypatch):
    asked = plan(folders={"train_state": tmp_path / "state"})
    need, own = disk_needs(asked)["train_state"], tmp_path / "state" / "own"
    other = tmp_path / "state" / "other"
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "step_0000001.pt").write_bytes(bytes(need // 3))
    for states, free in (({}, need), ({"train": own}, need - need // 3), ({"train": tmp_path / "absent"}, need)):
        full_disk(monkeypatch, free - 1)
        assert len(refusals(replace(asked, states=states))) == 1
        full_disk(monkeypatch, free)
        assert refusals(replace(asked, states=states)) == []
    (own / f"step_{TRAIN['max_steps']:07d}.json").write_text("{}")  # finished: nothing follows
    full_disk(monkeypatch, 0)
    assert refusals(replace(asked, states={"train": own})) == []


def test_online_anchors_take_no_room(plan, tmp_path):
    asked = plan(prompts=(9, 9), anchors={"mode": "online"}, folders={"anchors": tmp_path / "anchors"})
    assert "anchors" not in disk_needs(asked)


def test_states_of_a_student_are_counted_where_they_are_written(plan, tmp_path):
    asked = plan(folders={"train_state": tmp_path / "state"})
    needs = disk_needs(asked)
    network = sum(p.numel() for p in asked.backbone.load(asked.teacher, "cpu").load_model().parameters())
    assert needs["train_state"] == pytest.approx(
        (TRAIN["keep_last"] + 1) * 24 * network, rel=0.01
    )  # two networks with two moments each
