import json

import pytest
from torchvision.transforms.functional import to_pil_image

from dpdmd_pipeline.commands.score import main
from dpdmd_pipeline.shapes.world import NUM_MODES, caption, gallery


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures of three prompts by a teacher, a collapsed model and one between."""
    root = tmp_path_factory.mktemp("pictures")
    for name, step in (("teacher", 7), ("dmd", 0), ("ours", 1)):
        for prompt in range(3):
            folder = root / name / caption(prompt)
            folder.mkdir(parents=True)
            for seed in range(4):
                mode = (prompt + step * seed * (1 + (name == "ours") * (seed % 2))) % NUM_MODES
                to_pil_image(gallery()[prompt * NUM_MODES + mode]).save(folder / f"{seed}.png")
    return root


def test_a_folder_is_scored_and_the_file_holds_what_the_table_shows(folders, tmp_path, capsys):
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
    assert "Gap recovered" in capsys.readouterr().out


def test_what_is_missing_shows_in_table_and_exit_code(folders, tmp_path, capsys):
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


def test_answers_of_people_are_summarised(tmp_path, capsys):
    answer = {"id": "p/0", "question": "quality", "prompt": "a dog", "left": "a", "choice": "a"}
    result = {"format": 1, "arena": "x", "a": "ours", "b": "dmd", "participant": "1", "answers": [answer]}
    (tmp_path / "results.json").write_text(json.dumps(result))
    main([str(tmp_path / "results.json"), "--by", "human", "--json", str(tmp_path / "out.json")])
    assert "A is ours, B is dmd" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["questions"]["quality"]["counts"]["a"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--by", "beauty"], "beauty is no metric"),
        (["--by", "human,quality"], "ask for it alone"),
        (["--by", "quality", "--teacher", "x"], "needs both --teacher and --baseline"),
        (["--by", "quality", "--processes", "0"], "--processes 0 must be at least 1"),
        (["--by", "quality", "--duplicates-above", "2"], "must be a cosine"),
        (["--by", "quality", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["more", "--by", "quality"], "2 folders given"),
        (["--by", "quality.shapes"], "is no folder of pictures"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments, told, tmp_path):
    with pytest.raises((ValueError, OSError), match=told) as error:
        main([str(tmp_path / "nothing"), *arguments])
    assert "\n" not in str(error.value)


def test_help_describes_layouts_and_metrics(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for part in ("<prompt-id>_<seed>.png", "manifest.csv", "diversity.dino_v2", "alignment.geneval_vqa", "Exit code"):
        assert part in told
