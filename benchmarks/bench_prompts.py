"""Time and memory of the prompts stage, from a file of lines to the records on disk.

Each size runs in its own process, so that the peak memory is that run's; "nothing" is the imports alone.
"""

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import commands
from record import record

SIZES = (10_000, 1_000_000)  # lines
NOTHING = 0
PERIODS = {"empty": 100, "repeated": 50, "long": 1000, "unicode": 20}  # every so many lines there is such a line
LONG = 1400  # characters
ONE_PROCESS = {"processes": 1, "machines": 1, "rendezvous": None}
WORDS = ("a", "the", "of", "on", "with", "small", "old", "quiet", "red", "blue", "wooden", "street", "lamp", "dog")
FOREIGN = ("Straße im Nebel", "une forêt", "cafe\N{COMBINING ACUTE ACCENT} terrace", "雨の夜の街", "🦊 in снегу")


def make_lines(count: int, seed: int = 0) -> Iterator[str]:
    """Caption-like lines with unusual ones spread among them."""
    generator = random.Random(seed)
    for number in range(1, count + 1):
        caption = f"{' '.join(generator.choices(WORDS, k=generator.randint(6, 20)))}, take {number}"
        if number % PERIODS["empty"] == 0:
            yield ""
        elif number % PERIODS["repeated"] == 1:
            yield f"{FOREIGN[0]}, a red dog on a chair"
        elif number % PERIODS["long"] == 2:
            yield f"{caption} {' '.join(generator.choices(WORDS, k=LONG // 2))}"[:LONG]
        elif number % PERIODS["unicode"] == 3:
            yield f"{generator.choice(FOREIGN)}, {caption}"
        else:
            yield caption


def clean(folder: Path, count: int) -> dict[str, float]:
    """Clean and save the prompts in this process, like the stage: seconds, and peak memory in bytes."""
    # imported here, so that the parent stays small: a process inherits its parent's peak memory
    from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
    from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts
    from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions

    unique = 0
    start = time.perf_counter()
    if count != NOTHING:
        raw = PromptFileDataset(filepath=str(folder / "prompts.txt")).load()
        options = PromptsOptions(
            take=None, seed=0, eval_share=0.01, batch_size=1, shard_size=1, device="cpu", launch=ONE_PROCESS
        )
        prompts, report = clean_prompts(raw, raw, options)
        PromptFileDataset(filepath=str(folder / "prompts.jsonl")).save(prompts)
        unique = report["counts"]["prompts"]
    seconds = time.perf_counter() - start
    scale = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {"seconds": seconds, "memory": memory, "unique": unique}


def clean_in_process(count: int) -> dict[str, float]:
    """`clean` in a fresh process, on a new file of `count` lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.txt"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in make_lines(count))
        output = commands.run([sys.executable, __file__, folder, str(count)])
        return {**json.loads(output.splitlines()[-1]), "size": path.stat().st_size}


def main() -> None:
    """Measure the imports alone, then each size."""
    measured = {"nothing, highest memory, MiB": clean_in_process(NOTHING)["memory"] / 2**20}
    for count in SIZES:
        result = clean_in_process(count)
        measured |= {
            f"{count} lines, file, MiB": result["size"] / 2**20,
            f"{count} lines, unique prompts kept": result["unique"],
            f"{count} lines, seconds": result["seconds"],
            f"{count} lines, highest memory, MiB": result["memory"] / 2**20,
        }
    record("prompts", measured)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(clean(Path(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
