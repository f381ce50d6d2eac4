"""The train stage: students, their files, and the anchors and recipes that it refuses."""

import gc
import io
import json
import shutil
import signal
import warnings
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tests.pipelines.conftest import (
    PROMPTS,
    TRAIN,
    anchor_options,
    backbone_options,
    cached,
    evaluate_options,
    train_options,
)
from tests.raising import refuses
from torch._subclasses.fake_tensor import FakeTensor

from dpdmd_pipeline.backbones.networks import WEIGHTS
from dpdmd_pipeline.backbones.student_file import ADAPTER, HISTORY, load_header, save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.pipelines.evaluate.sampling import sample_model
from dpdmd_pipeline.pipelines.train.nodes import draw_curves, train_student
from dpdmd_pipeline.planning.checks import check_anchors
from dpdmd_pipeline.training.signals import recorded_signals

DMD = {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}


@pytest.fixture
def train(tiny_teacher, embeddings, anchors, tmp_path):
    """A student's folder and history, made with some options changed."""

    def train_with(cache=None, anchored=None, state="state", finished=None, **changes):
        write, history = train_student(
            PROMPTS,
            embeddings,
            anchors if cache is None else cache,
            tiny_teacher,
            tmp_path / state,
            finished,
            backbone_options(),
            anchored or anchor_options(),
            train_options(**changes),
        )
        folder = tmp_path / "student"
        folder.mkdir(exist_ok=True)
        write(folder)
        return folder, history

    return train_with


@pytest.fixture
def check(tiny_teacher, embeddings, anchors):
    def check_with(teacher=None, backbone=None, options=None, rows=(0, 1), **recipe):
        inputs = teacher or tiny_teacher, backbone or backbone_options(), options or anchor_options()
        check_anchors(anchors, rows, embeddings, *inputs, train_options(**recipe))

    return check_with


# ---- a student


def test_a_student_has_its_schedule_and_a_record_per_cycle(train):
    folder, history = train()
    assert replace(load_header(folder), identity=None, recipe=None) == StudentHeader(
        "sd3", sigmas=[1.0, 0.75, 0.5, 0.25, 0.0], shift=1.0, resolution=32, max_sequence_length=0
    )
    assert [row["step"] for row in history] == [1, 2]
    assert all(row["diversity_loss"] > 0 for row in history)


def test_the_baseline_comes_from_the_same_code(train):
    folder, history = train(**DMD)
    assert load_header(folder).sigmas[-1] == 0
    assert [row["diversity_loss"] for row in history] == [0, 0]


def test_a_lora_student_is_its_adapter_and_draws_images(train, tiny_teacher, embeddings):
    lora = {**TRAIN["lora"], "student_rank": 2, "alpha_per_rank": 2.0}
    folder, _ = train(roles="lora", lora=lora, student={**TRAIN["student"], "lora_learning_rate": 0.5})
    header = load_header(folder)
    assert (header.kind, header.lora_rank, header.lora_alpha) == ("lora", 2, 4.0)
    assert header.recipe["train"]["lora"]["base_weights"] == "as_teacher"
    rates = {name: value for name, value in header.recipe["train"]["student"].items() if "rate" in name}
    assert rates == {"learning_rate": 0.5}
    assert (folder / ADAPTER).stat().st_size < 0.1 * (tiny_teacher / "transformer" / WEIGHTS).stat().st_size
    chosen = {0: PROMPTS[0]["text"]}
    inputs = chosen, embeddings, tiny_teacher, backbone_options(num_steps=4), evaluate_options()
    of_student, of_teacher = (sample_model(model, *inputs)["image"] for model in (folder, None))
    assert not torch.equal(of_student, of_teacher)


def test_unread_adapter_options_do_not_make_a_full_student_stale(train, caplog):
    train()
    with caplog.at_level("INFO"):
        train(lora={**TRAIN["lora"], "student_rank": 3}, student={**TRAIN["student"], "lora_learning_rate": 0.5})
    assert "reused" in caplog.text


def test_a_finished_student_is_reused_with_a_line_in_the_log(train, caplog):
    folder, history = train()
    before = load_file(folder / WEIGHTS)
    with caplog.at_level("INFO"):
        folder, again = train(log_every=2, checkpoint_every=2)  # neither changes the student
    assert again == history and "reused" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(folder / WEIGHTS).items())


def test_a_published_student_is_reused_without_its_checkpoints(train, tmp_path, caplog):
    """As after `dvc pull`: the folder alone tells that it is this run's student."""
    folder, history = train()
    pulled = shutil.copytree(folder, tmp_path / "pulled")
    content = {path.name: path.read_bytes() for path in pulled.iterdir()}
    shutil.rmtree(folder)
    with caplog.at_level("INFO"):
        folder, again = train(state="no_state", finished=pulled)
    assert again == history and "reused" in caplog.text and not (tmp_path / "no_state").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_a_student_starts_from_another_and_goes_by_that_files_content(train, tmp_path, caplog):
    folder, _ = train(student={**TRAIN["student"], "learning_rate": 0.1})
    start = shutil.copytree(folder, tmp_path / "start")
    slow = {**TRAIN["student"], "learning_rate": 1e-9}
    folder, _ = train(start_from=str(start), student=slow)
    begun, finished = load_file(start / WEIGHTS), load_file(folder / WEIGHTS)
    assert all(torch.allclose(finished[name], value, atol=1e-6) for name, value in begun.items())
    assert str(tmp_path) not in str(load_header(folder).recipe)
    with caplog.at_level("INFO"):
        train(start_from=str(shutil.copytree(start, tmp_path / "elsewhere")), student=slow)
    assert "reused" in caplog.text
    caplog.clear()
    first = next(iter(begun))
    save_file({**begun, first: begun[first] + 1}, start / WEIGHTS)
    with caplog.at_level("INFO"):
        train(start_from=str(start), student=slow)
    assert "reused" not in caplog.text


def test_a_start_that_does_not_fit_is_refused_before_the_training(train, tmp_path):
    folder, _ = train()
    with refuses(ValueError, "roles=full", str(folder)):
        train(start_from=str(folder), roles="lora")
    with refuses(FileNotFoundError, "start_from", "nowhere"):
        train(start_from=str(tmp_path / "nowhere"))
    assert len(list((tmp_path / "state").glob("[!.]*"))) == 1


@pytest.mark.parametrize("change", ["recipe", "no history", "foreign file"])
def test_a_published_student_that_is_not_this_runs_is_not_reused(train, tmp_path, caplog, change):
    folder, _ = train()
    pulled = shutil.copytree(folder, tmp_path / "pulled")
    if change == "no history":
        (pulled / HISTORY).unlink()
    elif change == "foreign file":
        save_file(load_file(pulled / WEIGHTS), pulled / WEIGHTS)
    with caplog.at_level("INFO"):
        train(state="other", finished=pulled, **({"seed": 1} if change == "recipe" else {}))
    assert "reused" not in caplog.text


def test_a_damaged_student_is_refused_by_its_path(train, tmp_path):
    folder, _ = train()
    pulled = shutil.copytree(folder, tmp_path / "pulled")
    content = bytearray((pulled / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (pulled / WEIGHTS).write_bytes(content)
    with refuses(OSError, str(pulled / WEIGHTS), "checksum"):
        train(finished=pulled)


def test_a_published_student_that_is_not_reused_is_named_with_both_values_and_its_size(train, tmp_path, caplog):
    pulled = shutil.copytree(train()[0], tmp_path / "pulled")
    caplog.clear()
    train(finished=pulled, decay=0.5)
    (line,) = (line for line in caplog.messages if str(pulled) in line)
    assert all(fact in line for fact in ("train.decay=0.0, now 0.5", "finished", "MiB")) and "\n" not in line
    caplog.clear()
    train(finished=pulled, decay=0.5)  # continues its own checkpoints
    assert str(pulled) not in caplog.text


def test_an_unfinished_state_that_is_not_resumed_is_named_with_its_cycle_size_and_both_values(train, tmp_path, caplog):
    train()
    (state,) = (path for path in (tmp_path / "state").iterdir() if path.is_dir())
    (checkpoint,) = state.glob("step_*.json")
    for path in (checkpoint.with_suffix(""), checkpoint):
        path.rename(path.with_stem("step_0000001"))
    caplog.clear()
    train(decay=0.5)
    (line,) = (line for line in caplog.messages if str(state) in line)
    assert all(fact in line for fact in ("step 1 of 2", "train.decay=0.0, now 0.5", "MiB")) and "\n" not in line
    caplog.clear()
    train(**DMD)  # another method's work
    assert str(state) not in caplog.text


def test_an_unfinished_state_of_other_code_says_so(train, tmp_path, caplog):
    train()
    (state,) = (path for path in (tmp_path / "state").iterdir() if path.is_dir())
    (checkpoint,) = state.glob("step_*.json")
    checkpoint.rename(checkpoint.with_stem("step_0000001"))
    other = state.rename(state.with_name("0" * 16))
    caplog.clear()
    train()
    (line,) = (line for line in caplog.messages if str(other) in line)
    assert line.endswith("code")


def test_the_header_names_the_options_that_decided_the_student(train):
    recipe = load_header(train(diversity_weight=2.0)[0]).recipe
    assert recipe["train"]["diversity_weight"] == 2.0 and recipe["backbone"]["family"] == "sd3"
    assert recipe["anchors"]["anchor_levels"] and "batch_size" not in recipe["anchors"]


def test_a_student_of_another_recipe_is_not_reused(train, caplog):
    train()
    with caplog.at_level("INFO"):
        _, history = train(diversity_weight=2.0)
    assert len(history) == 2 and "reused" not in caplog.text and "resumed" not in caplog.text


def test_anchors_of_another_split_are_refused(check):
    with refuses(ValueError, "rows="):
        check(rows=(0, 1, 2))


def test_anchors_of_another_schedule_are_refused(check, tiny_teacher, tmp_path):
    copy = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 3.0}))
    with refuses(ValueError, "teacher_sigmas="):
        check(teacher=copy)


@pytest.mark.parametrize("what", ["prompts", "text encoders"])
def test_embeddings_of_other_prompts_or_text_encoders_are_refused(tiny_teacher, embeddings, anchors, tmp_path, what):
    prompts, teacher = [*PROMPTS], tiny_teacher
    if what == "prompts":
        prompts[1] = {**PROMPTS[1], "text": "a blue triangle"}
    else:
        teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
        (teacher / "tokenizer" / "tokenizer_config.json").write_text("{}")
    inputs = (
        embeddings,
        anchors,
        teacher,
        tmp_path / "state",
        None,
        backbone_options(),
        anchor_options(),
        train_options(),
    )
    with pytest.raises(ValueError, match=rf"{what}.*[0-9a-f]{{8}}.*[0-9a-f]{{8}}"):
        train_student(prompts, *inputs)


def test_teacher_and_trained_networks_work_in_one_precision(tiny_teacher, embeddings, tmp_path):
    half = backbone_options(dtype="bfloat16")
    shards = make_anchors(PROMPTS, embeddings, tiny_teacher, half, anchor_options(), train_options())
    inputs = cached(tmp_path / "anchors", shards), tiny_teacher, tmp_path / "state", None, half, anchor_options()
    with refuses(ValueError, "backbone.dtype=bfloat16", "train.precision=float32"):
        train_student(PROMPTS, embeddings, *inputs, train_options())


@pytest.mark.parametrize("value", [{"betas": [0.9, 1.0]}, {"learning_rate": "fast"}, {"learning_rate": float("inf")}])
def test_impossible_optimizer_options_are_refused(value):
    with pytest.raises(ValidationError):
        train_options(student={**TRAIN["student"], **value})


def test_compiled_networks_do_not_outlive_the_training(train):
    """Others neither: test_environments.py looks after every node."""

    def weights():
        items = [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]
        return [item for item in items if not isinstance(item.data, FakeTensor)]  # those of the compiler hold no bytes

    before = {id(weight): weight for weight in weights()}
    gc.disable()
    try:
        with torch.compiler.set_stance("default", force_backend="aot_eager"):  # a compiler would take a minute
            train(max_steps=1, compile="blocks")
        assert [weight for weight in weights() if id(weight) not in before] == []
    finally:
        gc.enable()
        torch.compiler.reset()


def test_online_anchors_train_a_student_too(train, tiny_teacher, embeddings, tmp_path):
    options = anchor_options(mode="online")
    shards = make_anchors(PROMPTS, embeddings, tiny_teacher, backbone_options(), options, train_options())
    _, history = train(cached(tmp_path / "online", shards), options)
    assert len(history) == 2 and history[0]["diversity_loss"] > 0


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_recorded_and_the_second_interrupts(number, second):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with recorded_signals() as signals:
        signal.raise_signal(number)
        assert signals == [number]
        if second:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# ---- the student's file


def test_a_students_header_comes_back_as_it_was_written(train):
    folder, _ = train(num_steps=2, grid=[0.9, 0.3])
    header = load_header(folder)
    assert header.sigmas == pytest.approx([0.9, 0.3, 0.0], abs=1e-7)
    assert (header.family, header.prediction, header.sampler, header.guidance) == ("sd3", "flow", "euler", 1.0)


def test_a_student_is_a_diffusers_model(train):
    from diffusers import SD3Transformer2DModel

    folder, _ = train()
    loaded = SD3Transformer2DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in load_file(folder / WEIGHTS).items())


def test_the_same_student_gives_the_same_bytes_every_time_and_names_no_path(tmp_path, tiny_teacher):
    model = backbone_options().load(tiny_teacher, "cpu").load_model()
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
        save_student(folder, model, StudentHeader("sd3", [1.0, 0.5, 0.0]))
    assert len({(folder / WEIGHTS).read_bytes() for folder in folders}) == 1
    assert str(tiny_teacher.parent) not in (folders[0] / "config.json").read_text()


def test_a_folder_without_a_student_is_refused(tmp_path):
    with refuses(FileNotFoundError, "weights"):
        load_header(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"dpdmd.format": "2"}], ids=["of another program", "of a newer version"])
def test_weights_without_a_known_format_are_refused(tmp_path, metadata):
    save_file({"weight": torch.zeros(1)}, tmp_path / WEIGHTS, metadata)
    version = metadata["dpdmd.format"] if metadata else None
    with refuses(ValueError, "dpdmd.format", f"{version}", "'1'"):
        load_header(tmp_path)


def test_a_header_fits_the_metadata_of_safetensors():
    metadata = StudentHeader("sd3", [1.0, 0.75, 0.0]).metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["dpdmd.sigmas"]) == [1.0, 0.75, 0.0]


# ---- refused


def test_anchors_of_the_same_options_are_accepted_however_they_were_computed(check):
    check()
    check(options=anchor_options(batch_size=1, device="auto"))
    check(**DMD)


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"guidance_scale": 2.0}, r"backbone\.guidance_scale=3\.5,.* 2\.0"),
        ({"num_steps": 9}, r"backbone\.num_steps=6,.* 9"),
        ({"dtype": "bfloat16"}, r"backbone\.dtype='float32',.* 'bfloat16'"),
        ({"resolution": 64}, r"backbone\.resolution=32,.* 64"),
    ],
)
def test_anchors_of_other_teacher_settings_are_refused_with_both_values(check, changes, facts):
    with pytest.raises(ValueError, match=facts):
        check(backbone=backbone_options(**changes))


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"seed": 4}, r"anchors\.seed=0,.* 4"),
        ({"mode": "online"}, r"anchors\.mode='cached',.* 'online'"),
        ({"anchor_levels": [{"steps": 3}]}, r"anchors\.anchor_levels=.*'steps': 2.*'steps': 3"),
    ],
)
def test_anchors_of_other_options_are_refused_with_both_values(check, changes, facts):
    with pytest.raises(ValueError, match=facts):
        check(options=anchor_options(**changes))


def test_anchors_of_another_teacher_are_refused(check, tmp_path):
    from dpdmd_pipeline.shapes.models import make_pipeline

    make_pipeline(max_length=12, shift=1.0, seed=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\bteacher='[0-9a-f]{8,}.* '[0-9a-f]{8,}"):
        check(teacher=tmp_path)


def test_more_anchored_steps_than_anchors_are_refused(check):
    with pytest.raises(ValueError, match=r"train\.anchored_steps=2.*anchors\.anchor_levels.* 1\b"):
        check(anchored_steps=2)


def test_the_tangent_target_without_its_x0_is_refused(check):
    with refuses(ValueError, "train.target=tangent", "anchors.with_denoised=true"):
        check(target="tangent")


def test_a_grid_that_starts_below_the_anchor_is_refused_with_both_levels(check, anchors):
    sigma = anchors.manifest["anchor_sigmas"][0]
    with refuses(ValueError, f"{f'{sigma:.4g}'}", "train.grid", "0.5"):
        check(num_steps=2, grid=[0.5, 0.2])
    check(num_steps=2, grid=[0.5, 0.2], **DMD)


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"grid": [1.0, 0.5, 0.5, 0.2]}, r"grid=\[1.0, 0.5, 0.5, 0.2\]"),
        ({"grid": [0.9, 0.5, 0.6, 0.2]}, r"grid=\[0.9, 0.5, 0.6, 0.2\]"),
        ({"grid": [1.0, 0.5, 0.2, 0.0]}, r"grid=\[1.0, 0.5, 0.2, 0.0\]"),
        ({"grid": [1.0, 0.5]}, "grid.* 2 .*num_steps=4"),
        ({"anchored_steps": 4}, "anchored_steps=4.*num_steps=4"),
        ({"anchored_steps": 0}, "anchored_steps=0.*diversity_weight=0.*stop_gradient=false"),
        ({"max_steps": 0}, "max_steps"),
        ({"guidance_interval": [0.7, 0.3]}, r"guidance_interval=\[0.7, 0.3\]"),
        ({"guidance_interval": [0.5, 1.5]}, r"guidance_interval(.|\n)*input_value=1.5,"),
        (
            {"compile": "whole", "roles": "lora", "gradient_checkpointing": True},
            "compile=whole.*roles=lora.*compile=blocks.*gradient_checkpointing=false",
        ),
    ],
)
def test_a_recipe_that_makes_no_student_is_refused(changes, facts):
    with pytest.raises(ValidationError, match=facts):
        train_options(**changes)


# The last three existed until the balanced weight was removed
@pytest.mark.parametrize("name", ["lambda", "weighting", "balance_every", "balance_ema"])
def test_an_unknown_option_is_refused_by_its_name(name):
    with pytest.raises(ValidationError) as error:
        train_options(**{name: 1.0})
    assert [(fault["type"], fault["loc"]) for fault in error.value.errors()] == [("extra_forbidden", (name,))]


def test_curves_of_runs_without_values_are_drawn_without_a_warning():
    row = {"step": 1, "dmd_loss": 0.1, "diversity_loss": 0.0, "fake_score_loss": 0.1}
    with warnings.catch_warnings(action="error"):
        for histories in (([row], [row]), ([], [])):
            draw_curves(*histories).savefig(io.BytesIO())
