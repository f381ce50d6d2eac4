"""How long prompts take from a file of lines to the records on disk, and the memory that needs.

Each size runs in a process of its own, whose highest memory is then that run's; "nothing" is the imports alone.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from record import record

SIZES = (10_000, 1_000_000)  # lines
NOTHING = 0
EVERY = {"empty": 100, "repeated": 50, "long": 1000, "unicode": 20}  # one line in so many is such a line
LONG = 1400  # characters
ONE = {"processes": 1, "machines": 1, "rendezvous": None}
WORDS = ("a", "the", "of", "on", "with", "small", "old", "quiet", "red", "blue", "wooden", "street", "lamp", "dog")
FOREIGN = ("Straße im Nebel", "une forêt", "cafe\N{COMBINING ACUTE ACCENT} terrace", "雨の夜の街", "🦊 in снегу")


def make_lines(count: int, seed: int = 0) -> Iterator[str]:
    """Lines like captions, the odd ones spread among them."""
    words = random.Random(seed)
    for number in range(1, count + 1):
        caption = f"{' '.join(words.choices(WORDS, k=words.randint(6, 20)))}, take {number}"
        if number % EVERY["empty"] == 0:
            yield ""
        elif number % EVERY["repeated"] == 1:
            yield f"{FOREIGN[0]}, a red dog on a chair"
        elif number % EVERY["long"] == 2:
            yield f"{caption} {' '.join(words.choices(WORDS, k=LONG // 2))}"[:LONG]
        elif number % EVERY["unicode"] == 3:
            yield f"{words.choice(FOREIGN)}, {caption}"
        else:
            yield caption


def run(folder: Path, count: int) -> dict[str, float]:
    """Clean and save in this process, as the stage does: seconds, and bytes of memory at the highest."""
    # imported here only: a process counts its parent's memory at its start as its own, so the parent stays small
    from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
    from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts
    from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions

    kept = 0
    begun = time.perf_counter()
    if count != NOTHING:
        raw = PromptFileDataset(filepath=str(folder / "prompts.txt")).load()
        options = PromptsOptions(eval_share=0.01, batch_size=1, shard_size=1, device="cpu", launch=ONE)
        prompts, report = clean_prompts(raw, raw, options)
        PromptFileDataset(filepath=str(folder / "prompts.jsonl")).save(prompts)
        kept = report["counts"]["prompts"]
    seconds = time.perf_counter() - begun
    scale = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "kept": kept}


def run_apart(count: int) -> dict[str, float]:
    """`run` in a fresh process, on a file of so many lines."""
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "prompts.txt").open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in make_lines(count))
        size = (Path(folder) / "prompts.txt").stat().st_size
        command = [sys.executable, __file__, folder, str(count)]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            raise RuntimeError(f"{count} lines ended with {found.returncode}: {found.stderr[-2000:]}")
        return {**json.loads(found.stdout.splitlines()[-1]), "size": size}


def main() -> None:
    """Measure nothing, then each size."""
    measured = {"nothing, highest memory, MiB": run_apart(NOTHING)["memory"] / 2**20}
    for count in SIZES:
        found = run_apart(count)
        measured |= {
            f"{count} lines, file, MiB": found["size"] / 2**20,
            f"{count} lines, unique prompts kept": found["kept"],
            f"{count} lines, seconds": found["seconds"],
            f"{count} lines, highest memory, MiB": found["memory"] / 2**20,
        }
    record("prompts", measured)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
