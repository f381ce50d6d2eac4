"""`sample`: draw pictures with an exported student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def sample(
    prompts: Annotated[list[str], typer.Argument(help="prompts; each is drawn from every seed")],
    student: Annotated[Path, typer.Option(help="diffusers folder, ComfyUI file or LoRA file of an export")] = Path(
        "data/06_models/export/diffusers"
    ),
    teacher: Annotated[Path | None, typer.Option(help="the teacher's folder, needed with a file")] = None,
    out: Annotated[Path, typer.Option(help="folder of the pictures: out/<prompt>/<seed>.png")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="the first seed")] = 0,
    count: Annotated[int, typer.Option(min=1, help="seeds per prompt")] = 4,
    size: Annotated[tuple[int, int] | None, typer.Option(help="height and width; default: the training's")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 8,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "float32",
) -> None:
    """Draw pictures with an exported student.

    `score` and `arena` read the folder that it writes.
    """
    if not student.exists():
        raise FileNotFoundError(f"--student {student} does not exist: give an export, or make one by `make distill`")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is not an empty folder: choose another")
    from PIL.Image import fromarray

    from dpdmd_pipeline.datasets.picture_folder import PictureFolderDataset
    from dpdmd_pipeline.exporting.sample import sample as draw

    texts, seeds = list(dict.fromkeys(prompts)), [seed + number for number in range(count)]
    pairs = [(text, number) for text in texts for number in seeds]
    execution = {"size": size, "batch_size": batch_size, "device": device, "dtype": dtype}
    images = draw(student, *zip(*pairs, strict=True), teacher=teacher, **execution)
    rows = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = dict(zip(pairs, map(fromarray, rows), strict=True))
    makers = {text: lambda text=text: {number: pictures[text, number] for number in seeds} for text in texts}
    PictureFolderDataset(filepath=str(out)).save(makers)
    print(f"{out}: {len(pictures)} pictures")
