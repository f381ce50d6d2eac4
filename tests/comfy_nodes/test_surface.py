"""Examples, help, translations and metadata of the pack agree with its nodes."""

import ast
import importlib.util
import itertools
import json
import os
import re
import tomllib
from pathlib import Path

import browser_walk
import pytest
import yaml
from PIL import Image

PROJECT = Path(__file__).parents[2]
PACK = PROJECT / "comfy_nodes"
LANGUAGES = ("en", "zh", "ja", "fr")
FORMS = {"diffusion_models": "comfyui", "loras": "lora"}  # ComfyUI's folder -> the form of the export for it
EXAMPLES = sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
ENVIRONMENTS = {  # others: sd35
    "flux2_klein_lora": "flux2_klein",
    "qwen_image_lora": "qwen_image",
    "sd35_lora": "sd35_lora_16gb",
    "sdxl_4step": "sdxl",
    "z_image_lora": "z_image",
}
OF_STUDENTS = [*ENVIRONMENTS, "draft_then_finish", "sd35_4step", "sd35_img2img", "teacher_first_step"]

# Saved workflows depend on these ids, names, types and their order. id: (sockets, widgets, outputs)
NODES = {
    "DPDMDSampler": (
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "latent_image": "LATENT",
            "sigmas": "SIGMAS",
            "negative": "CONDITIONING",
        },
        ["seed", "seed control", "steps", "denoise", "method", "per_image_seed"],
        {"latent": "LATENT", "info": "STRING"},
    ),
    "DPDMDScheduler": ({"model": "MODEL"}, ["steps", "denoise", "schedule", "custom"], {"sigmas": "SIGMAS"}),
    "DPDMDLoader": (
        {"base_model": "MODEL"},
        ["student_name", "weight_dtype", "strength"],
        {"model": "MODEL", "info": "STRING"},
    ),
    "DPDMDSamplerSelect": ({}, ["method"], {"sampler": "SAMPLER"}),
    "DPDMDNoise": ({}, ["noise_seed", "noise_seed control"], {"noise": "NOISE"}),
    "DPDMDFirstStepGuider": (
        {"student": "MODEL", "teacher": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"},
        ["teacher_steps", "teacher_cfg"],
        {"guider": "GUIDER"},
    ),
    "DPDMDTeacherStart": (
        {
            "base_model": "MODEL",
            "few_step_model": "MODEL",
            "positive": "CONDITIONING",
            "latent_image": "LATENT",
            "sigmas": "SIGMAS",
            "negative": "CONDITIONING",
        },
        ["seed", "seed control", "teacher_steps", "landing", "teacher_cfg", "method", "per_image_seed"],
        {"latent": "LATENT"},
    ),
    "DPDMDTeacherStartGuider": (
        {"base_model": "MODEL", "few_step_model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"},
        ["teacher_steps", "landing", "teacher_cfg"],
        {"guider": "GUIDER"},
    ),
    "DPDMDSeeds": (
        {
            "few_step_model": "MODEL",
            "positive": "CONDITIONING",
            "latent_image": "LATENT",
            "vae": "VAE",
            "sigmas": "SIGMAS",
            "base_model": "MODEL",
            "negative": "CONDITIONING",
        },
        ["seed", "seed control", "count", "steps", "pick", "method", "teacher_steps", "landing", "teacher_cfg"],
        {"latent": "LATENT", "chosen_seed": "INT", "sheet": "IMAGE", "drafts": "LATENT"},
    ),
    "DPDMDDiversity": ({"samples": "LATENT"}, [], {"distance": "FLOAT"}),
    "DPDMDDemoPrompt": ({}, ["pipeline_name", "text"], {"conditioning": "CONDITIONING"}),
    "DPDMDDemoVAE": ({}, ["pipeline_name", "enlarge"], {"vae": "VAE"}),
}

on_a_real_server = pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH is not set")


def inputs_of(node: str) -> set[str]:
    sockets, widgets, _ = NODES[node]
    return set(sockets) | {name for name in widgets if not name.endswith(" control")}


def texts(language: str) -> dict:
    return json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def _sockets_of(node: dict) -> dict[str, str]:
    """Inputs of an example's node that are no widgets."""
    return {entry["name"]: entry["type"] for entry in node["inputs"] if "widget" not in entry}


def nodes_of(example: str) -> list[dict]:
    return browser_walk.read_example(example)["nodes"]


def test_the_ids_are_those_of_the_code():
    ids = {
        keyword.value.value
        for path in (PACK / "nodes").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "node_id"
    }
    assert ids == set(NODES)


# ---- examples


def test_there_is_an_example_for_every_way_to_use_a_student():
    assert EXAMPLES == [
        "draft_then_finish",
        "first_steps",
        "flux2_klein_lora",
        "qwen_image_lora",
        "sd35_4step",
        "sd35_img2img",
        "sd35_lora",
        "sdxl_4step",
        "seeds_at_a_glance",
        "teacher_first_step",
        "teacher_start_flux",
        "teacher_start_qwen_lightning",
        "teacher_start_sdxl_dmd2",
        "teacher_start_z_image",
        "z_image_lora",
    ]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_link_joins_an_output_and_an_input_of_its_type(example):
    flow = browser_walk.read_example(example)
    nodes = {node["id"]: node for node in flow["nodes"]}
    for number, source, slot, target, entry, kind in flow["links"]:
        output, socket = nodes[source]["outputs"][slot], nodes[target]["inputs"][entry]
        assert output["type"] == socket["type"] == kind, f"link {number}"
        assert number in output["links"] and socket["link"] == number, f"link {number}"
    listed = [number for node in nodes.values() for output in node["outputs"] for number in output["links"] or []]
    assert sorted(listed) == sorted(link[0] for link in flow["links"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_our_nodes_in_an_example_have_their_real_sockets_and_widgets(example):
    ours = [node for node in nodes_of(example) if node["type"].startswith("DPDMD")]
    assert ours
    for node in ours:
        sockets, widgets, outputs = NODES[node["type"]]
        assert _sockets_of(node) == sockets, node["type"]
        assert {entry["widget"]["name"] for entry in node["inputs"] if "widget" in entry} <= set(widgets)
        assert {output["name"]: output["type"] for output in node["outputs"]} == outputs, node["type"]
        assert len(node["widgets_values"]) == len(widgets), node["type"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_note_names_every_file_and_its_folder(example):
    (note,) = [node["widgets_values"][0] for node in nodes_of(example) if node["type"] == "MarkdownNote"]
    for node in nodes_of(example):
        for file in browser_walk.files_of(node):
            folder, name = file.split("/")
            assert f"models/{folder}/" in note and name in note, f"{example}: {file}"


@pytest.mark.parametrize("example", OF_STUDENTS)
def test_an_example_loads_the_file_that_the_export_writes_and_names_its_folder(example):
    conf = PROJECT / "conf" / ENVIRONMENTS.get(example, "sd35")
    options = yaml.safe_load((conf / "parameters.yml").read_text())["export"]
    folder = yaml.safe_load((conf / "globals.yml").read_text())["folder"]
    export = yaml.safe_load((PROJECT / "conf/base/catalog.yml").read_text())["export"]["filepath"]
    export = export.replace("${_run}", folder)
    (loader,) = [node for node in nodes_of(example) if node["type"] == "DPDMDLoader"]
    (note,) = [node["widgets_values"][0] for node in nodes_of(example) if node["type"] == "MarkdownNote"]
    folder, name = loader["widgets_values"][0].split("/")
    assert name == f"{options['title']}.safetensors"
    assert f"`{export}/{FORMS[folder]}`" in note


def test_first_steps_name_the_files_that_make_distill_writes():
    title = yaml.safe_load((PROJECT / "conf/base/parameters_export.yml").read_text())["export"]["title"]
    nodes = {node["type"]: node["widgets_values"] for node in nodes_of("first_steps")}
    assert nodes["DPDMDLoader"][0] == f"diffusion_models/{title}.safetensors"
    assert nodes["DPDMDDemoPrompt"][0] == nodes["DPDMDDemoVAE"][0] == title
    (note,) = nodes["MarkdownNote"]
    assert (
        f"`data/06_models/export/comfyui/{title}.safetensors`" in note and "`data/06_models/export/diffusers`" in note
    )


@pytest.mark.parametrize("example", [name for name in OF_STUDENTS if "sd35" in ENVIRONMENTS.get(name, "sd35")])
def test_sd35_prompts_are_padded_as_in_training(example):
    flow = browser_walk.read_example(example)
    nodes = {node["id"]: node for node in flow["nodes"]}
    sources = {(target, entry): nodes[source] for _, source, _, target, entry, _ in flow["links"]}
    prompts = [node for node in nodes.values() if node["type"] == "CLIPTextEncode"]
    for prompt in prompts:
        source = sources[prompt["id"], 0]
        assert source["type"] == "T5TokenizerOptions" and source["widgets_values"] == [0, 256]


TITLE_HEIGHT, GAP = 30, 40  # pixels; a node's title is above its position
# pixels of nodes with the text, and for samplers the preview, that a run adds
GROWN = {"DPDMDLoader": 240, "DPDMDSampler": 560, "DPDMDTeacherStart": 560, "SamplerCustomAdvanced": 300}
NOTE_TEXT = "#dddddd"  # of ComfyUI's dark page


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_nodes_of_an_example_are_forty_pixels_apart(example):
    boxes = [
        (node["pos"], (node["size"][0], max(node["size"][1], GROWN.get(node["type"], 0))), node["id"])
        for node in nodes_of(example)
    ]
    for ((x, y), (width, height), one), ((left, top), size, other) in itertools.permutations(boxes, 2):
        beside = left >= x + width + GAP or left + size[0] + GAP <= x
        above = top - TITLE_HEIGHT >= y + height + GAP or top + size[1] + GAP <= y - TITLE_HEIGHT
        assert beside or above, f"nodes {one} and {other}"


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rgb or #rrggbb."""
    size = len(colour) // 3
    values = [int(colour[1 + i * size : 1 + (i + 1) * size] * (3 - size), 16) / 255 for i in range(3)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_texts_of_an_example_have_contrast(example):
    for node in nodes_of(example):
        if node["type"] == "MarkdownNote":
            assert (luminance(NOTE_TEXT) + 0.05) / (luminance(node["bgcolor"]) + 0.05) >= 7
    # the page writes a group's title on two layers of its own colour: at best, in white, 4.2 to 1
    assert browser_walk.read_example(example)["groups"] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_thumbnail_lies_beside_the_example(example):
    path = PACK / "example_workflows" / f"{example}.jpg"
    assert path.stat().st_size < 100_000
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("JPEG", (720, 480))
        assert len(picture.getcolors(2**24)) > 1000  # no empty page


# ---- help and translations


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_explains_every_input(node):
    page = (PACK / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {texts('en')[node]['display_name']}\n")
    explained = set(re.findall(r"^\| (\w+) \| \S", page, re.MULTILINE))
    assert inputs_of(node) <= explained


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_has_a_name_and_a_tooltip(language):
    translated = texts(language)
    assert set(translated) == set(NODES)
    for node, text in translated.items():
        assert text["display_name"] and text["description"], node
        assert set(text["inputs"]) == inputs_of(node), node
        assert list(text["outputs"]) == [str(i) for i in range(len(NODES[node][2]))], node
        for entry in [*text["inputs"].values(), *text["outputs"].values()]:
            assert entry["name"].strip() and entry["tooltip"].strip(), node


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_a_translation_differs_from_the_english_text(language):
    english, translated = texts("en"), texts(language)
    for node in NODES:
        assert translated[node]["display_name"] != english[node]["display_name"]
        assert translated[node]["description"] != english[node]["description"]
        for name, text in translated[node]["inputs"].items():
            assert text["tooltip"] != english[node]["inputs"][name]["tooltip"], f"{node}.{name}"


# ---- the pack


def test_the_metadata_has_what_the_registry_requires():
    metadata = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = metadata["project"], metadata["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,98}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["dependencies"] == [] and project["license"] == "Apache-2.0"
    assert {"Repository", "Documentation", "Issues"} == set(project["urls"])
    # torch alone: every accelerator that the registry knows
    assert sum(name.startswith("Environment :: ") for name in project["classifiers"]) == 5
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert {"PublisherId", "DisplayName", "Icon", "Banner"} <= set(comfy)


@pytest.mark.parametrize(("name", "size"), [("icon", (400, 400)), ("banner", (1260, 540))])
def test_the_registrys_pictures_have_its_sizes(name, size):
    """A square of at most 400 pixels, and 21 to 9."""
    with Image.open(PACK / "registry" / f"{name}.png") as picture:
        assert picture.size == size


def test_the_pack_contains_the_licence():
    assert (PACK / "LICENSE").read_bytes() == (PROJECT / "LICENSE").read_bytes()


def test_the_readme_links_to_files_that_exist_and_names_every_example():
    text = (PACK / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (PACK / link).exists()] == []
    pictures = list((PACK / "pictures").iterdir())
    assert pictures and all(f"pictures/{path.name}" in links for path in pictures)
    assert all(path.stat().st_size < 200_000 for path in pictures)
    assert [name for name in EXAMPLES if name not in text] == []


# ---- on a real ComfyUI


def interface(info: dict) -> tuple[dict, list, dict]:
    """Sockets, widgets and outputs of a node, read from ComfyUI's own description."""
    sockets, widgets = {}, []
    entries = [*info["input"].get("required", {}).items(), *info["input"].get("optional", {}).items()]
    for name, (kind, *options) in entries:
        if isinstance(kind, str) and kind not in {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}:
            sockets[name] = kind
            continue
        widgets.append(name)
        options = options[0] if options else {}
        if options.get("control_after_generate"):
            widgets.append(f"{name} control")
        if options.get("image_upload"):
            widgets.append(f"{name} upload")
    return sockets, widgets, dict(zip(info["output_name"], info["output"], strict=True))


@on_a_real_server
def test_comfyui_sees_the_nodes_of_saved_workflows(server):
    infos = server.get("object_info")
    assert {name: interface(info) for name, info in infos.items() if name.startswith("DPDMD")} == NODES


@on_a_real_server
def test_the_english_texts_are_the_nodes_own(server):
    infos = server.get("object_info")
    for node, text in texts("en").items():
        info = infos[node]
        inputs = info["input"]["required"] | info["input"].get("optional", {})
        assert (text["display_name"], text["description"]) == (info["display_name"], info["description"])
        assert {name: entry["tooltip"] for name, entry in text["inputs"].items()} == {
            name: options["tooltip"] for name, (_, options) in inputs.items()
        }
        assert [entry["tooltip"] for entry in text["outputs"].values()] == info["output_tooltips"]


@on_a_real_server
@pytest.mark.parametrize("example", EXAMPLES)
def test_comfyuis_own_nodes_in_an_example_exist_as_used(server, example):
    infos = server.get("object_info")
    if (later := browser_walk.LATER.get(example)) and later not in infos:
        pytest.skip(f"this ComfyUI has no {later}")
    for node in nodes_of(example):
        if node["type"] == "MarkdownNote":  # belongs to the page, not to the server
            continue
        sockets, widgets, outputs = interface(infos[node["type"]])
        assert _sockets_of(node).items() <= sockets.items(), node["type"]
        assert len(node["widgets_values"]) == len(widgets), node["type"]
        types = list(outputs.values())
        assert [output["type"] for output in node["outputs"]] == types[: len(node["outputs"])], node["type"]


@on_a_real_server
@pytest.mark.skipif(browser_walk.find_chromium() is None, reason="no chromium on the path")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="playwright is not installed")
def test_a_browser_finds_the_nodes_opens_the_examples_and_runs_three(comfyui, tmp_path):
    browser_walk.main(tmp_path)
    assert {path.name for path in tmp_path.glob("run_*.png")} == {f"run_{name}.png" for name in browser_walk.RUNS}
