"""Runs the whole line once at full size on a CPU: real configurations, random weights, adapters, 256 pixels.

    python benchmarks/full_size_cpu.py --family sdxl --folder /big/disk   # SDXL: 30 GB of disk
    python benchmarks/full_size_cpu.py --family sd3 --folder /big/disk    # SD3.5-Medium with its T5: 50 GB

One `kedro run` goes through the stages from prompts to export, in a copy of the project with an environment made from
the one for cards of 16 GB. Each stage does as little as it can: one prompt, two sampling steps, one cycle and two
pictures. diffusers then loads the export and draws with it. The numbers say that everything fits together, and in how
much memory; times are those of a CPU. Run it again with the same folder, and it goes on where it stopped.

Two things differ from a user's run. Products in half precision are computed in float32 and rounded (Float32Products),
since most CPUs have no kernels for them. The evaluation draws two pictures at once, not 16 (PICTURES).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import yaml
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import commands
import timing
from random_teacher import CONFIGS, make_random_teacher
from record import record

GIB = 2**30
ENVIRONMENT = "full_size"
PICTURES = 2  # of the one evaluation prompt
BASIS = {"sd3": ("sd35_medium", "sd35_lora_16gb"), "sdxl": ("sdxl", "sdxl_lora_16gb")}  # configuration, environment
ON_CPU = {"device": "cpu"}
ONE_CYCLE = ON_CPU | {"max_steps": 1, "batch_size": 1, "num_steps": 2, "fake_score_turns": 1}
ONE_CYCLE |= {"watch": {"every": 0}, "card_gib": 14.9}  # a card of 16 GB, so that its memory is estimated
CHANGES: dict[str, dict[str, Any]] = {
    "backbone": {"resolution": 256, "num_steps": 2},
    "prompts": ON_CPU,
    "anchors": ON_CPU | {"anchor_levels": [{"steps": 1}]},
    "train": ONE_CYCLE,
    "evaluate": ON_CPU | {"images_per_prompt": PICTURES, "teacher_start": None},
}
PROMPTS = {"raw_prompts": "a red fox on a mossy stone\n", "raw_eval_prompts": "a bowl of oranges\n"}


class Float32Products(TorchDispatchMode):
    """Compute products of half-precision tensors in float32 and round the results, as the hardware of a GPU does."""

    _SUMS = {  # second outputs of attention, which stay in float32
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    }
    _PRODUCTS = _SUMS | {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
        torch.ops.aten.linear,
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten.baddbmm,
        torch.ops.aten.convolution,
        torch.ops.aten.convolution_backward,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        halves = [value.dtype for value in tree_leaves((args, kwargs)) if _is_half(value)]
        if func.overloadpacket not in self._PRODUCTS or not halves:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda value: value.float() if _is_half(value) else value, (args, kwargs))
        result = func(*args, **kwargs)
        if func.overloadpacket in self._SUMS:
            return result[0].to(halves[0]), *result[1:]
        return tree_map(lambda value: value.to(halves[0]) if isinstance(value, torch.Tensor) else value, result)


def _is_half(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu" and value.itemsize == 2


class Sample(NamedTuple):
    """Memory of a process and its children at a time, in bytes."""

    time: float
    own: int  # without mapped files, whose pages can be dropped
    resident: int


def main(args: argparse.Namespace) -> None:
    """Run the line, draw with its export, and record both."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        name, basis = BASIS[args.family]
        name += "_tiny" if args.tiny else ""
        teacher, start = folder / name, time.perf_counter()
        if not (teacher / "complete").is_file():
            make_random_teacher(teacher, CONFIGS[name], torch.bfloat16)
            (teacher / "complete").touch()
        measured = {"seconds of writing the teacher": time.perf_counter() - start}
        project = folder / f"{args.family}_line" / "project"
        if not project.exists():
            commands.copy_project(str(project.parent))
        write_environment(project, basis, teacher)
        measured |= run_line(project) | {"GB on the disk": sizes(project, teacher)}
        measured |= draw_with_diffusers(project, teacher)
    about = {"changes of the environment": CHANGES, "pixels": CHANGES["backbone"]["resolution"], "environment": basis}
    record(args.result or f"full_size_cpu_{name}", {**measured, **about, **timing.conditions()})


def write_environment(project: Path, basis: str, teacher: Path) -> None:
    """Write conf/full_size, which changes another environment."""
    source, target = project / "conf" / basis, project / "conf" / ENVIRONMENT
    target.mkdir(exist_ok=True)
    files = {key: f"data/01_raw/{ENVIRONMENT}_{key}.txt" for key in PROMPTS}
    for key, file in files.items():
        (project / file).write_text(PROMPTS[key])
    about = {"folder": ENVIRONMENT, "teacher": f"conf/{ENVIRONMENT}/globals.yml", "teacher_model": str(teacher)}
    (target / "globals.yml").write_text(yaml.safe_dump(files | about | {"extends": "hub"}))
    parameters = OmegaConf.merge(OmegaConf.load(source / "parameters.yml"), CHANGES)
    OmegaConf.save(parameters, target / "parameters.yml")


# ---- the line


def run_line(project: Path) -> dict[str, Any]:
    """Seconds and memory of every node, and the lines that Kedro told before the first."""
    log = project / "logs/dpdmd.log"
    log.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--line"]
    environment = commands.environment() | {"PYTHONPATH": str(project / "src")}  # the copy, which nobody edits
    process = subprocess.Popen(command, cwd=project, env=environment)
    samples = watch(process)
    if process.returncode:
        raise SystemExit(f"Error: the line ended with {process.returncode}: see {log}")
    lines = [Line.parse(text) for text in log.read_text().splitlines() if text[:2] == "20"]
    starts = [(line.time, line.text.split(":")[1].strip()) for line in lines if line.text.startswith("Running node: ")]
    own_lines = [line.text for line in lines if line.time < starts[0][0] and line.is_own]
    ends = [*(start for start, _ in starts[1:]), samples[-1].time]
    nodes = {"before the first node": _peaks(samples, samples[0].time, starts[0][0])}
    nodes |= {name: _peaks(samples, start, end) for (start, name), end in zip(starts, ends, strict=True)}
    return {
        "seconds of the line": samples[-1].time - samples[0].time,
        "peak GiB": max(sample.own for sample in samples) / GIB,
        "peak GiB with mapped files": max(sample.resident for sample in samples) / GIB,
        "nodes": {name: values for name, values in nodes.items() if values["seconds"] >= 1},
        "told before the first node": own_lines,
    }


class Line(NamedTuple):
    """A line of the log file."""

    time: float
    is_own: bool  # of this package, for the screen
    text: str

    @classmethod
    def parse(cls, text: str) -> Line:
        day, clock, _, level, logger, *words = text.split(" ")
        moment = datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S,%f").timestamp()
        return cls(moment, level != "DEBUG" and logger.startswith("dpdmd_pipeline"), " ".join(words))


def watch(process: subprocess.Popen) -> list[Sample]:
    """Memory of a process and its children until it ends, five times a second."""
    samples, tree = [], psutil.Process(process.pid)
    while process.poll() is None:
        own = resident = 0
        try:
            for each in [tree, *tree.children(recursive=True)]:
                memory = each.memory_info()
                own, resident = own + memory.rss - memory.shared, resident + memory.rss
        except psutil.NoSuchProcess:
            continue
        samples.append(Sample(time.time(), own, resident))
        time.sleep(0.2)
    return samples


def _peaks(samples: list[Sample], start: float, end: float) -> dict[str, float]:
    inside = [sample.own for sample in samples if start <= sample.time < end]
    return {"seconds": end - start, "peak GiB": max(inside, default=0) / GIB}


def line() -> None:
    """Run Kedro in this process, in the working folder."""
    from kedro.framework.cli.cli import main as kedro

    from dpdmd_pipeline.pipelines.evaluate import sampling

    sampling.ON_CPU = PICTURES
    sys.argv = ["kedro", "run", "--env", ENVIRONMENT, "--pipelines", "distill,export"]
    with Float32Products():
        kedro()


def sizes(project: Path, teacher: Path) -> dict[str, float]:
    """GB of the teacher and of everything that the run wrote."""
    from dpdmd_pipeline.publishing import folder_size

    folders = {
        path.name: path for layer in (5, 6, 7) for path in (project / "data").glob(f"0{layer}_*/{ENVIRONMENT}/*")
    }
    return {name: folder_size(path) / 1e9 for name, path in {"teacher": teacher, **folders}.items()}


# ---- the export


def draw_with_diffusers(project: Path, teacher: Path) -> dict[str, Any]:
    """Load the exported pipeline in a process without this package, and draw one picture as the card says."""
    from dpdmd_pipeline.backbones.student_file import load_header
    from dpdmd_pipeline.exporting.schedulers import diffusers_use

    models = project / "data/06_models" / ENVIRONMENT
    use = diffusers_use(load_header(models / "student"), teacher)
    job = {"folder": str(models / "export/diffusers"), "load": use.load, "call": use.call}
    command = [sys.executable, str(Path(__file__).resolve()), "--draw", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    samples: list[Sample] = []
    watcher = threading.Thread(target=lambda: samples.extend(watch(process)))
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise SystemExit("Error: diffusers could not draw with the export")
    picture = json.loads(output.splitlines()[-1])
    return {f"diffusers draws: {key}": value for key, value in picture.items()} | {
        "diffusers draws: peak GiB": max(sample.own for sample in samples) / GIB,
        "diffusers draws: seconds": samples[-1].time - samples[0].time,
    }


def draw(folder: str, load: dict[str, Any], call: dict[str, Any]) -> None:
    """Draw one picture with an exported pipeline, text encoders first, then the network, to hold one at a time."""
    from diffusers import DiffusionPipeline

    def part(*left_out: str) -> Any:
        absent = {name: None for name in names if name.startswith(left_out)}
        return DiffusionPipeline.from_pretrained(folder, **(load | absent), dtype=torch.bfloat16)

    names = json.loads((Path(folder) / "model_index.json").read_text())
    with Float32Products(), torch.no_grad():
        texts = part("transformer", "unet", "vae")
        given = {"prompt_2": None, "prompt_3": None, "max_sequence_length": call.get("max_sequence_length")}
        known = {name: given[name] for name in given if name in inspect.signature(texts.encode_prompt).parameters}
        embeds, _, pooled, _ = texts.encode_prompt("a lighthouse", do_classifier_free_guidance=False, **known)
        del texts
        pipe = part("text_encoder", "tokenizer")
        generator = torch.Generator().manual_seed(0)
        prompt = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        image = pipe(**prompt, **call, generator=generator, output_type="pt").images[0].float()
    if "dpdmd_pipeline" in sys.modules or not image.isfinite().all():
        raise SystemExit("Error: the picture is not finite, or it was not drawn by diffusers alone")
    print(json.dumps({"shape": [*image.shape], "standard deviation": float(image.std())}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=BASIS, default="sdxl")
    parser.add_argument("--folder", type=Path, help="of the teacher and the results; default: a temporary one")
    parser.add_argument("--tiny", action="store_true", help="small networks of the same classes")
    parser.add_argument("--result", help="name of the result file")
    parser.add_argument("--line", action="store_true", help="internal: run Kedro in this folder")
    parser.add_argument("--draw", help="internal: draw with an export")
    arguments = parser.parse_args()
    if arguments.line:
        line()
    elif arguments.draw:
        draw(**json.loads(arguments.draw))
    else:
        main(arguments)
