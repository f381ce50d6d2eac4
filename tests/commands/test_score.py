import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from tests.commands.cli import score as main
from tests.raising import refuses
from torchvision.transforms.functional import to_pil_image

from dpdmd_pipeline.commands.score import DEFAULT_WEIGHTS
from dpdmd_pipeline.commands.score_pictures import PROJECT
from dpdmd_pipeline.scoring.presets import LEFT_OUT
from dpdmd_pipeline.scoring.scores import Scores
from dpdmd_pipeline.shapes.world import NUM_MODES, caption, gallery


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures of three prompts by a teacher, a collapsed model and one in between."""
    root = tmp_path_factory.mktemp("pictures")
    for name, step in (("teacher", 7), ("dmd", 0), ("ours", 1)):
        for prompt in range(3):
            folder = root / name / caption(prompt)
            folder.mkdir(parents=True)
            for seed in range(4):
                mode = (prompt + step * seed * (1 + (name == "ours") * (seed % 2))) % NUM_MODES
                to_pil_image(gallery()[prompt * NUM_MODES + mode]).save(folder / f"{seed}.png")
    return root


def test_the_file_has_the_figures_of_the_table(folders, tmp_path, capsys):
    out = tmp_path / "scores.json"
    main([str(folders / "teacher"), "--by", "diversity.pixels,quality.shapes,diversity.shapes", "--json", str(out)])
    table, record = capsys.readouterr().out, json.loads(out.read_text())
    assert record["figures"]["quality.shapes.valid"]["value"] == 1
    assert record["figures"]["diversity.shapes.effective_modes"]["n"]["pictures"] == 12
    for name, figure in record["figures"].items():
        assert name in table and f"{figure['value']:.4g}" in table and figure["preset"] in table


def test_the_gap_is_shown_with_teacher_and_baseline(folders, tmp_path, capsys):
    out = tmp_path / "scores.json"
    others = ["--teacher", str(folders / "teacher"), "--baseline", str(folders / "dmd")]
    main([str(folders / "ours"), "--by", "diversity.pixels,diversity.shapes", *others, "--json", str(out)])
    gaps = json.loads(out.read_text())["gap_recovered"]
    assert set(gaps) >= {"diversity.pixels.mean_distance", "diversity.shapes.effective_modes"}
    assert all(gap["value"] > 0 for gap in gaps.values())
    table = capsys.readouterr().out
    assert all(f"{name}: {gap['value']:.4g}" in table for name, gap in gaps.items())


def test_missing_metrics_show_in_table_and_exit_code(folders, tmp_path, capsys):
    weights = tmp_path / "weights"
    with pytest.raises(SystemExit) as ended:
        main([str(folders / "ours"), "--by", "diversity", "--weights", str(weights)])
    assert ended.value.code == 3
    table = capsys.readouterr().out
    assert "diversity.pixels.mean_distance" in table
    assert f"hf download facebook/dinov2-base --local-dir {weights}/dinov2-base" in table


def test_a_damaged_picture_shows_in_the_exit_code(folders, tmp_path, capsys):
    image = next((folders / "ours").glob("*/0.png"))
    for seed in range(2):
        (tmp_path / f"0_{seed}.png").write_bytes(image.read_bytes())
    (tmp_path / "0_2.png").touch()
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--by", "diversity.pixels"])
    assert ended.value.code == 3 and "1 x empty file: " in capsys.readouterr().out


def test_a_broken_link_is_counted_and_shows_in_the_exit_code(folders, tmp_path, capsys):
    (ours,) = copied(folders, tmp_path, "ours")
    (ours / caption(0) / "4.png").symlink_to("nowhere.png")
    assert run(ours, "--by", "diversity.pixels") == 3
    assert "1 x no such file: " in capsys.readouterr().out


def run(*arguments):
    """Run the command and return its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code
    return 0


def copied(folders, tmp_path, *names):
    """Copies of folders that a test may change."""
    return [shutil.copytree(folders / name, tmp_path / name) for name in names]


def test_the_threshold_of_near_duplicates_is_in_table_and_file(folders, tmp_path, capsys):
    out = tmp_path / "scores.json"
    options = ["--by", "diversity.clip_shapes", "--json", out]
    assert run(folders / "ours", *options, "--reference", folders / "teacher") == 0
    record = json.loads(out.read_text())
    assert record["libraries"]["torch"] and len(record["weights"]["diversity.clip_shapes"]["shapes_clip"]) == 64
    figure = record["figures"]["diversity.clip_shapes.duplicate_rate"]
    assert figure["threshold_from"] == "reference"
    assert f" {figure['threshold']:.7g}," in capsys.readouterr().out
    assert run(folders / "ours", *options, "--duplicates-above", "0.9") == 0
    figure = json.loads(out.read_text())["figures"]["diversity.clip_shapes.duplicate_rate"]
    assert (figure["threshold"], figure["threshold_from"]) == (0.9, "user")


def test_stray_files_and_faults_of_the_reference_are_reported(folders, tmp_path, capsys):
    (reference,) = copied(folders, tmp_path, "teacher")
    (reference / "notes.md").write_text("")
    next(reference.glob("*/0.png")).write_bytes(b"")
    assert run(folders / "ours", "--by", "diversity.clip_shapes", "--reference", reference) == 3
    table = capsys.readouterr().out
    assert any(f"{reference} (the reference)" in line and "notes.md" in line for line in table.splitlines())
    assert f"1 x empty file, in the reference: {reference}" in table


def test_an_empty_folder_of_a_prompt_shows_in_the_exit_code(folders, tmp_path, capsys):
    (ours,) = copied(folders, tmp_path, "ours")
    (ours / "a red star").mkdir()
    assert run(ours, "--by", "diversity.pixels") == 3
    assert "1 x prompt with no picture: a red star" in capsys.readouterr().out


def test_a_gap_counts_its_prompts_and_notes_the_others(folders, tmp_path, capsys):
    ours, dmd = copied(folders, tmp_path, "ours", "dmd")
    next(ours.glob("*/0.png")).unlink()
    shutil.rmtree(dmd / caption(2))
    by = ["--by", "diversity.pixels,diversity.clip_shapes"]
    assert run(ours, *by, "--teacher", folders / "teacher", "--baseline", dmd, "--json", tmp_path / "out.json") == 3
    table, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert any("2 of 3 prompts" in note for note in record["notes"])
    assert record["gap_recovered"]["diversity.pixels.mean_distance"]["prompts"] == 2
    assert record["gap_recovered"]["diversity.clip_shapes.vendi"]["prompts"] == 1
    (note,) = record["gap_notes"]
    assert "diversity.clip_shapes.vendi" in note and "1 of 2 prompts" in note
    assert note in table and "(prompts: 2)" in table


def test_an_impossible_gap_is_refused_before_anything_is_measured(folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders / "dmd" / caption(0), other / "something else")
    gap = ["--teacher", folders / "teacher", "--baseline"]
    with refuses(ValueError, f"{other} ('something else'"):
        run(folders / "ours", "--by", "diversity.pixels", *gap, other)
    with refuses(ValueError, "diversity", "--by"):
        run(folders / "ours", "--by", "quality.shapes", *gap, folders / "dmd")


def test_flat_pictures_without_prompts_have_diversity_and_no_alignment(folders, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for seed in range(4):
        shutil.copy(folders / "ours" / caption(0) / f"{seed}.png", flat / f"ComfyUI_{seed:05d}_.png")
    by = ["--by", "diversity.clip_shapes,alignment.clip_shapes,quality.shapes", "--duplicates-above", "0.99"]
    assert run(flat, *by) == 3
    table = capsys.readouterr().out
    assert "diversity.clip_shapes.vendi" in table and "alignment.clip_shapes.score" not in table
    assert re.search("quality.shapes, alignment.clip_shapes: .*--prompts", table)
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(f"id,text\nComfyUI,{caption(0)}\n")
    assert run(flat, *by, "--prompts", prompts) == 0
    assert "alignment.clip_shapes.score" in capsys.readouterr().out
    with refuses(ValueError, "'ComfyUI'", "prompts.txt", "0 to 0"):
        (tmp_path / "prompts.txt").write_text("a red circle\n")
        run(flat, *by, "--prompts", tmp_path / "prompts.txt")


@pytest.fixture
def scored(monkeypatch):
    """Sets of each call of `score`, which then measures nothing."""
    calls = []

    def score(sets, *_):
        calls.append(sets)
        return Scores(len(sets), sum(map(len, sets)))

    monkeypatch.setattr("dpdmd_pipeline.commands.score_pictures.score", score)
    return calls


@pytest.mark.parametrize("by", ["distribution,quality", "quality.topiq"])
@pytest.mark.parametrize("name", ["{:05d}.png", "IMG {} (2).jpg", "img_{:05d}.png"])
def test_metrics_without_prompts_and_seeds_accept_any_names(tmp_path, scored, capsys, name, by):
    names = sorted(name.format(number) for number in range(120))
    for file in names:
        (tmp_path / file).touch()
    assert run(tmp_path, "--by", by) == 0
    assert [one.id for one in scored[0]] == names and {len(one) for one in scored[0]} == {1}
    assert f"names in {tmp_path} " in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["diversity.pixels", "quality.shapes", "alignment.clip_score"])
def test_metrics_that_need_prompts_or_seeds_refuse_names_without_them(tmp_path, metric):
    (tmp_path / "00000.png").touch()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/00000.png .*<prompt-id>_<seed>.*, or leave out {metric}:"):
        run(tmp_path, "--by", f"quality.topiq,{metric}")


def test_the_reference_needs_no_texts(folders, tmp_path):
    (tmp_path / "real").mkdir()
    for seed in range(4):
        shutil.copy(folders / "teacher" / caption(0) / f"{seed}.png", tmp_path / "real" / f"photo_{seed}.png")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("id,text\n" + "".join(f"{caption(number)},{caption(number)}\n" for number in range(3)))
    options = ["--reference", tmp_path / "real", "--prompts", prompts]
    assert run(folders / "ours", "--by", "diversity.clip_shapes", *options) == 0


def test_the_project_s_weights_are_used_from_any_folder(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(folders / "ours", "--by", "alignment.clip_shapes") == 0
    assert run(folders / "ours", "--by", "diversity.dino_v3") == 3
    assert f" {PROJECT / DEFAULT_WEIGHTS}/dinov3-vitl16;" in capsys.readouterr().out
    monkeypatch.setattr("dpdmd_pipeline.commands.score_pictures.PROJECT", tmp_path / "site-packages")
    assert run(folders / "ours", "--by", "alignment.clip_shapes") == 3
    assert f" {tmp_path}/data/06_models/shapes_clip;" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["--by", "diversity.pixels,diversity.shapes,quality.shapes"]])
def test_a_reader_that_closes_its_pipe_is_no_error(folders, tmp_path, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    out = ["--json", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "dpdmd_pipeline", "score", str(folders / "ours"), *arguments, *out]
    with os.fdopen(writing, "w") as pipe:
        ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == (arguments == ["--help"]) and ended.stderr == ""
    assert (tmp_path / "out.json").exists() == (arguments != ["--help"])


def test_only_the_file_that_the_user_names_is_written(folders, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "deep" / "o.json")
    (tmp_path / "deep" / "o.json.tmp").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link.json", "pipe"):
        main([str(folders / "ours"), "--by", "quality.shapes", "--json", str(tmp_path / name)])
    record = json.loads((tmp_path / "deep" / "o.json").read_text())
    assert (tmp_path / "link.json").is_symlink() and json.loads(os.read(reading, 1 << 16)) == record
    os.close(reading)
    assert {path.name for path in tmp_path.rglob("*")} == {"deep", "link.json", "o.json", "o.json.tmp", "pipe"}
    assert (tmp_path / "deep" / "o.json.tmp").read_text() == "precious"


@pytest.mark.parametrize("by", ["quality.shapes", "human"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, by):
    with pytest.raises(OSError, match="^--json /sys/x.json: .*/sys "):
        run(tmp_path / "nothing", "--by", by, "--json", "/sys/x.json")


def test_a_file_name_outside_utf_8_costs_neither_table_nor_file(folders, tmp_path):
    (ours,) = copied(folders, tmp_path, "ours")
    (ours / caption(0) / os.fsdecode(b"x\xff.png")).touch()
    command = [sys.executable, "-m", "dpdmd_pipeline", "score", str(ours), "--by", "quality.shapes"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    more = {"capture_output": True, "text": True, "timeout": 120}
    ended = subprocess.run([*command, "--json", str(tmp_path / "o.json")], env=strict, **more)
    assert ended.returncode == 3 and "x\\udcff.png" in ended.stdout and not ended.stderr
    assert json.loads((tmp_path / "o.json").read_text())["faults"]["empty file"]["count"] == 1


def test_answers_of_people_are_summarised(tmp_path, capsys):
    answer = {"id": "p/0", "question": "quality", "prompt": "a dog", "left": "a", "choice": "a"}
    page = {"format": 1, "arena": "x", "a": "ours", "b": "dmd", "questions": 24}
    result = page | {"participant": "1", "answers": [answer]}
    (tmp_path / "results.json").write_text(json.dumps(result))
    main([str(tmp_path / "results.json"), "--by", "human", "--json", str(tmp_path / "out.json")])
    text, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert all(part in text for part in ("ours", "dmd", "1 of 24"))
    assert record["questions"]["quality"]["counts"]["a"] == 1
    assert record["unfinished"] == {"1": {"answers": 1, "questions": 24}}


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--by", "beauty"], "beauty.*diversity.pixels"),
        (["--by", ""], "--by ''"),
        (["--by", ","], "--by ','"),
        (["--by", "HPSv3"], "HPSv3 .*transformers 4.45.2"),
        (["--by", "quality.shapes", "--json", "tests"], "--json tests "),
        (["--by", "human", "--json", "tests"], "--json tests "),
        (["--by", "human,quality"], "--by human"),
        (["--by", "quality", "--teacher", "x"], "--teacher .*--baseline"),
        (["--by", "quality", "--processes", "0"], r"--processes 0 .*\b1\b"),
        (["--by", "quality", "--processes", "1" + "0" * 12], r"--processes 10{12} .*\b1024\b"),
        (["--by", "quality", "--batch-size", "1" + "0" * 12], r"--batch-size 10{12} .*\b65536\b"),
        (["--by", "quality", "--seed", "9" * 20], f"--seed 9{{20}} .*{2**63 - 1}"),
        (["--by", "quality", "--duplicates-above", "2"], r"--duplicates-above 2\.0 .*-1 to 1"),
        (["--by", "quality", "--json", "nowhere/x.json"], "--json nowhere/x.json.*/nowhere "),
        (["more", "--by", "quality"], "2 folders"),
        (["--by", "quality.shapes"], "/nothing "),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(arguments, facts, tmp_path):
    with pytest.raises((ValueError, OSError), match=facts) as refused:
        main([str(tmp_path / "nothing"), *arguments])
    assert "\n" not in str(refused.value)


def test_missing_prompts_and_other_encodings_are_named(folders, tmp_path):
    with pytest.raises(OSError, match=f"^{tmp_path}/nope.txt "):
        run(folders / "ours", "--by", "diversity.pixels", "--prompts", tmp_path / "nope.txt")
    (ours,) = copied(folders, tmp_path, "ours")
    (ours / caption(0) / "prompt.txt").write_bytes("café".encode("latin-1"))
    with refuses(ValueError, f"{caption(0)}/prompt.txt", "UTF-8"):
        run(ours, "--by", "diversity.pixels")


def test_help_describes_layouts_and_metrics(capsys):
    main(["--help"])
    text = capsys.readouterr().out
    for part in ("<prompt-id>_<seed>.png", "manifest.csv", "diversity.dino_v2", "alignment.geneval_vqa", "Exit code:"):
        assert part in text
    for name, reason in LEFT_OUT.items():
        assert name in text and reason in text
