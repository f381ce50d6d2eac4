"""Teachers from a single file, and with a LoRA: the same weights as in diffusers, or one line before the run."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.backbones.test_start import TARGETS
from tests.pipelines.conftest import backbone_options
from tests.raising import refuses
from tests.single_files import save_single_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.networks import network_files
from dpdmd_pipeline.backbones.start import load_start
from dpdmd_pipeline.datasets.pretrained import PretrainedModelDataset
from dpdmd_pipeline.planning.teacher import faulty_parts

WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def make(name):
    """A tiny pipeline whose text encoders have two widths: diffusers tells them apart by these."""
    from dpdmd_pipeline.shapes.models import make_pipeline, make_sdxl_pipeline

    flow = name == "sd3"
    pipeline = make_pipeline(max_length=12, shift=1.0, seed=0) if flow else make_sdxl_pipeline(max_length=12, seed=0)
    config = pipeline.text_encoder.config
    config.hidden_size = config.projection_dim = 16
    kind = CLIPTextModelWithProjection if flow else CLIPTextModel
    network = pipeline.transformer if flow else pipeline.unet
    widths = {"pooled_projection_dim": 48} if flow else {"cross_attention_dim": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts = {"transformer" if flow else "unet": type(network).from_config(network.config, **widths)}
        pipeline.register_modules(text_encoder=kind(config), **parts)
    return pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By family: the pipeline, its folder, the same without weights, and its single file."""
    folder, families = tmp_path_factory.mktemp("made"), {}
    for name in ("sd3", "sdxl"):
        pipeline, whole = make(name), folder / name
        pipeline.save_pretrained(whole)
        shutil.copytree(whole, folder / f"{name}_configs", ignore=shutil.ignore_patterns("*.safetensors"))
        file = save_single_file(pipeline, folder / f"my.{name}.safetensors")
        families[name] = SimpleNamespace(pipeline=pipeline, whole=whole, configs=folder / f"{name}_configs", file=file)
    return families


@pytest.fixture
def family(request, made):
    return SimpleNamespace(name=request.param, **vars(made[request.param]))


both = pytest.mark.parametrize("family", ["sd3", "sdxl"], indirect=True)
sdxl = pytest.mark.parametrize("family", ["sdxl"], indirect=True)


def teacher_of(family, folder, model=None, **changes):
    options = {"config": str(family.configs), "filepath": str(folder / "built"), **changes}
    return PretrainedModelDataset(model=str(model or family.file), **options)


def states(family, folder):
    absent = WITHOUT_T5 if family.name == "sd3" else {}
    pipeline = type(family.pipeline).from_pretrained(folder, **absent)
    return {name: part.state_dict() for name, part in pipeline.components.items() if hasattr(part, "state_dict")}


@both
def test_a_single_file_is_a_teacher_with_the_same_weights(family, tmp_path):
    teacher = teacher_of(family, tmp_path)
    folder = teacher.load_configs()
    assert folder.name == f"my.{family.name}"
    expected = {n: p.state_dict() for n, p in family.pipeline.components.items() if hasattr(p, "state_dict")}
    if family.name == "sd3":  # these files lack it, and diffusers has the identity
        expected["text_encoder"]["text_projection.weight"] = torch.eye(16)
    loaded = states(family, folder)
    assert loaded.keys() == expected.keys()
    for part, state in expected.items():
        assert all(torch.equal(value, state[name]) for name, value in loaded[part].items()), part
    options = backbone_options(family=family.name)
    assert [*faulty_parts(folder, options)] == []
    start = load_start(family.file, options.load(folder, "cpu"), family.name)  # it is a warm start, too
    network = options.load(folder, "cpu").load_model()
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    torch.nn.init.zeros_(next(network.parameters()))
    start.load_into(network)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    before = [path.stat().st_mtime_ns for path in network_files(network_folder(folder))]
    assert teacher_of(family, tmp_path).load() == folder  # kept, until the file changes
    assert [path.stat().st_mtime_ns for path in network_files(network_folder(folder))] == before


@sdxl
def test_a_changed_file_is_converted_again_in_its_own_precision(family, tmp_path):
    file = shutil.copy(family.file, tmp_path / "changing.safetensors")
    folder = teacher_of(family, tmp_path, file).load()
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    assert teacher_of(family, tmp_path, file).load() == folder
    for part in ("unet", "vae", "text_encoder_2"):
        (path,) = (folder / part).glob("*.safetensors")
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


@both
def test_parts_that_a_file_lacks_come_from_the_folder_of_its_configs(family, tmp_path):
    file = save_single_file(family.pipeline, tmp_path / "part.safetensors", without=["text_encoder", "text_encoder_2"])
    loaded = states(family, teacher_of(family, tmp_path, file, config=str(family.whole)).load())
    expected = family.pipeline.text_encoder_2.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded["text_encoder_2"].items())
    with refuses(ValueError, str(file), "teacher_config"):
        teacher_of(family, tmp_path, file).load_configs()


@sdxl
@pytest.mark.parametrize("fault", ["no autoencoder", "a weight", "a shape", "8 bits", "family", "no configs", "cut"])
def test_a_file_that_is_no_whole_teacher_is_refused_in_one_line(family, made, tmp_path, fault):
    file, changes = tmp_path / "damaged.safetensors", {}
    tensors = load_file(made["sd3" if fault == "family" else "sdxl"].file)
    name = next(name for name in tensors if "input_blocks.1.0" in name or "joint_blocks.0" in name)
    if fault == "no autoencoder":
        tensors = {name: value for name, value in tensors.items() if "first_stage" not in name}
    elif fault == "a weight":
        del tensors[name]
    elif fault == "a shape":
        tensors[name] = tensors[name][:1].clone()
    elif fault == "8 bits":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    elif fault == "no configs":
        changes = {"config": str(file)}
    save_file(tensors, file)
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((ValueError, OSError)) as error:
        teacher_of(family, tmp_path, file, **changes).load_configs()
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "built").exists()


TODAY = ("tiny_z_image", "tiny_flux2_klein", "tiny_qwen_image")


@pytest.mark.parametrize("fixture", TODAY)
def test_a_single_file_of_the_network_alone_and_a_lora_are_a_teacher_of_today(request, tmp_path, fixture):
    """These families' files are published so; the other parts come from the folder of the configs."""
    whole, file, lora = request.getfixturevalue(fixture), tmp_path / "mine.safetensors", tmp_path / "lora.safetensors"
    (weights,) = network_files(network_folder(whole))
    shifted = {name: value + 0.125 for name, value in load_file(weights).items()}
    save_file(shifted, file)
    name = next(name for name in shifted if name.endswith("to_q.weight"))
    rows, columns = shifted[name].shape
    module = f"transformer.{name.removesuffix('.weight')}"
    up = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    save_file({f"{module}.lora_A.weight": torch.ones(2, columns), f"{module}.lora_B.weight": up}, lora)

    dataset = {"config": str(whole), "filepath": str(tmp_path / "built"), "lora": f"{lora}@0.5"}
    folder = PretrainedModelDataset(model=str(file), **dataset).load_configs()
    (built,) = network_files(network_folder(folder))
    expected = shifted | {name: shifted[name] + 0.5 * up @ torch.ones(2, columns)}
    loaded = load_file(built)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-5, atol=1e-5)
    options = backbone_options(family=fixture.removeprefix("tiny_"), max_sequence_length=64)
    assert [*faulty_parts(folder, options)] == []


# ---- LoRAs


def save_lora(family, folder, *, text=False):
    """Write a random LoRA of the network, and of the second text encoder."""
    part = "transformer" if family.name == "sd3" else "unet"
    layers = {part: [*TARGETS[family.name]], **({"text_encoder_2": ["q_proj"]} if text else {})}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, endings in layers.items():
        for module, layer in getattr(family.pipeline, name).named_modules():
            if module.endswith(tuple(endings)) and hasattr(layer, "weight"):
                rows, columns, *size = layer.weight.shape
                tensors[f"{name}.{module}.lora_A.weight"] = torch.randn(2, columns, *size, generator=generator)
                tensors[f"{name}.{module}.lora_B.weight"] = torch.randn(
                    rows, 2, *(1 for _ in size), generator=generator
                )
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors", tensors


@pytest.mark.parametrize(("family", "source"), [("sd3", "folder"), ("sdxl", "single file")], indirect=["family"])
def test_a_lora_is_fused_with_its_factor_into_network_and_text_encoder(family, tmp_path, source):
    file, tensors = save_lora(family, tmp_path, text=True)
    model = family.whole if source == "folder" else family.file
    loaded = states(family, teacher_of(family, tmp_path, model, lora=f"{file}@0.5").load())
    changed = 0
    for part, network in family.pipeline.components.items():
        for name, weight in network.state_dict().items() if part in loaded else ():
            stem = f"{part}.{name.removesuffix('.weight')}"
            if (down := tensors.get(f"{stem}.lora_A.weight")) is not None:
                up = tensors[f"{stem}.lora_B.weight"]
                weight = weight + 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
                changed += 1
            if (part, name) != ("text_encoder", "text_projection.weight"):
                torch.testing.assert_close(loaded[part][name], weight, rtol=1e-5, atol=1e-5)
    assert 2 * changed == len(tensors)


@sdxl
@pytest.mark.parametrize("fault", ["nowhere", "factor", "of another network", "another text encoder"])
def test_a_lora_that_does_not_fit_the_teacher_is_refused_in_one_line(family, tmp_path, fault):
    file, tensors = save_lora(family, tmp_path, text=True)
    text = {"nowhere": "nowhere.safetensors", "factor": f"{file}@much"}.get(fault, str(file))
    if fault == "of another network":
        save_file({name.replace("to_q", "to_z"): value for name, value in tensors.items()}, file)
    elif fault == "another text encoder":
        save_file({name.replace("q_proj", "z_proj"): value for name, value in tensors.items()}, file)
    with refuses((ValueError, OSError), text.partition("@")[0]) as error:
        teacher_of(family, tmp_path, family.whole, lora=text).load_configs()
    assert "\n" not in str(error.value) and not (tmp_path / "built").exists()
