"""One environment on this machine's card: memory of a cycle against its estimate, its seconds, its share of the card.

    python benchmarks/gpu_card.py --env sd35_lora_16gb --config sd35_medium --device cuda --batch 8
    python benchmarks/gpu_card.py --env sdxl_lora_16gb --config sdxl --device cuda --batch 8 --attention

Options are the environment's own; micro-batches are the largest that fit on the card, or into --card-gib. The share is
that of the rate of large matrix products: a backward pass counts two forward passes, or one if the weights are frozen.
With --attention the cycle is repeated with each of torch's attention kernels alone.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import timing
import workload
from dpdmd_pipeline.planning.cost import TeacherSettings, cycle_cost
from dpdmd_pipeline.planning.gpu import planned_memory, with_micro_batches
from dpdmd_pipeline.planning.memory import GIB, MemoryModel, memory_model
from dpdmd_pipeline.training.options import MICRO_BATCHES, TrainOptions
from record import record
from workload import Workload

KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def main(args: argparse.Namespace) -> None:
    """Run cycles of the environment's DP-DMD student and record what they took."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(args, Path(folder))
        options = work.options(**dict.fromkeys(MICRO_BATCHES, "auto"), card_gib=args.card_gib)
        if free := planned_memory(options):
            options = with_micro_batches(memory_model(work.teacher, work.backbone), options, free)
        micro = {name: getattr(options, name) for name in (*MICRO_BATCHES, "card_gib")}
        measured = _cycles(work, options, args)
    measured["settings"] = work.settings() | micro
    record(args.result or f"card_{args.env}", {**measured, **timing.conditions()})


def _cycles(work: Workload, options: TrainOptions, args: argparse.Namespace) -> dict[str, Any]:
    estimates, on_gpu = memory_model(work.teacher, work.backbone), work.device.type == "cuda"
    estimate = estimates.estimate(options.recipe(), options.execution())
    _, records = work.start(options)
    with closing(records):
        first = timing.measure(records.__next__).wall  # loads kernels
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cycles = timing.alternate({"cycle": records.__next__}, args.seconds, at_least=1)["cycle"]
        peaks = _peaks(estimate.total - estimate.reserved) if on_gpu else {}
        kernels = _attention(records.__next__, work, args.seconds) if args.attention else {}
    seconds, rate = timing.spread(timing.seconds(cycles, "wall")), matmul_rate(work)
    work_done = options.batch_size * _flops(work, options, estimates)
    return {
        "estimate": str(estimate),
        "estimate, GiB without what is reserved": (estimate.total - estimate.reserved) / GIB,
        **peaks,
        "seconds per cycle": seconds,
        "seconds of the first cycle": first,
        "TFLOP per cycle": work_done / 1e12,
        "TFLOP/s of a cycle": work_done / seconds["median"] / 1e12,
        "TFLOP/s of large matrix products": rate / 1e12,
        "share of the rate of matrix products": work_done / seconds["median"] / rate,
        **kernels,
    }


def _peaks(estimate: int) -> dict[str, float]:
    """Peak of torch's allocator, alone and as a share of the estimate."""
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    peaks = {"GiB allocated at most": allocated / GIB, "GiB reserved at most": reserved / GIB}
    return {**peaks, "allocated / estimate": allocated / estimate}


def _flops(work: Workload, options: TrainOptions, estimates: MemoryModel) -> float:
    """Floating-point operations of one sample's cycle."""
    passes = cycle_cost(options.recipe(), options.execution(), TeacherSettings(work.backbone.guidance_scale)).cycle
    backward = 1 if options.roles == "lora" else 2
    return estimates.forward_flops(options.recipe()) * (passes.forward + passes.repeated + backward * passes.backward)


def matmul_rate(work: Workload) -> float:
    """FLOP/s of large square matrix products in the networks' precision, the median of some."""
    size = 8192 if work.device.type == "cuda" else 512
    one, other = torch.randn(2, size, size, device=work.device).to(getattr(torch, work.backbone.dtype))
    durations = timing.alternate({"product": lambda: [one @ other for _ in range(10)]}, 2, at_least=3)["product"]
    return 10 * 2 * size**3 / timing.spread(timing.seconds(durations, "wall"))["median"]


def _attention(cycle: Any, work: Workload, budget: float) -> dict[str, Any]:
    """Seconds of a cycle with each attention kernel alone."""
    query = torch.randn(1, 4, 256, 64, device=work.device).to(getattr(torch, work.backbone.dtype))
    results: dict[str, Any] = {}
    for name in KERNELS:
        with sdpa_kernel(getattr(SDPBackend, name)):
            try:
                F.scaled_dot_product_attention(query, query, query)
            except RuntimeError as error:
                results[f"attention {name}"] = f"absent: {str(error).splitlines()[0]}"
                continue
            durations = timing.alternate({name: cycle}, budget / len(KERNELS), at_least=1)[name]
        results[f"attention {name}, seconds per cycle"] = timing.spread(timing.seconds(durations, "wall"))
    return results


if __name__ == "__main__":
    parser = workload.parser(__doc__)
    parser.add_argument("--card-gib", type=float, help="memory to plan for; default: what is free on the GPU")
    parser.add_argument("--attention", action="store_true", help="repeat the cycle with each attention kernel alone")
    main(parser.parse_args())
