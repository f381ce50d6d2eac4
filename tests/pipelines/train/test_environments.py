"""The environments of real teachers on tiny teachers of the same classes: from prompt files to report and export."""

import gc
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kedro.framework.hooks import hook_impl
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from safetensors.torch import load_file

from dpdmd_pipeline.backbones.networks import WEIGHTS
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.backbones.student_file import ADAPTER, load_header
from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.pipelines import anchors, distill, prompts, train
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.export.options import ExportOptions
from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions
from dpdmd_pipeline.pipelines.report.options import ReportOptions
from dpdmd_pipeline.pipelines.train.nodes import train_student
from dpdmd_pipeline.planning import checks, disk
from dpdmd_pipeline.planning.checks import refusals, refuse_run
from dpdmd_pipeline.planning.plan import TRAINED, make_plan
from dpdmd_pipeline.planning.stages import WRITTEN, stage_costs
from dpdmd_pipeline.publishing import folder_size
from dpdmd_pipeline.scoring.presets import choose
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.checkpoint import LOSSES, Checkpoints
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

CONF = Path(__file__).parents[3] / "conf"
MODELS = {
    "backbone": BackboneOptions,
    "prompts": PromptsOptions,
    "anchors": AnchorRecipe,
    "train": TrainOptions,
    "train_dmd": TrainOptions,
    "evaluate": EvaluateOptions,
    "report": ReportOptions,
    "export": ExportOptions,
}
# Sizes for a tiny teacher on a CPU; the mathematics stay those of the environment.
TINY = {
    "backbone": {"resolution": 32, "num_steps": 6},
    "prompts": {"batch_size": 2, "shard_size": 4, "device": "cpu"},
    "anchors": {"batch_size": 2, "shard_size": 4, "device": "cpu"},
    **{
        group: {
            "max_steps": 2,
            "batch_size": 2,
            "fake_score_turns": 1,
            "device": "cpu",
            "student_micro_batch": 2,
            "fake_score_micro_batch": 1,
            "checkpoint_every": 1,
            "ratio_every": 2,
            "log_every": 1,
        }
        for group in ("train", "train_dmd")
    },
    "evaluate": {"images_per_prompt": 2, "device": "cpu"},
}


def loader(environment: str, runtime_params: dict | None = None) -> ConfigLoader:
    return ConfigLoader(str(CONF), env=environment, runtime_params=runtime_params, **CONFIG_LOADER_ARGS)


def merged(parameters: dict, changes: dict) -> dict:
    for group in ("train", "train_dmd"):
        parameters[group]["watch"]["images_per_prompt"] = 2
    return {
        group: MODELS[group](**{**parameters[group], **TINY.get(group, {}), **changes.get(group, {})})
        for group in MODELS
    }


@pytest.fixture(scope="module")
def t5_teacher(world_teacher, tmp_path_factory) -> Path:
    """The tiny SD3 with SD3.5's shift of 3 and a tiny T5 as its third encoder."""
    from diffusers import StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(world_teacher, text_encoder_3=None, tokenizer_3=None)
    width = pipeline.transformer.config.joint_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=width, num_layers=1, num_heads=4)
        encoder = T5EncoderModel(config).eval()
    folder = tmp_path_factory.mktemp("t5") / "teacher"
    parts = pipeline.components | {"text_encoder_3": encoder, "tokenizer_3": tokenizer}
    StableDiffusion3Pipeline(**parts).save_pretrained(folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 3.0}))
    return folder


def catalog(environment: str, teacher: Path, folder: Path, **changes) -> DataCatalog:
    """The environment's own catalog below another folder, over a local teacher."""
    config = loader(environment, raw_files(folder))
    entries = {
        name: {**entry, "filepath": str(folder / entry["filepath"])} if "filepath" in entry else entry
        for name, entry in config["catalog"].items()
    }
    entries["teacher"]["model"] = str(teacher)
    entries["shapes_clip"]["filepath"] = str(CONF.parent / config["catalog"]["shapes_clip"]["filepath"])
    datasets = DataCatalog.from_config(entries)
    for group, options in merged(config["parameters"], changes).items():
        datasets[f"params:{group}"] = MemoryDataset(options)
    return datasets


def raw_files(folder: Path) -> dict[str, str]:
    """Relative paths, as in conf."""
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    (folder / "raw/prompts.txt").write_text("a red circle\na blue square\n")
    (folder / "raw/prompts_eval.txt").write_text("a green triangle\n")
    return {"raw_prompts": "raw/prompts.txt", "raw_eval_prompts": "raw/prompts_eval.txt"}


def run_line(datasets: DataCatalog) -> None:
    """Run the whole line, after the checks of the hooks; no network outlives its node, in float32 or bfloat16."""
    line = distill.create_pipeline()
    assert refuse_run(line, datasets) == []
    costs = {cost.stage: cost for cost in stage_costs(make_plan(line, datasets))}
    hooks = _create_hook_manager()
    hooks.register(Networks())
    hooks.register(counter := PassCounter())
    gc.disable()  # a network in a cycle would stay on a GPU until Python happens to collect it
    gc.freeze()  # hides the objects that were there before the line
    try:
        SequentialRunner().run(line, datasets, hooks)
        assert not weights_in_memory()
    finally:
        gc.unfreeze()
        gc.enable()
        counter.handle.remove()
    check_costs(costs, counter.passes, datasets)


NETWORKS = {
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "UNet2DConditionModel",
    "ZImageTransformer2DModel",
}


class PassCounter:
    """Hook that counts the passes of samples through denoising networks, by node."""

    def __init__(self) -> None:
        self.passes, self.node = Counter(), ""
        self.handle = torch.nn.modules.module.register_module_forward_hook(self.count)

    @hook_impl
    def before_node_run(self, node) -> None:
        self.node = node.name

    def count(self, module, _args, output) -> None:
        if type(module).__name__ in NETWORKS:
            self.passes[self.node] += len(output[0])


def check_costs(costs, passes, made: DataCatalog) -> None:
    """Compare the costs that were told before the run: passes exactly, bytes of tensors on the disk within 3 %."""
    stages = ["prompts", *["anchors"] * ("make_anchors" in passes), "train_dmd", "train", "evaluate", "export"]
    assert list(costs) == stages
    for stage, node in {"anchors": "make_anchors", "train_dmd": "train_dmd", "train": "train_student"}.items():
        assert stage not in costs or costs[stage].passes.forward == passes[node], stage
    # On a CPU the two pictures of the only prompt fill a batch of 16
    assert costs["evaluate"].passes.forward == passes["sample_images"] / 16 * 2
    for stage in costs.keys() - {"train_dmd", "train"}:
        folders = [Path(made[name]._filepath) for name in WRITTEN[stage]]
        size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))
        assert size == pytest.approx(costs[stage].written, rel=0.03, abs=80_000), stage
    written = {stage: costs[stage].written for stage in ("train_dmd", "train")}
    sizes = {stage: folder_size(made[TRAINED[stage]].load()) for stage in written}
    train, dmd = (made[f"params:{stage}"].load() for stage in ("train", "train_dmd"))
    if train.roles == dmd.roles:
        copies = 1 + (2 + 4) * (train.keep_last + 1)  # the student; two networks and four moments in each checkpoint
        for stage, size in sizes.items():
            assert size == pytest.approx(written[stage] / copies, rel=0.03, abs=60_000), stage
    else:  # room for the larger one's checkpoints is told for both
        difference = written["train_dmd"] - written["train"]
        assert sizes["train_dmd"] - sizes["train"] == pytest.approx(difference, rel=0.03, abs=60_000)


class Networks:
    """Hook that finds no weights in memory before a node."""

    @hook_impl
    def before_node_run(self, node) -> None:
        assert not weights_in_memory(), f"before {node.name}"


def weights_in_memory() -> bool:
    return any(type(item) is torch.nn.Parameter for item in gc.get_objects())


T5 = {"backbone": {"max_sequence_length": 9}}


@pytest.fixture(scope="module")
def finished_sd35(t5_teacher, tmp_path_factory) -> Path:
    """Folder of a finished run of the environment sd35."""
    folder = tmp_path_factory.mktemp("sd35")
    run_line(catalog("sd35", t5_teacher, folder, **T5))
    return folder


@pytest.mark.parametrize("environment, roles", [("sd35", "full"), ("sd35_lora_16gb", "lora")])
def test_a_teacher_with_t5_goes_from_prompt_files_to_report_and_export(
    request, t5_teacher, tmp_path, environment, roles
):
    if environment == "sd35":
        made = catalog(environment, t5_teacher, request.getfixturevalue("finished_sd35"), **T5)
    else:
        made = catalog(environment, t5_teacher, tmp_path, **T5)
        run_line(made)
    check_measurements(made)
    embeddings = made["embeddings"].load()
    assert embeddings.rows([0])["prompt_embeds"].shape == (1, 12 + 9, 64)  # CLIP's tokens, then T5's
    for name, history in (("student", "train_history"), ("student_dmd", "train_history_dmd")):
        folder = made[name].load()
        header = load_header(folder)
        assert header.kind == roles and len(load_file(folder / (WEIGHTS if roles == "full" else ADAPTER)))
        assert header.sigmas == pytest.approx([1.0, 0.8577, 0.6022, 0.0089, 0.0], abs=1e-3)
        assert [row["step"] for row in made[history].load()] == [1, 2]
    assert (
        made["train_history"].load()[0]["diversity_loss"] > 0 == made["train_history_dmd"].load()[0]["diversity_loss"]
    )


@pytest.mark.parametrize("environment, roles", [("sdxl", "full"), ("sdxl_lora_16gb", "lora")])
def test_sdxl_goes_from_prompt_files_to_report_and_export(tiny_sdxl, tmp_path, environment, roles):
    made = catalog(environment, tiny_sdxl, tmp_path)
    run_line(made)
    check_measurements(made)
    for name in ("student", "student_dmd"):
        header = load_header(made[name].load())
        assert header.kind == roles and header.timesteps == [999, 749, 499, 249]


TODAY = {  # environment: fixture of its teacher, tokens
    "z_image": ("tiny_z_image", 64),
    "flux2_klein": ("tiny_flux2_klein", 128),
    "qwen_image": ("tiny_qwen_image", 256),
}


@pytest.mark.parametrize("environment", TODAY)
def test_a_family_of_today_goes_from_prompt_files_to_report_and_export(request, tmp_path, environment):
    """In the environment's bfloat16: the baseline as a whole network, the student as an adapter."""
    fixture, tokens = TODAY[environment]
    changes = {"backbone": {"max_sequence_length": tokens}, "train_dmd": {"roles": "full", "max_steps": 1}}
    made = catalog(environment, request.getfixturevalue(fixture), tmp_path, **changes)
    run_line(made)
    check_measurements(made)
    losses = [row["diversity_loss"] for row in made["train_history"].load()]
    assert all(0 < loss < 100 for loss in losses)
    for name, kind in (("student", "lora"), ("student_dmd", "full")):
        header = load_header(made[name].load())
        assert (header.family, header.kind, header.num_steps) == (environment, kind, 4)
    forms = {path.name for path in made["export"].load().iterdir()}
    assert forms == {"README.md", "config.json", "diffusers", "comfyui", "lora"}


def check_measurements(made: DataCatalog) -> None:
    """Metrics without weights are measured; metrics, report and card name all others as missing."""
    metrics, options = made["metrics"].load(), made["params:evaluate"].load()
    lacking = {preset.full_name for preset in choose(",".join(options.by)) if preset.weights}
    students = ("dmd", "dp_dmd")
    for name in ("teacher", *students):
        scores = metrics[name]
        assert scores["n"] == {"prompts": 1, "per_prompt": 2} and not scores["quality"]
        assert list(scores["figures"]) == ["diversity.pixels.mean_distance"]
        assert set(scores["missing"]) == {
            name for name in lacking if scores is not metrics["teacher"] or not name.startswith("distribution.")
        }
        assert scores["figures"]["diversity.pixels.mean_distance"]["value"] > 0
    page, card = made["report_html"].load(), (made["export"].load() / "README.md").read_text()
    assert "one prompt" in page.lower() and "hf download facebook/dinov2-base" in page
    assert "`diversity.pixels.mean_distance`" in card
    assert all(name in page and f"`{name}`" in card for name in lacking)


def test_the_configs_give_the_shapes_of_the_embeddings(t5_teacher):
    """So the room for their cache is estimated before a text encoder is loaded."""
    from dpdmd_pipeline.planning.weightless import conditioning_like

    options = BackboneOptions(**{**loader("sd35")["parameters"]["backbone"], **TINY["backbone"]})
    backbone = options.model_copy(update={"max_sequence_length": 9}).load(t5_teacher, "cpu")
    real, like = backbone.encode([""]), conditioning_like(backbone)
    assert {name: (value.shape, value.dtype) for name, value in real.items()} == {
        name: (value.shape, value.dtype) for name, value in like.items()
    }


def test_a_run_finds_the_caches_and_states_it_can_reuse_before_it_starts(t5_teacher, finished_sd35, monkeypatch):
    """On a full disk a finished run is accepted again, and one that has to make anything anew is not."""
    line = prompts.create_pipeline() + anchors.create_pipeline() + train.create_pipeline()

    def datasets(changed=(), **changes):
        made = catalog("sd35", t5_teacher, finished_sd35, **{**T5, **changes})
        for name in ("prompts.txt", "prompts_eval.txt"):  # `catalog` has just written them
            os.utime(finished_sd35 / "raw" / name, None if name in changed else (0, 0))
        return made

    plans = []
    monkeypatch.setattr(checks, "refusals", lambda plan: plans.append(plan) or refusals(plan))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert refuse_run(line, datasets()) == refuse_run(train.create_pipeline(), datasets()) == []
    assert all(folder.is_dir() for plan in plans for folder in plan.states.values()) and len(plans[-1].states) == 2
    for changes, reused in (
        ({"anchors": {"seeds_per_prompt": 3}}, {"embeddings"}),
        ({"train": {"seed": 9}}, {"embeddings", "anchors"}),
        ({"backbone": {"max_sequence_length": 8}}, set()),
        ({"changed": ["prompts.txt"]}, set()),
        ({"prompts": {"take": 1}}, set()),
    ):
        (refused,) = refuse_run(line, datasets(**changes))
        assert "0.0 GiB" in refused and plans[-1].reused == reused


class Signalling:
    """Embeddings that send a signal to this process when a training prompt is read first: in the first cycle."""

    def __init__(self, embeddings) -> None:
        self._embeddings, self.read = embeddings, False

    def __getattr__(self, name):
        return getattr(self._embeddings, name)

    def __len__(self) -> int:
        return len(self._embeddings)

    def rows(self, indices):
        if not self.read and list(indices) != [len(self) - 1]:
            self.read = True
            signal.raise_signal(signal.SIGTERM)
        return self._embeddings.rows(indices)


def test_a_run_on_a_real_card_stops_after_the_cycle_in_which_a_signal_comes(t5_teacher, finished_sd35, tmp_path):
    changes = {"max_steps": 3, "checkpoint_every": 100}
    made = catalog("sd35", t5_teacher, finished_sd35, **{**T5, "train": changes})
    inputs = made["prompts"].load(), Signalling(made["embeddings"].load()), made["anchors"].load(), t5_teacher
    options = (made[f"params:{group}"].load() for group in ("backbone", "anchors", "train"))
    with pytest.raises(KeyboardInterrupt):
        train_student(*inputs, tmp_path, None, *options)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert Checkpoints(folder).load_latest()[0] == len((folder / LOSSES).read_text().splitlines()) == 1


# ---- options of the environments


@pytest.mark.parametrize("environment", ["sd35", "sdxl", "sd35_lora_16gb", "sdxl_lora_16gb", "z_image"])
def test_nothing_is_written_where_another_environment_writes(environment):
    own, base = loader(environment)["catalog"], loader("base")["catalog"]
    read_or_made_elsewhere = {"raw_prompts", "raw_eval_prompts", "teacher", "teacher_state", "metric_weights"}
    read_or_made_elsewhere |= {"shapes_clip", "clip_state", "clip_metrics"}  # of the embedded world, one for all
    for name in base.keys() - read_or_made_elsewhere - {"run_arguments"}:
        path = own[name].get("filepath") or own[name]["path"]
        assert f"/{environment}/" in path, f"write {name} into conf/{environment}/catalog.yml"


@pytest.mark.parametrize("environment", ["base", "ci", "shapes_sdxl", "sd35", "sdxl"])
def test_one_word_on_the_command_line_makes_both_students_adapters(environment):
    assert [loader(environment)["parameters"][group]["roles"] for group in ("train", "train_dmd")] == ["full"] * 2
    parameters = loader(environment, {"train": {"roles": "lora"}})["parameters"]
    assert [parameters[group]["roles"] for group in ("train", "train_dmd")] == ["lora"] * 2


@pytest.mark.parametrize("family", ["sd35", "sdxl"])
def test_adapters_have_the_learning_rate_of_their_own_environment(family):
    on_cpu = {"device": "cpu", "fused": False}
    whole, adapters, own = (
        TrainOptions(**loader(environment, {"train": roles | on_cpu})["parameters"]["train"]).recipe()
        for environment, roles in ((family, {}), (family, {"roles": "lora"}), (f"{family}_lora_16gb", {}))
    )
    assert whole.student.learning_rate == whole.fake_score.learning_rate == 1e-5
    assert (adapters.student, adapters.fake_score) == (own.student, own.fake_score)
    assert own.student.learning_rate == 1e-4


@pytest.mark.parametrize("environment", ["sd35", "sdxl", "sd35_lora_16gb", "sdxl_lora_16gb", "z_image"])
def test_the_baseline_differs_in_anchors_and_their_loss_alone(environment):
    parameters = loader(environment)["parameters"]
    ours, baseline = parameters["train"], parameters["train_dmd"]
    assert {name for name in ours if ours[name] != baseline[name]} == {
        "anchored_steps",
        "diversity_weight",
        "stop_gradient",
    }


def test_the_published_settings_are_those_of_the_paper():
    for environment, steps, scale in (("sd35", 30, 3.5), ("sdxl", 50, 8.0)):
        parameters = loader(environment)["parameters"]
        backbone, recipe = parameters["backbone"], parameters["train"]
        assert (backbone["num_steps"], backbone["guidance_scale"], backbone["resolution"]) == (steps, scale, 1024)
        assert (recipe["num_steps"], recipe["diversity_weight"], recipe["fake_score_turns"]) == (4, 0.05, 5)
        assert (recipe["max_steps"], recipe["batch_size"], recipe["ema"]) == (1000, 4 * 8, 0)
        for role in ("student", "fake_score"):
            assert recipe[role]["learning_rate"] == 1e-5 and recipe[role]["max_grad_norm"] == 1.0
        assert parameters["anchors"]["anchor_levels"] == [{"steps": 5}]
        names = {"sd35": ("diffusers", "secant", "v"), "sdxl": ("trailing", "tangent", "x0")}[environment]
        assert (recipe["grid"], recipe["target"], recipe["space"]) == names


def test_a_pretrained_teacher_is_not_trained_over(t5_teacher, tmp_path):
    from dpdmd_pipeline.pipelines import teacher

    made = catalog("sd35", t5_teacher, tmp_path)
    (line,) = refuse_run(teacher.create_pipeline(), made)
    assert "teacher" in line


@pytest.mark.parametrize("environment", ["base", "shapes_sdxl"])
def test_an_embedded_teacher_may_be_trained(environment):
    from dpdmd_pipeline.pipelines import teacher

    config = loader(environment)
    made = DataCatalog.from_config({"teacher": config["catalog"]["teacher"]})
    assert refuse_run(teacher.create_pipeline(), made) == []


def test_a_missing_part_of_the_teacher_is_found_before_the_first_node(t5_teacher, tmp_path):
    copy = shutil.copytree(t5_teacher, tmp_path / "teacher")
    (copy / "transformer" / "config.json").unlink()
    made = catalog("sd35", copy, tmp_path, **T5)
    (line,) = refuse_run(anchors.create_pipeline(), made)
    assert str(copy / "transformer") in line
