"""A walk through ComfyUI's page, with a real server and a real browser.

    COMFYUI_PATH=/path/to/ComfyUI python tests/comfy_nodes/browser_walk.py OUT [nodes2]

It adds the sampler by search, moves and connects nodes with the mouse, opens every example and checks that no node is
missing, runs some examples with random weights, and reads the nodes' titles in every language. With `nodes2` the page
draws the nodes as HTML (Nodes 2.0). Screenshots and thumbnails go to OUT. It needs `pip install playwright` and a
Chromium, on the path or in CHROMIUM. COMFY_PYTHON is ComfyUI's Python, if it has its own. The page can reach only the
server.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfy_server import ComfyServer

PACK = Path(__file__).parents[2] / "comfy_nodes"
FOLDERS = {  # loader -> its folder of models
    "VAELoader": "vae",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "TripleCLIPLoader": "text_encoders",
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "LoraLoaderModelOnly": "loras",
}
TIMEOUT = 300  # seconds, for a page or a run on a busy machine
SIZE = {"width": 1600, "height": 1000}
SETTINGS = {  # no tutorials and other first-start dialogs
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,  # text at every zoom; its name in older versions
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
SEARCH_WORDS = {  # of users -> a node that the search shows
    "turbo": "DPDMDSampler",
    "lightning": "DPDMDLoader",
    "4 steps": "DPDMDSampler",
    "few step": "DPDMDSampler",
    "variety": "DPDMDTeacherStart",
    "diversity": "DPDMDDiversity",
    "seed variation": "DPDMDSeeds",
}
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
RUNS = {"first_steps": 16, "sd35_4step": 4, "sd35_img2img": 1, "draft_then_finish": 17}  # pictures of each
LATER = {"flux2_klein_lora": "EmptyFlux2LatentImage"}  # a node that older versions lack
UNKNOWN_NODES = """() => window.app.graph._nodes
    .filter(node => !(node.type in window.LiteGraph.registered_node_types) || node.has_errors).map(node => node.type)"""
BOUNDS_OF_NODES = """() => {
    const { scale, offset } = window.app.canvas.ds, { _nodes: nodes, _groups: groups } = window.app.graph
    const boxes = [...nodes.map(node => node.getBounding()), ...groups.map(group => group._bounding)]
    const low = axis => Math.min(...boxes.map(box => box[axis])) - 20
    const high = axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])) + 20
    const { x, y } = window.app.canvas.canvas.getBoundingClientRect()
    return [(low(0) + offset[0]) * scale + x, (low(1) + offset[1]) * scale + y,
            (high(0) - low(0)) * scale, (high(1) - low(1)) * scale]
}"""
SEEDS_FOR_SAMPLER = """() => {
    const { graph } = window.app, find = type => graph.findNodesByType(type)[0]
    const sampler = find("DPDMDSampler"), seeds = window.LiteGraph.createNode("DPDMDSeeds")
    seeds.pos = [...sampler.pos]
    graph.remove(sampler)
    graph.remove(find("DPDMDDiversity"))
    graph.add(seeds)
    find("DPDMDLoader").connect(0, seeds, "few_step_model")
    find("DPDMDDemoPrompt").connect(0, seeds, "positive")
    find("EmptySD3LatentImage").connect(0, seeds, "latent_image")
    find("DPDMDDemoVAE").connect(0, seeds, "vae")
    seeds.connect(0, find("VAEDecode"), "samples")
}"""
PLACE_OF_SLOT = """([type, kind, name]) => {
    const node = window.app.graph.findNodesByType(type)[0], isInput = kind === "inputs"
    const slot = node[kind].findIndex(slot => slot.name === name)
    const dot = document.querySelector(`[data-slot-key="${node.id}-${isInput ? "in" : "out"}-${slot}"]`)
    if (dot) {  // Nodes 2.0
        const { x, y, width, height } = dot.getBoundingClientRect()
        return [x + width / 2, y + height / 2]
    }
    const { scale, offset } = window.app.canvas.ds, [x, y] = node.getConnectionPos(isInput, slot)
    const corner = window.app.canvas.canvas.getBoundingClientRect()
    return [(x + offset[0]) * scale + corner.x, (y + offset[1]) * scale + corner.y]
}"""
CANVAS_ON_TOP = "place => document.elementFromPoint(...place)?.closest('#graph-canvas, [data-node-id]')"
LINK = [("DPDMDLoader", "outputs", "model"), ("DPDMDSampler", "inputs", "model")]
LOCALES = {"en": "en-US", "zh": "zh-CN", "ja": "ja-JP", "fr": "fr-FR"}


def main(out: Path, nodes2: bool = False) -> None:
    """Walk through the page; screenshots and thumbnails go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS | {"Comfy.VueNodes.Enabled": nodes2}
    with tempfile.TemporaryDirectory() as base, serving(Path(base), settings) as server:
        print(f"ComfyUI {server.get('system_stats')['system']['comfyui_version']}")
        check_served_files(server)
        make_files(server.base)
        with browsing() as browser:
            page = open_page(browser, server, "en")
            add_by_search(page, server, out)
            check_loader_width(page)
            move_and_connect(page)
            known = server.get("object_info")
            for name in examples():
                if name in LATER and LATER[name] not in known:
                    print(f"left out: {name}, this ComfyUI has no {LATER[name]}")
                else:
                    open_example(page, name, out)
            for name in RUNS:
                run_example(page, server, name, out)
            click_a_draft(page, server, out)
            page.close()
            for language in LOCALES:
                check_titles(browser, server, language)


def examples() -> list[str]:
    """Names of the example workflows."""
    return sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))


# ---- the server


@contextlib.contextmanager
def serving(base: Path, settings: dict) -> Iterator[ComfyServer]:
    """A ComfyUI with the pack and with settings of its page."""
    file = base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(settings))
    server = ComfyServer(Path(os.environ["COMFYUI_PATH"]), os.environ.get("COMFY_PYTHON", sys.executable), base)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def fetch(server: ComfyServer, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/{path}", timeout=30) as answer:
        return answer.read()


def check_served_files(server: ComfyServer) -> None:
    """Fetch help pages, templates with thumbnails, and translations, as the page does."""
    nodes = [name for name in server.get("object_info") if name.startswith("DPDMD")]
    for name in nodes:
        assert fetch(server, f"extensions/dpdmd/docs/{name}.md").startswith(b"# "), name
    assert sorted(server.get("workflow_templates")["dpdmd"]) == examples()
    for name in examples():
        assert fetch(server, f"api/workflow_templates/dpdmd/{name}.jpg").startswith(b"\xff\xd8"), name
    for language in LOCALES:
        assert set(server.get("i18n")[language]["nodeDefs"]) >= set(nodes), language
    print(
        f"served: {len(nodes)} nodes with help, {len(examples())} templates with thumbnails, {len(LOCALES)} languages"
    )


# ---- model files of the examples


def make_files(base: Path) -> None:
    """Write placeholders for all examples, and random weights for those that run."""
    for name in examples():
        for node in read_example(name)["nodes"]:
            for file in files_of(node):
                path = base / "models" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((8).to_bytes(8, "little") + b"{}      ")  # a safetensors file without tensors
    make_student(base / "models/diffusion_models/sd35-medium-dpdmd-4step.safetensors")
    make_text_encoder(base / "models/text_encoders/clip_l.safetensors")
    make_vae(base / "models/vae/sd3.5_vae.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        from workflows import export_small_student

        export_small_student(Path(folder), base / "models", "shapes-dpdmd-4step")
    # a JPEG under this name: readers go by content
    shutil.copy(PACK / "example_workflows" / "sd35_4step.jpg", base / "input" / "example.png")


def read_example(name: str) -> dict:
    return json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def files_of(node: dict) -> list[str]:
    """Model files in a node's widgets, relative to models/."""
    names = [value for value in node.get("widgets_values", []) if str(value).endswith(".safetensors")]
    folder = FOLDERS.get(node["type"])
    return [f"{folder}/{name}" if folder else name for name in names]


def make_student(path: Path) -> None:
    """Write the smallest transformer that ComfyUI detects as SD3 and that takes real text embeddings."""
    import torch
    from diffusers import SD3Transformer2DModel

    from dpdmd_pipeline.backbones.networks import WEIGHTS
    from dpdmd_pipeline.backbones.student_file import save_student
    from dpdmd_pipeline.backbones.student_header import StudentHeader

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=32,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        caption_projection_dim=128,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=32,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_student(Path(folder), model, StudentHeader(family="sd3", sigmas=[1.0, 0.75, 0.5, 0.25, 0.0]))
        shutil.copy(Path(folder) / WEIGHTS, path)


def make_text_encoder(path: Path) -> None:
    """Write a full-size CLIP-L: ComfyUI detects no smaller one."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        shapes = CLIPTextModel(config).state_dict()
    fill(path, {name if name.startswith("text_model.") else f"text_model.{name}": v for name, v in shapes.items()})


def make_vae(path: Path) -> None:
    """Write SD3.5's autoencoder in diffusers' layout, as in its repository."""
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    fill(path, vae.state_dict())


def fill(path: Path, shapes: dict[str, Any]) -> None:
    """Write random weights; norms stay near the identity, so that the output is not zero."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        values = torch.empty(shape.shape).uniform_(-0.05, 0.05, generator=generator)
        weights[name] = (values + (name.endswith("weight") and values.ndim == 1)).half()
    save_file(weights, path)


# ---- the browser


@contextlib.contextmanager
def browsing() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise FileNotFoundError("no chromium on the path: install one, or set CHROMIUM to one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def open_page(browser: Any, server: ComfyServer, language: str) -> Any:
    """ComfyUI's page with an empty graph; requests to other hosts are blocked."""
    address = f"http://127.0.0.1:{server.port}"
    page = browser.new_page(viewport=SIZE, device_scale_factor=2, locale=LOCALES[language])
    page.set_default_timeout(1000 * TIMEOUT)

    def block_other_hosts(route: Any) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    page.route("**/*", block_other_hosts)
    page.goto(address)
    page.wait_for_function("() => window.app?.graph?._nodes.length")  # the page loads its own first workflow last
    page.wait_for_timeout(2000)
    page.wait_for_function(CANVAS_ON_TOP, arg=[SIZE["width"] / 2, SIZE["height"] / 2])  # a splash screen covers it
    page.evaluate("() => window.app.graph.clear()")
    return page


def add_by_search(page: Any, server: ComfyServer, out: Path) -> None:
    """Add a node like a user: double click, type, take the first."""
    page.mouse.dblclick(SIZE["width"] / 2, SIZE["height"] / 2)
    page.wait_for_function("() => document.activeElement?.tagName === 'INPUT'")
    check_search_words(page, server)
    page.keyboard.press("Control+A")
    page.keyboard.type("DP-DMD", delay=40)
    page.get_by_text("DP-DMD Sampler", exact=True).first.wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=out / "search.png")
    page.keyboard.press("Enter")
    page.wait_for_function("() => window.app.graph._nodes.length")
    page.wait_for_timeout(1500)
    page.mouse.click(SIZE["width"] / 2, SIZE["height"] / 3)  # newer versions ask for the position
    page.wait_for_function("() => window.app.canvas.state?.ghostNodeId == null")
    page.wait_for_timeout(1500)
    page.screenshot(path=out / "added.png")
    assert node_types(page) == ["DPDMDSampler"], node_types(page)
    print("search: DP-DMD Sampler added")


def check_search_words(page: Any, server: ComfyServer) -> None:
    """Type words of users into the open search; each finds a node of ours, in versions that have aliases."""
    infos = server.get("object_info")
    if "search_aliases" not in infos["DPDMDSampler"]:
        return
    for word, node in SEARCH_WORDS.items():
        assert word in infos[node]["search_aliases"], f"{word}: {infos[node]['search_aliases']}"
        page.keyboard.press("Control+A")
        page.keyboard.type(word, delay=20)
        page.get_by_text(infos[node]["display_name"], exact=True).first.wait_for()
    print(f"search: {', '.join(SEARCH_WORDS)} find our nodes")


def check_loader_width(page: Any) -> None:
    """A new loader shows a whole file name."""
    width = page.evaluate(
        """() => {
            window.app.graph.clear()
            const node = window.LiteGraph.createNode("DPDMDLoader")
            window.app.graph.add(node)
            return node.size[0]
        }"""
    )
    assert width >= 500, width
    page.evaluate("() => window.app.graph.clear()")
    print(f"loader: {width:.0f} wide")


def move_and_connect(page: Any) -> None:
    """Drag a link from the loader to the sampler, then the sampler by its title."""
    load(page, "first_steps", read_example("first_steps"))
    sampler = 'window.app.graph.findNodesByType("DPDMDSampler")[0]'
    page.evaluate(f"() => {{ {sampler}.disconnectInput(0) }}")
    drag(page, *places_of_slots(page))
    page.wait_for_function(f"() => {sampler}.getInputNode(0)?.type === 'DPDMDLoader'")
    corner = page.evaluate(f"() => [...{sampler}.pos]")
    x, y = page.evaluate(PLACE_OF_SLOT, LINK[1])
    drag(page, (x + 60, y - 40 * page.evaluate("() => window.app.canvas.ds.scale")), (x + 90, y + 100))
    page.wait_for_function(f"corner => `${{{sampler}.pos}}` !== `${{corner}}`", arg=corner)
    page.mouse.move(1, 1)  # no tooltip in the screenshots
    print("mouse: a link drawn, a node moved")


def places_of_slots(page: Any) -> list[Any]:
    """Places of the link's two slots, once they no longer move: a busy machine lays nodes out late."""
    before, now = None, [page.evaluate(PLACE_OF_SLOT, slot) for slot in LINK]
    while now != before:
        page.wait_for_timeout(1500)
        before, now = now, [page.evaluate(PLACE_OF_SLOT, slot) for slot in LINK]
    return now


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=10)
    page.mouse.up()
    page.wait_for_timeout(500)


def node_types(page: Any) -> list[str]:
    return page.evaluate("() => window.app.graph._nodes.map(node => node.type)")


def open_example(page: Any, name: str, out: Path) -> None:
    """Open an example; the page knows every node and reports no problem."""
    load(page, name, read_example(name))
    unknown = page.evaluate(UNKNOWN_NODES)
    assert unknown == [], f"{name}: {unknown}"
    text = page.locator("body").inner_text()
    assert not re.search("issues? found|missing", text, re.IGNORECASE), f"{name}:\n{text}"
    assert sorted(node_types(page)) == sorted(node["type"] for node in read_example(name)["nodes"]), name
    page.screenshot(path=out / f"{name}.png")
    picture_of_nodes(page, ratio=1.5).resize((720, 480)).save(out / f"{name}.jpg", quality=85)
    picture_of_nodes(page).quantize(128).save(out / f"{name}_nodes.png", optimize=True)
    print(f"opened: {name}, {len(node_types(page))} nodes, none missing")


def load(page: Any, name: str, workflow: dict) -> None:
    page.evaluate("([name, flow]) => window.app.loadGraphData(flow, true, true, name)", [name, workflow])
    page.wait_for_timeout(1500)
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1500)


def picture_of_nodes(page: Any, ratio: float | None = None) -> Any:
    """A picture of the nodes alone, with margins that make it `ratio` times as wide as high."""
    from PIL import Image

    left, top, width, height = page.evaluate(BOUNDS_OF_NODES)
    full = max(width, height * (ratio or 0)), max(height, width / ratio if ratio else 0)
    corner = left - (full[0] - width) / 2, top - (full[1] - height) / 2
    clip = dict(zip(("x", "y", "width", "height"), (*corner, *full), strict=True))
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def run_example(page: Any, server: ComfyServer, name: str, out: Path) -> None:
    """Run an example on random weights: its pictures are noise, but every node runs."""
    workflow = read_example(name)
    for node in workflow["nodes"]:
        if node["type"] == "TripleCLIPLoader":  # T5-XXL has 5 billion weights
            node |= {"type": "CLIPLoader", "widgets_values": ["clip_l.safetensors", "sd3", "default"]}
        node["widgets_values"] = [64 if value == 1024 else value for value in node["widgets_values"]]
    load(page, name, workflow)
    before = set(server.get("history"))
    page.evaluate("() => window.app.queuePrompt(0)")
    run = wait_for_new_run(server, before)
    assert run["status"]["status_str"] == "success", run["status"]["messages"][-1]
    images = [image for output in run["outputs"].values() for image in output.get("images", [])]
    assert len(images) == RUNS[name], run["outputs"]
    page.wait_for_timeout(2000)
    page.screenshot(path=out / f"run_{name}.png")
    print(f"run: {name} on random weights, {len(images)} pictures")


def click_a_draft(page: Any, server: ComfyServer, out: Path) -> None:
    """Draw drafts of the small student's seeds, and finish the one that is clicked."""
    load(page, "seeds", read_example("first_steps"))
    page.evaluate(SEEDS_FOR_SAMPLER)
    for pictures in (0, 1):
        before = set(server.get("history"))
        if pictures:
            page.locator('button[data-pick="6"]').click()
        else:
            page.evaluate("() => window.app.queuePrompt(0)")
        run = wait_for_new_run(server, before)
        assert run["status"]["status_str"] == "success", run["status"]["messages"][-1]
        assert sum(len(output.get("images", [])) for output in run["outputs"].values()) == pictures, run["outputs"]
        page.locator("button[data-pick]").nth(15).wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=out / "run_seeds.png")
    print("seeds: 16 drafts, the sixth finished by a click")


def wait_for_new_run(server: ComfyServer, before: set[str]) -> dict:
    """History of the run that is not in `before`."""
    for _ in range(2 * TIMEOUT):
        if new := set(server.get("history")) - before:
            return server.get("history")[new.pop()]
        time.sleep(0.5)
    raise RuntimeError(f"the run did not finish:\n{server.log.read_text()[-3000:]}")


def check_titles(browser: Any, server: ComfyServer, language: str) -> None:
    """Every node shows the title of its language."""
    translations = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    page = open_page(browser, server, language)
    for name, texts in translations.items():
        title = page.evaluate("name => window.LiteGraph.createNode(name).title", name)
        assert title == texts["display_name"], f"{language}: {name} is shown as {title!r}"
    page.close()
    print(f"language: {language}, {len(translations)} titles")


if __name__ == "__main__":
    if sys.argv[2:] not in ([], ["nodes2"]) or len(sys.argv) < 2 or "COMFYUI_PATH" not in os.environ:
        sys.exit("usage: COMFYUI_PATH=/path/to/ComfyUI python tests/comfy_nodes/browser_walk.py OUT [nodes2]")
    main(Path(sys.argv[1]), nodes2=len(sys.argv) > 2)
