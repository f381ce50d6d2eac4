"""Refusals of a teacher's folder before the first node, each in one line: index, configs, weights, links."""

import ast
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils
from kedro.io import DataCatalog, DatasetError, MemoryDataset
from safetensors.torch import load_file, save_file
from tests.pipelines.conftest import backbone_options
from tests.raising import refuses

import dpdmd_pipeline
from dpdmd_pipeline.datasets.pretrained import PretrainedModelDataset
from dpdmd_pipeline.limits import MAX_FILE
from dpdmd_pipeline.planning.checks import refuse_run
from dpdmd_pipeline.planning.messages import error_line
from dpdmd_pipeline.planning.teacher import faulty_parts

NETWORKS = ("text_encoder", "text_encoder_2", "transformer", "vae")
INDEX, DENOISER, ENCODER, VAE = (
    "model_index.json",
    "transformer/config.json",
    "text_encoder/config.json",
    "vae/config.json",
)
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"
WEIGHTS, ENCODER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
DEEP = "[" * 100_000
Z_IMAGE = {"family": "z_image", "max_sequence_length": 64}


@pytest.fixture
def teacher(world_teacher, tmp_path):
    """A whole teacher whose files are links to the session's: replace them, never write into them."""
    return shutil.copytree(world_teacher, tmp_path / "teacher", copy_function=os.link)


def faults(teacher: Path, **options) -> list[str]:
    return [*faulty_parts(teacher, backbone_options(), **options)]


def test_a_whole_teacher_has_no_fault(world_teacher):
    assert faults(world_teacher) == []


@pytest.mark.parametrize(
    "name, options",
    [
        ("tiny_sdxl", {"family": "sdxl", "max_sequence_length": 0}),
        ("tiny_sdxl_v", {"family": "sdxl", "max_sequence_length": 0}),
        ("tiny_sana", {"family": "sana", "max_sequence_length": 16}),
        ("tiny_z_image", Z_IMAGE),
        ("tiny_flux2_klein", {"family": "flux2_klein", "max_sequence_length": 100}),
        ("tiny_qwen_image", {"family": "qwen_image", "max_sequence_length": 200}),
    ],
)
def test_a_whole_teacher_of_another_family_has_no_fault(request, name, options):
    assert [*faulty_parts(request.getfixturevalue(name), backbone_options(**options))] == []


# ---- damages, as functions of the folder


def replaced(name: str, content: str | bytes):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def changed(name: str, **values):
    """Change values of a JSON object; ... removes one."""

    def damage(folder: Path) -> None:
        content = {**json.loads((folder / name).read_text()), **values}
        replaced(name, json.dumps({key: value for key, value in content.items() if value is not ...}))(folder)

    return damage


def tensors(name: str, tensor: str, number: float):
    """Overwrite the first number of a tensor."""

    def damage(folder: Path) -> None:
        content = load_file(folder / name)
        content[tensor].view(-1)[0] = number
        (folder / name).unlink()
        save_file(content, folder / name)

    return damage


def linked(name: str, target: str):
    """Replace a file or folder by a link; OUT stands for a copy outside of the teacher's folder."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside")
        (folder / name).symlink_to(target)

    return damage


def too_large(folder: Path) -> None:
    (folder / INDEX).unlink()
    with (folder / INDEX).open("wb") as file:
        file.truncate(MAX_FILE + 1)


def piped(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    os.mkfifo(folder / TOKENIZER)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, (folder / WEIGHTS).with_suffix(".bin"))


def pickle_renamed(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.ones(9)}, folder / WEIGHTS)


def truncated(folder: Path) -> None:
    replaced(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-8])(folder)


def indexed(weight_map):
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


PIPELINE = "StableDiffusion3Pipeline"
NORM = "text_model.final_layer_norm.weight"
DAMAGES = {
    "index: no JSON": (replaced(INDEX, "{"), (INDEX, "JSON")),
    "index: a list": (replaced(INDEX, "[]"), (INDEX, "[]", "object")),
    "index: null": (replaced(INDEX, "null"), (INDEX, "None", "object")),
    "index: not UTF-8": (replaced(INDEX, b"\xff\xfe{}"), (INDEX,)),
    "index: deep": (replaced(INDEX, DEEP), (INDEX, "recursion")),
    "index: deep value": (replaced(INDEX, f'{{"vae": {DEEP}{DEEP.replace("[", "]")}}}'), (INDEX, "recursion")),
    "index: too large": (too_large, (INDEX, str(MAX_FILE + 1), str(MAX_FILE))),
    "index: an object for a component": (changed(INDEX, vae={"diffusers": "AutoencoderKL"}), (INDEX, "vae")),
    "index: three words": (changed(INDEX, vae=["diffusers", "AutoencoderKL", "x"]), (INDEX, "vae")),
    "index: numbers": (changed(INDEX, vae=[1, 2]), (INDEX, "vae", "[1, 2]")),
    "index: a path": (changed(INDEX, **{"../vae": ["diffusers", "AutoencoderKL"]}), (INDEX, "../vae")),
    "index: no autoencoder": (changed(INDEX, vae=[None, None]), (INDEX, "vae")),
    "index: a flag for the autoencoder": (changed(INDEX, vae=True), (INDEX, "vae")),
    "index: other pipeline": (
        changed(INDEX, _class_name="os.system"),
        (INDEX, "os.system", PIPELINE),
    ),
    "index: no pipeline": (changed(INDEX, _class_name=...), (INDEX, "None", PIPELINE)),
    "index: other network": (
        changed(INDEX, transformer=["diffusers", "FluxTransformer2DModel"]),
        ("transformer", "Flux"),
    ),
    "index: unknown class": (changed(INDEX, vae=["diffusers", "NoSuch"]), ("vae", "NoSuch", "AutoencoderKL")),
    "index: other library": (changed(INDEX, tokenizer=["os", "system"]), ("tokenizer", "os.system")),
    "index: custom scheduler": (changed(INDEX, scheduler=["scheduler", "Mine"]), ("scheduler", "Mine")),
    "index: network as scheduler": (changed(INDEX, scheduler=["diffusers", "AutoencoderKL"]), ("scheduler", "Autoenc")),
    "layers": (changed(DENOISER, num_layers=10**6), ("transformer", "modules")),
    "layers without end": (changed(DENOISER, num_layers=10**12), ("transformer", "num_layers = 1000000000000")),
    "layers, negative": (changed(DENOISER, num_layers=-5), ("transformer", "missing", "unknown")[::2]),
    "width": (changed(DENOISER, caption_projection_dim=10**6), ("transformer",)),
    "table of positions": (changed(DENOISER, pos_embed_max_size=10**5), (DENOISER, "pos_embed_max_size = 100000")),
    "config: a list": (replaced(DENOISER, "[1]"), (DENOISER, "[1]")),
    "config: deep": (replaced(VAE, DEEP), (VAE, "recursion")),
    "config: missing": (lambda folder: (folder / VAE).unlink(), ("vae", "config.json")),
    "config: other class": (changed(DENOISER, _class_name="UNet2DModel"), ("transformer", "UNet2DModel")),
    "config: text for a number": (changed(DENOISER, num_layers="two"), ("transformer",)),
    "quantised network": (changed(DENOISER, quantization_config={"quant_method": "gguf"}), (DENOISER, "gguf")),
    "quantised text encoder": (changed(ENCODER, quantization_config={"quant_method": "no_lib"}), (ENCODER, "no_lib")),
    "quantised by nothing": (changed(ENCODER, quantization_config=[1]), ("text_encoder",)),
    "scale: NaN": (changed(VAE, scaling_factor=float("nan")), (VAE, "NaN")),
    "scale: infinite": (changed(VAE, scaling_factor=float("inf")), (VAE, "scaling_factor = inf")),
    "scale: zero": (changed(VAE, scaling_factor=0), (VAE, "scaling_factor = 0")),
    "scale: negative": (changed(VAE, scaling_factor=-1.5), (VAE, "scaling_factor = -1.5")),
    "scale: text": (changed(VAE, scaling_factor="1"), (VAE, "scaling_factor = '1'")),
    "shift: infinite": (changed(VAE, shift_factor=float("-inf")), (VAE, "shift_factor = -inf")),
    "encoder: layers": (changed(ENCODER, num_hidden_layers=10**6), ("text_encoder", "modules")),
    "encoder: other type": (changed(ENCODER, model_type="bert"), ("text_encoder", "bert", "clip_text_model")),
    "encoder: fewer layers": (changed(ENCODER, num_hidden_layers=1), ("text_encoder", "layers.1.")),
    "encoder: more layers": (changed(ENCODER, num_hidden_layers=3), ("text_encoder", "layers.2.", "missing")),
    "encoder: wider": (changed(ENCODER, hidden_size=64), ("text_encoder", "resized")),
    "scheduler: steps": (changed(SCHEDULER, num_train_timesteps=10**12), ("scheduler", "num_train_timesteps")),
    "scheduler: no shift": (changed(SCHEDULER, shift=...), ("scheduler", "shift")),
    "scheduler: missing": (lambda folder: (folder / SCHEDULER).unlink(), ("scheduler",)),
    "tokenizer: garbage": (replaced(TOKENIZER, bytes(range(256))), (TOKENIZER,)),
    "tokenizer: empty object": (replaced(TOKENIZER, "{}"), ("tokenizer",)),
    "tokenizer: other object": (changed(TOKENIZER, model={"type": "BPE"}), ("tokenizer has", "555")),
    "tokenizer: no length": (changed("tokenizer/tokenizer_config.json", model_max_length=...), ("model_max_length",)),
    "weights: a pickle": (pickled, ("transformer", "diffusion_pytorch_model.safetensors", ".bin")),
    "weights: a renamed pickle": (pickle_renamed, (WEIGHTS, "safetensors file")),
    "weights: truncated": (truncated, (WEIGHTS, "safetensors file")),
    "weights: long header": (replaced(WEIGHTS, b"\xff" * 64), (WEIGHTS,)),
    "weights: NaN": (tensors(ENCODER_WEIGHTS, NORM, float("nan")), (ENCODER_WEIGHTS, NORM, "finite")),
    "weights: infinite": (tensors(WEIGHTS, "context_embedder.weight", float("inf")), (WEIGHTS, "context_embedder")),
    "weights: index of a list": (indexed(["a"]), (f"{WEIGHTS}.index.json", "weight_map")),
    "weights: index that leads out": (indexed({"a": "../../x.safetensors"}), (f"{WEIGHTS}.index.json", "weight_map")),
    "link to itself": (linked(TOKENIZER, "tokenizer.json"), (TOKENIZER, "leads to itself")),
    "link in a circle": (linked("vae", "transformer/../vae"), ("vae", "leads to itself")),
    "file outside": (linked(WEIGHTS, "../../outside"), (WEIGHTS, "outside", "leads out")),
    "folder outside": (linked("vae", "../outside"), ("vae", "outside", "leads out")),
    "pipe": (piped, (TOKENIZER, "pipe")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(teacher, name):
    damage, facts = DAMAGES[name]
    damage(teacher)
    (line,) = faults(teacher)
    assert str(teacher) in line and all(fact in line for fact in facts) and "\n" not in line and len(line) < 1000
    try:
        PretrainedModelDataset(model=str(teacher)).exists()
    except DatasetError as error:  # the check of missing inputs comes first
        assert "\n" not in error_line(error)


def test_every_damaged_part_has_a_line(teacher):
    changed(VAE, scaling_factor=0)(teacher)
    changed(ENCODER, num_hidden_layers=1)(teacher)
    assert len(faults(teacher)) == 2


# ---- names of files and packages


def without_template(folder: Path) -> None:
    (folder / "tokenizer/chat_template.jinja").unlink()


def without_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


KLEIN = {"family": "flux2_klein", "max_sequence_length": 100}
QWEN_IMAGE = {"family": "qwen_image", "max_sequence_length": 200}
SDE = (changed(SCHEDULER, stochastic_sampling=True), ["scheduler has stochastic_sampling", "SDE"])


@pytest.mark.parametrize(
    "options, damage, words",
    [
        (Z_IMAGE, changed(SCHEDULER, shift=3.0), ["few-step student", "shift is 3", "Tongyi-MAI/Z-Image"]),
        (KLEIN, changed(INDEX, is_distilled=True), ["few-step student", "is_distilled", "FLUX.2-klein-base-4B"]),
        (QWEN_IMAGE, changed(DENOISER, guidance_embeds=True), ["guidance_embeds"]),
        *((options, *SDE) for options in (Z_IMAGE, KLEIN, QWEN_IMAGE)),
        (Z_IMAGE, changed(SCHEDULER, algorithm_type="sde-dpmsolver++"), ["algorithm_type: sde-dpmsolver++"]),
        (Z_IMAGE, changed(DENOISER, cap_feat_dim=16), ["cap_embedder"]),
        (KLEIN, changed(ENCODER, hidden_size=64), ["text_encoder", "resized"]),
        (Z_IMAGE, without_template, ["tokenizer", "chat_template"]),
        (KLEIN, without_template, ["tokenizer", "chat_template"]),
        *((options, without_tokenizer, ["tokenizer"]) for options in (Z_IMAGE, KLEIN, QWEN_IMAGE)),
    ],
)
def test_a_teacher_of_today_is_refused_by_its_fact(request, tmp_path, options, damage, words):
    teacher = request.getfixturevalue(f"tiny_{options['family']}")
    folder = shutil.copytree(teacher, tmp_path / "teacher", copy_function=os.link)
    damage(folder)
    (line,) = faulty_parts(folder, backbone_options(**options))
    assert "\n" not in line and all(word in line for word in [str(folder), *words]), line


@pytest.mark.parametrize(
    "options, resolution, nearest", [(KLEIN, 34, 32), (QWEN_IMAGE, 36, 32)], ids=["flux2_klein", "qwen_image"]
)
def test_a_resolution_that_packing_does_not_divide_is_refused_as_an_option(request, options, resolution, nearest):
    teacher = request.getfixturevalue(f"tiny_{options['family']}")
    (line,) = faulty_parts(teacher, backbone_options(**options, resolution=resolution))
    assert line.startswith(f"backbone.resolution {resolution} x {resolution} ") and f"{nearest} x {nearest}" in line


def test_a_teacher_loads_as_it_lies_on_the_hub(tiny_z_image, tmp_path):
    """Weights in bfloat16 and in several files, the text encoder saved with its head, the template in the config."""
    from transformers import Qwen3ForCausalLM

    folder = shutil.copytree(tiny_z_image, tmp_path / "teacher")
    loaded = backbone_options(**Z_IMAGE, dtype="bfloat16").load(folder, "cpu")
    network, encoder = loaded.load_model(), Qwen3ForCausalLM.from_pretrained(folder / "text_encoder")
    for name, part in (("transformer", network), ("text_encoder", encoder)):
        for file in (folder / name).glob("*.safetensors"):
            file.unlink()
        part.bfloat16().save_pretrained(folder / name, max_shard_size="50KB")
        assert len([*(folder / name).glob("*-of-*.safetensors")]) > 1
    template = (folder / "tokenizer/chat_template.jinja").read_text()
    without_template(folder)
    changed("tokenizer/tokenizer_config.json", chat_template=template)(folder)
    assert [*faulty_parts(folder, backbone_options(**Z_IMAGE))] == []
    again = backbone_options(**Z_IMAGE, dtype="bfloat16").load(folder, "cpu")
    weights = again.load_model().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    for name, value in loaded.encode(["a red circle"]).items():
        torch.testing.assert_close(again.encode(["a red circle"])[name], value, rtol=0, atol=0.05)


@pytest.mark.parametrize("pickle_beside", [False, True])
@pytest.mark.parametrize("part", NETWORKS)
def test_a_part_that_exists_only_as_a_variant_is_named_with_its_file(teacher, part, pickle_beside):
    (weights,) = (teacher / part).glob("*.safetensors")
    variant = weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    if pickle_beside:
        weights.with_suffix(".bin").touch()
    (line,) = faults(teacher)
    assert str(teacher / part) in line and weights.name in line and variant.name in line and "\n" not in line
    assert faults(teacher, is_complete=False) == []
    with refuses(DatasetError, str(teacher / part), weights.name, variant.name):
        PretrainedModelDataset(model=str(teacher)).load()


def test_an_index_needs_all_its_files(teacher):
    (weights,) = (teacher / "transformer").glob("*.safetensors")
    shard = weights.rename(weights.with_name("shard-1.safetensors"))
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    assert faults(teacher) == []
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": "shard-2.safetensors"}}))
    (line,) = faults(teacher)
    assert "shard-2.safetensors" in line


@pytest.mark.parametrize("installed", [set(), {"sentencepiece"}, {"protobuf"}, {"sentencepiece", "protobuf"}])
def test_a_tokenizer_with_its_sentencepiece_model_alone_needs_two_packages(teacher, monkeypatch, installed):
    for package in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(transformers.utils, f"is_{package}_available", lambda package=package: package in installed)
    folder = teacher / "tokenizer"
    (folder / "spiece.model").write_bytes(b"pieces")
    assert faults(teacher, is_complete=False) == []  # its tokenizer.json is read
    (folder / "tokenizer.json").unlink()
    (line,) = faults(teacher, is_complete=False)  # with both packages, of the garbage in the file
    assert str(folder) in line
    assert all((fact in line) == (len(installed) < 2) for fact in ("spiece.model", "sentencepiece protobuf"))


# ---- the hub's cache


@pytest.fixture
def snapshot(world_teacher, tmp_path):
    """The teacher in the layout of the hub's cache: links by commit to blobs."""
    repo = tmp_path / "hub" / "models--me--mine"
    (repo / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in world_teacher.rglob("*") if path.is_file())):
        os.link(path, repo / "blobs" / str(number))
        link = repo / "snapshots" / "0123abcd" / path.relative_to(world_teacher)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repo / "blobs" / str(number), link.parent))
    return repo / "snapshots" / "0123abcd"


def test_links_inside_a_repository_of_the_hubs_cache_are_read(snapshot, tmp_path):
    assert faults(snapshot) == []
    (tmp_path / "teacher").symlink_to(snapshot)
    assert faults(tmp_path / "teacher") == []


def test_links_out_of_a_repository_of_the_hubs_cache_are_refused(snapshot):
    shutil.move(os.path.realpath(snapshot / WEIGHTS), snapshot.parents[2] / "elsewhere")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../../elsewhere")
    (line,) = faults(snapshot)
    assert "elsewhere" in line and "leads out" in line


def test_of_a_download_each_part_that_is_there_is_checked(snapshot):
    (snapshot / WEIGHTS).unlink()
    assert faults(snapshot, is_complete=False) == []
    assert len(faults(snapshot)) == 1
    tensors(ENCODER_WEIGHTS, NORM, float("nan"))(snapshot)
    (line,) = faults(snapshot, is_complete=False)
    assert ENCODER_WEIGHTS in line


# ---- in a run


def run_of(teacher, nodes=()):
    catalog = DataCatalog({"teacher": teacher, "params:backbone": MemoryDataset(backbone_options().model_dump())})
    return SimpleNamespace(inputs=lambda: {"teacher"}, all_outputs=lambda: {"export"}, nodes=nodes), catalog


@pytest.mark.parametrize("dataset", ["folder", "pretrained"])
def test_a_stage_that_reads_the_teacher_is_refused_before_its_first_node(teacher, dataset):
    truncated(teacher)
    made = MemoryDataset(teacher) if dataset == "folder" else PretrainedModelDataset(model=str(teacher))
    (line,) = refuse_run(*run_of(made))
    assert str(teacher / WEIGHTS) in line and "\n" not in line


def test_a_download_is_checked_as_soon_as_a_node_has_loaded_it(teacher, monkeypatch):
    import click

    from dpdmd_pipeline.hooks import ConfigHooks

    dataset = PretrainedModelDataset(model="me/mine")
    monkeypatch.setattr(PretrainedModelDataset, "_download", lambda self, with_weights: teacher)
    weights = (teacher / WEIGHTS).rename(teacher / "later")
    hooks, (pipeline, catalog) = ConfigHooks(), run_of(dataset)
    parameters = {"project_path": str(teacher), "env": None}
    hooks.before_pipeline_run(parameters, pipeline, catalog)
    hooks.after_dataset_loaded("prompts")
    weights.rename(teacher / WEIGHTS)
    truncated(teacher)
    with refuses(click.ClickException, WEIGHTS):
        hooks.after_dataset_loaded("teacher")


def test_no_library_may_run_a_models_own_code():
    """transformers would ask on standard input."""
    calls = []
    for path in Path(dpdmd_pipeline.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                name = ast.unparse(node.func)
                if name.startswith("Auto") or name.startswith("model_class"):
                    calls.append((path.name, ast.unparse(node)))
    assert len(calls) > 3
    assert all("trust_remote_code=False" in call or "options" in call for _, call in calls)
