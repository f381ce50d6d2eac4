"""Contents of the files (keys, header, precision), and refusals before a file is written."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.exporting.conftest import ALPHA, CASES, RANK, RESOLUTION, export_options, train
from tests.raising import refuses
from transformers import CLIPTextModelWithProjection

from dpdmd_pipeline.backbones.lora import add_lora
from dpdmd_pipeline.backbones.networks import WEIGHTS
from dpdmd_pipeline.backbones.student_file import ADAPTER, load_header
from dpdmd_pipeline.backbones.tensor_files import CHECKSUM
from dpdmd_pipeline.exporting.formats import Export, read_student
from dpdmd_pipeline.exporting.schedulers import diffusers_use


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return {key: value for key, value in file.metadata().items() if key != CHECKSUM}


def network(folder):
    return next(folder / name for name in ("transformer", "unet") if (folder / name).is_dir())


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """Folders of students and teachers that a test may not change."""
    folders = {}
    for name in ("sd3_shifted", "sd3_lora"):
        teacher, folder = request.getfixturevalue(CASES[name].teacher), tmp_path_factory.mktemp(name)
        train(CASES[name], teacher, folder)
        folders[name] = (folder, teacher)
    return folders


def read(folder, teacher, family="sd3"):
    return read_student(folder, teacher, family, RESOLUTION, 0)


def write(student, teacher, folder, **changes):
    folder.mkdir()
    export = Export(student=student, teacher=teacher, **export_options(**changes))
    export.write(folder)
    return export


# ---- contents


@pytest.mark.parametrize("name", CASES)
def test_every_file_has_all_facts_of_its_sampling(exports, name):
    exported = exports[name]
    for form in exported.export.files:
        header, trained = load_header(exported.file(form)), exported.case.header
        assert (header.grid, header.sampler, header.prediction) == (trained.grid, trained.sampler, trained.prediction)
        assert (header.resolution, header.max_sequence_length) == (exported.case.resolution, exported.case.length)
        assert header.kind == ("lora" if form == "lora" else "full")


@pytest.mark.parametrize("name", [name for name in CASES if name != "flux2_klein_lora"])
def test_a_comfyui_file_has_the_networks_own_keys(exports, name):
    exported = exports[name]
    keys = load_file(exported.file("comfyui")).keys()
    assert keys == load_file(network(exported.teacher) / WEIGHTS).keys()


def test_diffusers_own_converter_undoes_the_spelling_of_a_klein_for_comfyui(exports):
    exported = exports["flux2_klein_lora"]
    spelled = load_file(exported.file("comfyui"))
    assert spelled["double_blocks.0.img_attn.qkv.weight"].shape == (3 * 32, 32)
    restored = convert_flux2_transformer_checkpoint_to_diffusers(dict(spelled))
    expected = exported.export.student.weights
    assert restored.keys() == expected.keys()
    assert all(torch.equal(restored[key], expected[key]) for key in expected)


def test_lora_files_have_the_keys_of_their_readers(exports):
    sd3, sdxl = (load_file(exports[name].file("lora")) for name in ("sd3_lora", "sdxl_v_lora"))
    assert all(key.startswith("transformer.") and ".lora_" in key for key in sd3)
    endings = {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(key.startswith("lora_unet_") and key.split(".", 1)[1] in endings for key in sdxl)
    assert load_header(exports["sd3_lora"].file("lora")).lora_alpha == RANK  # the scale is in the weights
    assert load_header(exports["sdxl_v_lora"].file("lora")).lora_alpha == ALPHA


@pytest.mark.parametrize("name", ["sd3_lora", "sdxl_v_lora", "z_image_lora"])
def test_every_module_of_a_lora_changes_the_merged_weights(exports, name):
    exported = exports[name]
    before, after = load_file(network(exported.teacher) / WEIGHTS), load_file(exported.file("comfyui"))
    modules = {key.rsplit(".lora_", 1)[0] for key in exported.export.student.adapter}
    assert len(modules) > 10
    assert {key for key in before if not torch.equal(before[key], after[key])} == {f"{m}.weight" for m in modules}


def test_the_modelspec_metadata_have_architecture_title_and_licence(exports):
    full, lora = (metadata(exports["sdxl_v_lora"].file(form)) for form in ("comfyui", "lora"))
    assert full["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert lora["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (full["modelspec.title"], full["modelspec.license"]) == ("tiny", "apache-2.0")
    assert (full["modelspec.prediction_type"], full["modelspec.resolution"]) == ("v", "32x32")
    assert metadata(exports["sd3_shifted"].file("comfyui"))["modelspec.architecture"] == "stable-diffusion-3"


def test_a_pipeline_that_gives_its_own_sigmas_gets_the_trained_ones_from_the_folders_shift(exports):
    exported = exports["z_image_lora"]
    scheduler = json.loads((exported.file("diffusers") / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["shift_terminal"]) == (6.0, None)
    assert diffusers_use(exported.case.header, exported.teacher).call["guidance_scale"] == 0  # none, as it counts
    assert (exported.file("diffusers") / "tokenizer/chat_template.jinja").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_written_in_the_requested_precision(trained, tmp_path, dtype):
    folder, teacher = trained["sd3_lora"]
    out = tmp_path / "out"
    files = write(read(folder, teacher), teacher, out, dtype=dtype).files
    for path in (network(out / "diffusers") / WEIGHTS, out / files["comfyui"], out / files["lora"]):
        assert {tensor.dtype for tensor in load_file(path).values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sd3_lora", "sdxl_eps", "sana_renoise"])
def test_a_plain_call_draws_with_a_folder_of_any_precision(exports, request, tmp_path, name, dtype, stored):
    exported = exports[name]
    teacher = shutil.copytree(exported.teacher, tmp_path / "teacher")
    for path in (path for path in teacher.glob("text_encoder*/*.safetensors") if stored == "float16"):
        save_file({key: value.half() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
        config = path.parent / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": stored, "torch_dtype": stored}))
    folder = write(exported.export.student, teacher, tmp_path / "out", dtype=dtype).files["diffusers"]
    for path in (tmp_path / "out" / folder).rglob("*.safetensors"):
        floats = {value.dtype for value in load_file(path).values() if value.is_floating_point()}
        assert floats == {getattr(torch, dtype)}, path
    use = diffusers_use(exported.export.student.header, teacher)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out" / folder, **use.load)
    assert {part.dtype for part in pipe.components.values() if hasattr(part, "dtype")} == {torch.float32}
    height, width = exported.export.student.header.sizes[0]
    assert pipe("a prompt", **use.call).images[0].size == (width, height)


@pytest.mark.parametrize("name", ["sd3_explicit", "sdxl_uneven"])
def test_with_the_folders_own_pipeline_a_call_takes_the_trained_arguments(exports, name):
    folder = exports[name].file("diffusers")
    use = diffusers_use(exports[name].export.student.header, exports[name].teacher)
    own = {"custom_pipeline": str(folder / "pipeline.py"), "trust_remote_code": True}
    pipes = [DiffusionPipeline.from_pretrained(folder, **use.load, **code) for code in ({}, own)]
    plain, bare = (
        pipe("a prompt", generator=torch.Generator().manual_seed(0), output_type="latent", **call).images
        for pipe, call in zip(pipes, (use.call, {}), strict=True)
    )
    assert torch.equal(plain, bare)


def test_text_encoders_in_several_files_keep_their_index(exports, tmp_path):
    exported = exports["sd3_shifted"]
    teacher = shutil.copytree(exported.teacher, tmp_path / "teacher")
    folder = teacher / "text_encoder"
    encoder = CLIPTextModelWithProjection.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")  # a variant is not copied
    encoder.save_pretrained(folder, max_shard_size="30KB")
    write(exported.export.student, teacher, tmp_path / "out", dtype="bfloat16")
    copy = tmp_path / "out/diffusers/text_encoder"
    files = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(files) > 1 and {path.name for path in copy.glob("*.safetensors")} == files
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for path in files for value in load_file(copy / path).values()
    )
    read_back = CLIPTextModelWithProjection.from_pretrained(copy, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value.bfloat16(), read_back[name]) for name, value in encoder.state_dict().items())


# ---- an adapter in half precision


def with_adapter(student, factor):
    """The student with its adapter's B times a factor, and the weights of that sum."""
    adapter = {name: value * (factor if "lora_B" in name else 1) for name, value in student.adapter.items()}
    weights = {name: value.clone() for name, value in student.weights.items()}
    add_lora(weights, student.adapter, -student.header.lora_scale)
    add_lora(weights, adapter, student.header.lora_scale)
    return replace(student, adapter=adapter, weights=weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sd3_lora", "sdxl_v_lora"])
def test_the_card_has_the_loss_of_an_adapter_by_its_precision(exports, tmp_path, name, dtype):
    exported, precision = exports[name], getattr(torch, dtype)
    student = with_adapter(exported.export.student, 0.01)
    files = write(student, exported.teacher, tmp_path / "out", dtype=dtype).files
    stored = load_file(tmp_path / "out" / files["comfyui"])
    base = load_file(network(exported.teacher) / WEIGHTS)
    modules = [key.removesuffix(".lora_A.weight") for key in student.adapter if "lora_A" in key]
    shares = {}
    for module in modules:
        exact = student.weights[f"{module}.weight"]
        lost = (stored[f"{module}.weight"].float() - exact).norm()
        shares[module] = (float(lost / exact.norm()), float(lost / (exact - base[f"{module}.weight"]).norm()))
    rows = {row.split(" | ")[0].removeprefix("| "): row.split(" | ") for row in card_rows(tmp_path / "out")}
    for number, row in enumerate(("merged weights", "adapter's change, merged")):
        worst = max(shares, key=lambda module: shares[module][number])
        assert float(rows[row][2].removesuffix(" %")) == pytest.approx(100 * shares[worst][number], rel=0.06)
        assert dtype == "float32" or worst in rows[row][3]
    assert float(rows["adapter's change, LoRA"][1].removesuffix(" %")) <= 200 * torch.finfo(precision).eps


def card_rows(folder):
    text = (folder / "README.md").read_text()
    return text[text.index("## Precision") : text.index("This student was not measured")].splitlines()


def test_a_change_that_the_precision_rounds_away_is_warned_of(exports, tmp_path, caplog):
    exported = exports["sd3_lora"]
    write(exported.export.student, exported.teacher, tmp_path / "plain", dtype="bfloat16")
    write(with_adapter(exported.export.student, 0.0), exported.teacher, tmp_path / "untrained", dtype="bfloat16")
    assert not caplog.records
    write(with_adapter(exported.export.student, 1e-3), exported.teacher, tmp_path / "small", dtype="bfloat16")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "bfloat16" in line and "adapter's change, merged" in line and "export.dtype=float32" in line


def test_factors_below_float16_are_warned_of_and_refused_when_they_vanish(exports, tmp_path, caplog):
    exported = exports["sd3_lora"]
    export = {"dtype": "float16", "formats": ["lora"]}
    write(with_adapter(exported.export.student, 1e-4), exported.teacher, tmp_path / "small", **export)
    assert any("below the normal numbers of float16" in record.getMessage() for record in caplog.records)
    with refuses(ValueError, "lora_B.weight", "float16", "export.dtype"):
        write(with_adapter(exported.export.student, 1e-9), exported.teacher, tmp_path / "zero", **export)
    write(
        with_adapter(exported.export.student, 1e-9),
        exported.teacher,
        tmp_path / "kept",
        dtype="bfloat16",
        formats=["lora"],
    )


@pytest.mark.parametrize("name", ["sd3_lora", "sdxl_v_lora"])
def test_the_strength_of_an_exported_lora_is_linear(exports, name):
    exported = exports[name]
    use = diffusers_use(exported.export.student.header, exported.teacher)
    base, student = load_file(network(exported.teacher) / WEIGHTS), exported.export.student
    for strength in (0.5, 1.0, -2.0):
        pipe = DiffusionPipeline.from_pretrained(exported.teacher, **use.load)
        pipe.load_lora_weights(str(exported.file("lora")))
        pipe.fuse_lora(lora_scale=strength)
        pipe.unload_lora_weights()
        fused = getattr(pipe, network(exported.teacher).name).state_dict()
        for key, value in base.items():
            expected = value + strength * (student.weights[key] - value)
            torch.testing.assert_close(fused[key], expected, rtol=1e-4, atol=1e-5)


def test_kohyas_alphas_are_exact_in_every_precision(exports, tmp_path):
    student, teacher = exports["sdxl_v_lora"].export.student, exports["sdxl_v_lora"].teacher
    files = write(student, teacher, tmp_path / "out", dtype="bfloat16", formats=["lora"]).files
    dtypes = {
        name.endswith(".alpha"): tensor.dtype for name, tensor in load_file(tmp_path / "out" / files["lora"]).items()
    }
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_the_same_student_gives_the_same_export(trained, tmp_path):
    folder, teacher = trained["sd3_lora"]
    for name in ("first", "second"):
        write(read(folder, teacher), teacher, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert len(files) > 10
    assert all((tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes() for file in files)


def test_no_file_names_a_path_of_this_machine(exports):
    for exported in exports.values():
        for path in exported.folder.rglob("*"):
            if path.suffix in (".json", ".md"):
                assert str(exported.teacher.parents[1]) not in path.read_text(), path


def test_only_requested_forms_are_written_and_indexed(trained, tmp_path):
    folder, teacher = trained["sd3_shifted"]
    export = write(read(folder, teacher), teacher, tmp_path / "out", formats=["lora", "comfyui"])
    assert export.left_out == ["lora"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "comfyui", "config.json"}
    assert json.loads((tmp_path / "out/config.json").read_text())["files"] == {"comfyui": "comfyui/tiny.safetensors"}


def test_pickles_of_a_teacher_are_not_copied(trained, tmp_path):
    folder, teacher = trained["sd3_shifted"]
    shutil.copytree(teacher, tmp_path / "teacher")
    (tmp_path / "teacher/vae/diffusion_pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    write(read(folder, tmp_path / "teacher"), tmp_path / "teacher", tmp_path / "out", formats=["diffusers"])
    assert {path.suffix for path in (tmp_path / "out/diffusers/vae").iterdir()} == {".json", ".safetensors"}


def test_an_older_student_gets_the_shift_of_its_teacher(trained, tmp_path):
    folder, teacher = trained["sd3_shifted"]
    shutil.copytree(folder, tmp_path / "old")
    old = {key: value for key, value in metadata(folder / WEIGHTS).items() if key != "dpdmd.shift"}
    save_file(load_file(folder / WEIGHTS), tmp_path / "old" / WEIGHTS, metadata=old)
    assert read(tmp_path / "old", teacher).header.shift == 3.0


# ---- refusals


def test_a_lora_file_of_a_full_student_is_refused(trained, tmp_path):
    folder, teacher = trained["sd3_shifted"]
    with refuses(ValueError, "export.formats=['lora']", "full"):
        write(read(folder, teacher), teacher, tmp_path / "out", formats=["lora"])


def test_a_student_of_another_family_is_refused(trained):
    folder, teacher = trained["sd3_shifted"]
    with refuses(ValueError, "'sd3'", "'sdxl'"):
        read(folder, teacher, family="sdxl")


def test_a_student_that_does_not_fit_its_teacher_is_refused(trained, tmp_path):
    folder, teacher = trained["sd3_shifted"]
    shutil.copytree(folder, tmp_path / "student")
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("proj_out.bias")
    save_file(tensors, tmp_path / "student" / WEIGHTS, metadata=metadata(folder / WEIGHTS))
    with refuses(ValueError, "1 missing (proj_out.bias)"):
        read(tmp_path / "student", teacher)


def test_a_lora_of_another_network_is_refused(trained, tmp_path):
    folder, teacher = trained["sd3_lora"]
    shutil.copytree(folder, tmp_path / "student")
    tensors = {name.replace("blocks.0", "blocks.9"): value for name, value in load_file(folder / ADAPTER).items()}
    save_file(tensors, tmp_path / "student" / ADAPTER, metadata=metadata(folder / ADAPTER))
    with refuses(ValueError, "LoRA", "blocks.9"):
        read(tmp_path / "student", teacher)


def test_weights_too_large_for_the_precision_are_refused(trained, tmp_path):
    folder, teacher = trained["sd3_shifted"]
    student = read(folder, teacher)
    student.weights["proj_out.bias"][0] = 1e5
    with refuses(ValueError, "finite (proj_out.bias)", "dtype"):
        write(student, teacher, tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("component", ["vae", "transformer"])
def test_a_teacher_with_pickles_only_is_refused(trained, tmp_path, component):
    folder, teacher = trained["sd3_shifted"]
    shutil.copytree(teacher, tmp_path / "teacher")
    weights = tmp_path / "teacher" / component / WEIGHTS
    weights.rename(weights.with_suffix(".bin"))
    with refuses((ValueError, OSError), "safetensors"):
        write(read(folder, tmp_path / "teacher"), tmp_path / "teacher", tmp_path / "out")


def test_a_folder_that_is_no_pipeline_is_refused(trained, tmp_path):
    with refuses(FileNotFoundError, "model_index.json"):
        read(trained["sd3_shifted"][0], tmp_path)
