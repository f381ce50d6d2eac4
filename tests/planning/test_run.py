"""Refusals before anything large is read: options, memory, disk."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.pipelines.conftest import OPTIMIZER, TRAIN, anchor_options, backbone_options, train_options

from dpdmd_pipeline.planning import checks, disk
from dpdmd_pipeline.planning.checks import refusals
from dpdmd_pipeline.planning.cost import TeacherSettings, describe_cycle
from dpdmd_pipeline.planning.disk import written_bytes
from dpdmd_pipeline.planning.gpu import explain_out_of_memory
from dpdmd_pipeline.planning.plan import Counts, Plan

GIB = 2**30
DMD = {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}


@pytest.fixture
def plan(world_teacher):
    """A run without faults, except for the given changes."""

    def make(teacher=None, backbone=None, anchors=None, prompts=None, folders=None, **changes) -> Plan:
        options = train_options(**changes)
        teacher_options = backbone_options(**(backbone or {})), anchor_options(**(anchors or {}))
        return Plan(teacher or world_teacher, *teacher_options, {"train": options}, prompts, folders or {})

    return make


@pytest.fixture
def weightless(world_teacher, tmp_path):
    """The teacher's configs without weights, as before a download."""
    return shutil.copytree(world_teacher, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))


def test_a_run_without_faults_is_not_refused(plan):
    assert refusals(plan()) == refusals(plan(**DMD)) == []


def test_configs_are_enough(plan, weightless):
    assert refusals(plan(weightless), device_memory=64 * GIB) == []


# ---- options against the teacher


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"anchors": {"anchor_levels": [{"steps": 6}]}}, "steps=6.*backbone.num_steps=6"),
        ({"grid": "trailing"}, "train: .*trailing"),
        ({"grid": [0.5, 0.2], "num_steps": 2, "backbone": {"num_steps": 30}}, "train: .*anchors.anchor_levels.* 0.5"),
        ({"target": "tangent"}, "train: .*train.target=tangent.*anchors.with_denoised=true"),
        ({"anchored_steps": 2}, "train: .*train.anchored_steps=2.*anchors.anchor_levels.* 1"),
        ({"precision": "bfloat16"}, "train: .*backbone.dtype=float32.*train.precision=bfloat16"),
        ({"channels_last": True}, "train: .*train.channels_last=true.*SD3Transformer2DModel"),
        (
            {"guidance_interval": [0.2, 0.8], "backbone": {"guidance_scale": 1.0}},
            r"train: .*guidance_interval=\[0.2, 0.8\].*guidance_scale=1",
        ),
        ({"backbone": {"resolution": 30}}, "backbone.resolution 30 x 30.*32 x 32"),
        ({"backbone": {"resolution": [[32, 32], [16, 36]]}}, "backbone.resolution 16 x 36.*8.*16 x 32"),
        ({"backbone": {"resolution": [[32, 32], [32, 128]]}}, "backbone.resolution 32 x 128.*at most 64.*32 x 64"),
    ],
)
def test_options_that_the_teachers_config_does_not_allow_are_refused(plan, changes, facts):
    (line,) = refusals(plan(**changes))
    assert re.search(facts, line) and "\n" not in line


def test_an_absent_gpu_is_refused(plan):
    if torch.cuda.is_available():
        assert refusals(plan(device="cuda")) == []
    else:
        (line,) = refusals(plan(device="cuda"))
        assert re.search("^train: .*device.*cuda.*cpu", line)


EIGHT_BITS = {"kind": "adamw_8bit"}


@pytest.mark.parametrize("roles", [("student",), ("fake_score",), ("student", "fake_score")])
def test_moments_in_8_bits_are_refused_without_their_library_or_cuda(plan, monkeypatch, roles):
    optimizers = {role: {**OPTIMIZER, **EIGHT_BITS} for role in roles}
    kinds = ".*".join(f"{role}.kind=adamw_8bit" for role in roles)
    (line,) = refusals(plan(**optimizers))
    assert re.search(f"^train: {kinds}.*CUDA.*cpu", line)
    monkeypatch.setattr(checks, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    (line,) = refusals(plan(**optimizers))
    assert re.search(f"^train: {kinds}.*`pip install bitsandbytes`", line)
    monkeypatch.setattr(checks, "find_spec", lambda _: object())
    assert refusals(plan(**optimizers)) == []


def test_a_teacher_of_another_family_is_refused(plan, tmp_path, world_teacher):
    copy = shutil.copytree(world_teacher, tmp_path / "teacher")
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dynamic_shifting": True}))
    (line,) = refusals(plan(copy))
    assert "scheduler" in line and "static shift" in line


def test_adapters_that_match_no_layer_are_refused(plan):
    lora = {**TRAIN["lora"], "targets": ["no_such_layer"]}
    (line,) = refusals(plan(roles="lora", lora=lora), device_memory=64 * GIB)
    assert "train.lora.targets=['no_such_layer']" in line


# ---- memory


def test_a_student_that_does_not_fit_is_refused_with_remedies_and_their_savings(plan):
    (line,) = refusals(plan(batch_size=64, student_micro_batch=64, fake_score_micro_batch=64), device_memory=GIB)
    assert re.search(r"^train .* 1\.\d GiB.* 1\.0 GiB", line)
    for remedy in ("train.roles=lora", "train.gradient_checkpointing=true"):
        assert re.search(rf"{remedy} \w+ 0\.\d GiB", line)
    assert "\n" not in line


def test_for_a_student_that_fits_the_log_has_cost_work_and_memory(plan, caplog):
    with caplog.at_level("DEBUG"):
        assert refusals(plan(), device_memory=64 * GIB) == []
    assert re.search(r"train +\d\d+", caplog.text)
    assert re.search(r"GPU memory.* 1\.\d GiB", caplog.text)


def test_the_logged_cost_is_that_of_the_options(plan, caplog):
    planned = plan(anchors={"mode": "online"}, gradient_checkpointing=True)
    with caplog.at_level("DEBUG"):
        refusals(planned)
    options = planned.trained["train"]
    teacher = TeacherSettings(3.5, online_anchors=[2])
    assert describe_cycle(options.recipe(), options.execution(), teacher) in caplog.text


def test_a_gpu_out_of_memory_is_explained_in_one_line(plan):
    planned = plan(batch_size=64, student_micro_batch=64, fake_score_micro_batch=64)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    line = explain_out_of_memory(error, planned.teacher, planned.backbone, planned.trained["train"])
    assert re.search(r"Tried to allocate 2\.00 GiB.* 1\.\d GiB", line)
    assert re.search(r"train\.roles=lora \w+ 0\.\d GiB", line) and "\n" not in line


# ---- disk


def full_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_caches_that_do_not_fit_together_are_refused_with_remedies(plan, tmp_path, monkeypatch):
    planned = plan(
        prompts=Counts(20_000_000, 10_000_000, 0), folders={name: tmp_path / name for name in ("embeddings", "anchors")}
    )
    sizes = written_bytes(planned)
    full_disk(monkeypatch, sum(sizes.values()) - 1)
    (line,) = refusals(planned)
    gib = {name: size / GIB for name, size in sizes.items()}
    assert str(tmp_path) in line and "\n" not in line
    for fact in (
        f"embeddings {gib['embeddings']:.2f} GiB",
        f"anchors {gib['anchors']:.2f} GiB",
        f"prompts \\w+ {gib['embeddings'] / 2:.1f} GiB",
        f"anchors.dtype=float16 \\w+ {gib['anchors'] / 2:.1f} GiB",
    ):
        assert re.search(fact, line)
    full_disk(monkeypatch, sum(sizes.values()))
    assert refusals(planned) == []


def test_an_unfinished_cache_needs_room_only_for_its_missing_part(plan, tmp_path, monkeypatch):
    planned = plan(prompts=Counts(9, 9, 0), folders={"anchors": tmp_path / "anchors"})
    need = written_bytes(planned)["anchors"]
    full_disk(monkeypatch, need // 2)
    assert len(refusals(planned)) == 1
    (tmp_path / ".anchors.partial").mkdir()
    (tmp_path / ".anchors.partial" / "00000.safetensors").write_bytes(bytes(need))
    assert refusals(planned) == []


def test_a_published_cache_needs_no_room_if_it_is_reused_and_stays_beside_the_new_one_otherwise(
    plan, tmp_path, monkeypatch
):
    planned = plan(prompts=Counts(9, 9, 0), folders={"anchors": tmp_path / "anchors"})
    need = written_bytes(planned)["anchors"]
    (tmp_path / "anchors").mkdir()
    (tmp_path / "anchors" / "00000.safetensors").write_bytes(bytes(need))
    full_disk(monkeypatch, need - 1)
    assert len(refusals(planned)) == 1
    assert refusals(replace(planned, reused=frozenset({"anchors"}))) == []


def test_states_need_no_room_for_those_of_this_student_and_room_beside_all_others(plan, tmp_path, monkeypatch):
    planned = plan(folders={"train_state": tmp_path / "state"})
    need, own = written_bytes(planned)["train_state"], tmp_path / "state" / "own"
    other = tmp_path / "state" / "other"
    for folder in (own, other):
        (folder / "step_0000001").mkdir(parents=True)
        (folder / "step_0000001" / "0.bin").write_bytes(bytes(need // 3))
    for states, free in (({}, need), ({"train": own}, need - need // 3), ({"train": tmp_path / "absent"}, need)):
        full_disk(monkeypatch, free - 1)
        assert len(refusals(replace(planned, states=states))) == 1
        full_disk(monkeypatch, free)
        assert refusals(replace(planned, states=states)) == []
    (own / f"step_{TRAIN['max_steps']:07d}.json").write_text("{}")  # finished: nothing follows
    full_disk(monkeypatch, 0)
    assert refusals(replace(planned, states={"train": own})) == []


def test_a_copy_of_a_checkpoint_that_exceeds_the_memory_is_refused_with_its_size_and_remedy(plan, monkeypatch):
    planned = plan()
    size = planned.estimates.checkpoint_bytes(planned.trained["train"].recipe())
    for installed, refused in ((size - 1, ["train"]), (size, [])):
        monkeypatch.setattr(disk.os, "sysconf", {"SC_PHYS_PAGES": installed, "SC_PAGE_SIZE": 1}.get)
        lines = [*disk.copies_too_large(planned)]
        assert [line.split(":")[0] for line in lines] == refused
        assert all("train.checkpoint_background=false" in line and "GiB" in line for line in lines)
    monkeypatch.setattr(disk.os, "sysconf", lambda _: 1)
    waiting = planned.trained["train"].model_copy(update={"checkpoint_background": False})
    assert [*disk.copies_too_large(replace(planned, trained={"train": waiting}))] == []


def test_online_anchors_take_no_room(plan, tmp_path):
    planned = plan(prompts=Counts(9, 9, 0), anchors={"mode": "online"}, folders={"anchors": tmp_path / "anchors"})
    assert "anchors" not in written_bytes(planned)


def test_states_of_a_student_are_counted_if_they_are_written(plan, tmp_path):
    planned = plan(folders={"train_state": tmp_path / "state"})
    needs = written_bytes(planned)
    network = sum(p.numel() for p in planned.backbone.load(planned.teacher, "cpu").load_model().parameters())
    assert needs["train_state"] == pytest.approx(
        (TRAIN["keep_last"] + 1) * 24 * network, rel=0.01
    )  # two networks with two moments each


def test_a_published_student_is_reused_on_a_machine_that_could_not_train_it(plan):
    student = {**OPTIMIZER, "kind": "adamw_8bit"}
    planned = plan(student=student)
    assert any("adamw_8bit" in line for line in refusals(planned, device_memory=1))
    assert refusals(replace(planned, finished=frozenset({"train"})), device_memory=1) == []
