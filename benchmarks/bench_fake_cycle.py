"""The estimate of a training's GPU memory against a cycle of the real loop on fake tensors; one picture at a time.

python benchmarks/bench_fake_cycle.py --env sdxl --config sdxl --roles lora
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timing
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.planning.memory import GIB, RESERVED, memory_model
from dpdmd_pipeline.training.options import MICRO_BATCHES, TrainOptions
from fake_cycle import peak_of_cycles, walk_on_cuda
from random_teacher import CONFIGS, make_weightless_teacher
from record import record
from workload import load_parameters


def main(args: argparse.Namespace) -> None:
    """Compare the estimate with the cycle, for both students of an environment."""
    measured: dict[str, float] = {}
    parameters = load_parameters(args.env)
    backbone, config = BackboneOptions(**parameters["backbone"]), CONFIGS[args.config]
    one_sample = {**dict.fromkeys(MICRO_BATCHES, 1), "batch_size": 2, "fake_score_turns": 1, "device": "cpu"}
    with TemporaryDirectory() as folder:
        teacher = Path(folder)
        make_weightless_teacher(teacher, few_blocks(config) if args.few else config)
        estimates = memory_model(teacher, backbone)
        for group in ("train", "train_dmd"):
            options = TrainOptions(**parameters[group] | one_sample | {"roles": args.roles})
            walk_on_cuda(teacher, backbone, options, [1])
            estimate = estimates.estimate(options.recipe(), options.execution())
            bytes_of_cycle = peak_of_cycles(teacher, backbone, options, [1])
            measured |= {
                f"{group}: cycle, GiB": bytes_of_cycle / GIB,
                f"{group}: estimate / cycle": (estimate.total - RESERVED) / bytes_of_cycle,
            }
    blocks = "_few" if args.few else ""
    record(f"fake_cycle_{args.config}_{args.roles}{blocks}", {**measured, **timing.conditions()})


def few_blocks(config: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The network with its real width and with few blocks."""
    few = {
        "transformer": {"num_layers": 2, "dual_attention_layers": (0,)},
        "unet": {"transformer_layers_per_block": [1, 1, 1]},
    }
    return {part: {**values, **few.get(part, {})} for part, values in config.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="sd35", help="environment of conf/")
    parser.add_argument("--config", choices=CONFIGS, default="sd35_medium", help="of its teacher")
    parser.add_argument("--roles", choices=["full", "lora"], default="full")
    parser.add_argument("--few", action="store_true", help="with few blocks, in a minute")
    main(parser.parse_args())
