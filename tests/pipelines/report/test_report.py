"""The page shows its inputs, states the result, and needs no other file."""

import base64
import copy
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import rich
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner
from kedro_datasets.text import TextDataset
from PIL import Image
from tests.pipelines.report.conftest import (
    COLOURS,
    HOSTILE,
    OPTIONS,
    ROOT,
    made_gap,
    made_inputs,
    made_metrics,
    made_scores,
    made_student,
    measured,
    without_reader,
)
from tests.raising import refuses

from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.errors import MissingInputError, StageError
from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions
from dpdmd_pipeline.pipelines.report import create_pipeline
from dpdmd_pipeline.pipelines.report.nodes import make_report, show_result
from dpdmd_pipeline.pipelines.report.options import ReportOptions
from dpdmd_pipeline.pipelines.report.page import FILES
from dpdmd_pipeline.pipelines.report.wording import make_verdict
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


# ---- the page


def test_the_html_needs_no_other_file():
    html, _ = make_report(**made_inputs())
    tags = Tags(html).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "base", "form"}
    names = ("src", "href", "srcset", "data", "action")
    references = [attrs[name] for tag, attrs in tags for name in names if name in attrs and tag != "a"]
    assert references and all(reference.startswith("data:image/png;base64,") for reference in references)
    assert {attrs["href"] for tag, attrs in tags if tag == "a"} == set(FILES)  # its neighbours, for who has them
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_each_row_holds_one_prompt_and_the_three_models_in_order():
    html, _ = make_report(**made_inputs())
    images = [attrs["src"] for tag, attrs in Tags(html).tags if tag == "img"]
    *strips, training = [Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))) for image in images]
    assert training.size == made_inputs()["train_strip"].size
    assert [strip.size for strip in strips] == [(90, 10)] * 9
    assert [strip.getpixel((5, 5)) for strip in strips] == list(COLOURS.values()) * 3


def test_each_row_of_pictures_belongs_to_its_prompt():
    grids = made_inputs()
    for row in range(3):
        grids["grid_teacher"].paste((row, row, row), (0, 10 * row, 90, 10 * row + 10))
    html, _ = make_report(**grids)
    images = [attrs["src"] for tag, attrs in Tags(html).tags if tag == "img"][:-1:3]
    strips = [Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))) for image in images]
    assert [strip.getcolors() for strip in strips] == [[(900, (row, row, row))] for row in range(3)]


def test_captions_show_the_cost():
    for page in make_report(**made_inputs()):
        assert "teacher, 60 network evaluations" in page
        assert "DMD, 4" in page and "DP-DMD, 4" in page


def test_a_teacher_start_is_one_more_column_of_the_numbers_and_no_more_pictures(capsys):
    metrics = made_metrics()
    started = {**copy.deepcopy(metrics["dmd"]), "nfe": 9, "faults": {"torn": 2}}
    started["diversity"]["effective_modes"] = measured(41.5, 1.0)
    inputs = made_inputs(metrics={**metrics, "dmd_start": started})
    for page in make_report(**inputs):
        assert "DMD + teacher start" in page and "41.5" in page and "2 x torn" in page
    assert "DMD + teacher start" not in "".join(make_report(**made_inputs()))
    images = [attrs for tag, attrs in Tags(make_report(**inputs)[0]).tags if tag == "img"]
    assert len(images) == 9 + 1  # and the strip of the training
    show_result(inputs["metrics"], "", "")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:] for line in lines if line.startswith("network evaluations")] == [["60", "4", "9", "4"]]


def test_prompts_with_markup_stay_text():
    html, md = make_report(**made_inputs())
    parsed = Tags(html)
    assert HOSTILE in parsed.text
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert any(HOSTILE in attrs.get("alt", "") for _, attrs in parsed.tags)
    assert "only trained on" not in html + md
    assert "<script>" not in md and "{% raw %}" in md.replace("\\", "") and not re.search(r"(?<!\\)\]\(http", md)


def test_the_markdown_shows_the_pictures_of_the_catalog_in_its_own_folder():
    _, md = make_report(**made_inputs())
    config = ConfigLoader(str(ROOT / "conf"), env="ci", **CONFIG_LOADER_ARGS)["catalog"]
    catalog = DataCatalog.from_config(config)
    names = ("report_md", "grid_teacher", "grid_dmd", "grid_dp_dmd", "train_curve", "train_strip")
    page, *pictures = (Path(catalog.get(name)._filepath) for name in names)
    assert {page.parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", md)} == set(pictures)


def test_every_table_of_the_markdown_has_as_many_cells_in_each_row():
    _, md = make_report(**made_inputs())
    for table in re.findall(r"(?:^\|.*\n)+", md, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1 and len(table.splitlines()) >= 3, table


def test_a_missing_gap_is_a_dash_with_an_explanation():
    for page in make_report(**made_inputs()):
        assert page.count("\N{EM DASH}") >= 2 and "No gap to recover" in page
    complete = made_metrics()
    complete["dp_dmd"]["gap_recovered"]["pairwise_distance"] = made_gap(1.0)
    for page in make_report(**made_inputs(metrics=complete)):
        assert "No gap to recover" not in page


def test_a_gap_of_the_exact_reader_has_its_interval_too():
    html, md = make_report(**made_inputs())
    for page in (Tags(html).text, md):
        assert "90 % (85 to 95)" in page


def test_an_unknown_metric_has_its_raw_name():
    metrics = made_metrics()
    for model in COLOURS:
        metrics[model]["diversity"]["vendi_score"] = measured(3.0, 0.5)
    html, _ = make_report(**made_inputs(metrics=metrics))
    assert "vendi score" in html and "2.5 to 3.5" in html


def test_the_same_inputs_give_the_same_bytes():
    assert make_report(**made_inputs()) == make_report(**copy.deepcopy(made_inputs()))


def test_typed_and_plain_options_give_the_same_bytes():
    plain = made_inputs()
    typed = {"prompts_options": PromptsOptions.model_validate(plain["prompts_options"])}
    assert make_report(**plain) == make_report(**{**plain, **typed})


def test_metrics_of_another_student_are_refused():
    for changes in ({"student": made_student("dmd")}, {"student_dmd": made_student("dp_dmd")}):
        with refuses(StageError, "another student") as error:
            make_report(**made_inputs(**changes))
        assert error.value.stage == "evaluate" and "identity" in str(error.value)


def test_options_that_differ_between_the_students_are_marked():
    html, md = make_report(**made_inputs())
    assert r"| **diversity\_weight** |" in md
    assert "| fake\\_score\\_turns | 5 | 5 |" in md
    assert '<tr class="differs"><th scope="row">diversity_weight</th>' in html


def test_the_page_embeds_only_the_configured_prompts_and_pixels():
    small = ReportOptions(max_prompts=2, max_strip_width=45, curve_points=50)
    html, _ = make_report(**made_inputs(options=small))
    images = [attrs["src"] for tag, attrs in Tags(html).tags if tag == "img"]
    assert len(images) == 6 + 1
    assert Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1]))).size == (45, 5)
    assert "first 2 of 3" in html


@pytest.mark.parametrize("texts", [(), ("one", "two", "three", "four")])
def test_a_grid_of_other_prompts_is_an_error_with_both_numbers(texts):
    inputs = made_inputs()
    inputs["prompts"] = [{"text": text, "train": False, "eval": True} for text in texts]
    with pytest.raises(StageError, match=rf"grid_teacher .*\b30\b.*\b{len(texts)}\b") as error:
        make_report(**inputs)
    assert error.value.stage == "evaluate"


# ---- metrics of the library


def test_any_metric_is_a_row_with_its_protocol_its_count_and_its_gap():
    html, md = make_report(**made_inputs(metrics=without_reader()))
    for page in (Tags(html).text, md.replace("\\", "")):
        assert "diversity.dino_v2.one_minus_cosine" in page and "protocol of preference.pickscore.score" in page
        assert "27 pictures of 3 prompts" in page and "75 % (70 to 80)" in page and "0.25" in page
    assert "effective modes" not in Tags(html).text


def test_the_reason_of_missing_metrics_is_shown_once():
    metrics = without_reader()
    reason = "needs facebook/dinov2-base: hf download <it>"
    for model in COLOURS:
        metrics[model]["missing"] = {"diversity.dino_v2": reason, "diversity.dino_v2_patch": reason}
    metrics["dmd"]["faults"] = {"the network gave no finite number (quality.arniqa)": 2}
    html, md = make_report(**made_inputs(metrics=metrics))
    for page in (Tags(html).text, md.replace("\\", "").replace("&lt;", "<").replace("&gt;", ">")):
        assert page.count(reason) == 1 and "diversity.dino_v2, diversity.dino_v2_patch" in page
        assert "DMD: 2 x the network" in page


def test_each_note_is_shown_once_with_its_models(capsys):
    metrics = without_reader()
    for model in COLOURS:
        metrics[model]["notes"] = ["3 of 9 prompts are longer than 77 tokens and were cut (alignment.clip_score)"]
    metrics["dmd"]["notes"] = [*metrics["dmd"]["notes"], "FID of fewer than 10000 pictures is too high"]
    metrics["dp_dmd"]["gap_notes"] = ["diversity.dino_v2.vendi: 2 of 9 prompts are left out of the gap"]
    starts = ["3 of 9 prompts", "DMD: FID of fewer than 10000", "diversity.dino_v2.vendi: 2 of 9 prompts"]
    html, md = make_report(**made_inputs(metrics=metrics))
    show_result(metrics, "", "")
    for page in (Tags(html).text, md.replace("\\", ""), capsys.readouterr().out):
        assert [page.count(start) for start in starts] == [1, 1, 1]


def test_the_markdown_has_the_numbers_of_the_drawings():
    _, md = make_report(**made_inputs())
    assert "| a red circle | 0 / 0 | 10 / 10 | 20 / 20 |" in md and "of 3 prompts." in md
    assert "| radius | small | 50 % | 75.0 % | 75.0 % | 75.0 % |" in md
    scores = made_scores(("a red circle", "a blue square"))
    del scores["models"]["dmd"]["per_prompt"]["quality.shapes.aligned"]["0"]
    assert "| a red circle | 0 / 0 |  | 20 / 20 |" in make_report(**made_inputs(scores=scores))[1]
    few = OPTIONS.model_copy(update={"max_prompts": 2})
    assert "of the first 2 of 3 prompts." in make_report(**made_inputs(options=few))[1]


def test_a_figure_of_one_prompt_has_no_interval_and_gives_no_verdict(capsys):
    metrics = without_reader()
    for model in COLOURS:
        for figure in metrics[model]["figures"].values():
            figure |= {"low": None, "high": None}
    metrics["dp_dmd"]["gaps"]["diversity.dino_v2.one_minus_cosine"] |= {"low": None, "high": None}
    for page in make_report(**made_inputs(metrics=metrics)):
        assert "One prompt" in page and "recovers 75 %" not in page and "None" not in page
    show_result(metrics, "", "")
    assert "None" not in capsys.readouterr().out


def test_a_report_without_measurements_has_no_drawings_of_them():
    metrics = without_reader()
    for model in COLOURS:
        metrics[model]["figures"] = {}
    metrics["dp_dmd"]["gaps"] = {}
    html, md = make_report(**made_inputs(metrics=metrics, scores=made_scores("abc", attributes=False)))
    for page in (html, md):
        assert "No diversity metric" in page and "Attributes that the prompts leave open" not in page
    assert "No scatter" in html and "circle" not in {tag for tag, _ in Tags(html).tags}


def test_each_prompt_is_a_point_of_each_model():
    html, _ = make_report(**made_inputs())
    parsed = Tags(html)
    points = [attrs for tag, attrs in parsed.tags if tag == "circle"]
    assert len(points) == 9
    assert all(56 <= float(at["cx"]) <= 552 and 12 <= float(at["cy"]) <= 300 for at in points)
    assert float(points[0]["cx"]) < float(points[-1]["cx"]) and float(points[0]["cy"]) > float(points[-1]["cy"])
    assert f"DP-DMD: {HOSTILE}" in parsed.text


def test_bars_are_shares_of_each_model_s_correct_pictures():
    html, _ = make_report(**made_inputs())
    bars = [float(attrs["width"]) for tag, attrs in Tags(html).tags if tag == "rect"]
    whole = 344 - 96
    assert bars[:2] == [whole, round(whole / 3, 1)] and bars[6:8] == [0, whole] and len(bars) == 12
    assert "even: 50 %, longest bar: 75 %" in html


def test_correlations_with_the_exact_reader_are_listed():
    metrics = made_metrics()
    within = {"value": 0.123, "low": None, "high": None}
    metrics["rank_correlation"] = {
        "diversity.clip_shapes.vendi": {"value": 0.761, "low": 0.5, "high": 0.9, "within": within}
    }
    html, md = make_report(**made_inputs(metrics=metrics))
    assert "<td>0.76 (0.50 to 0.90)</td><td>0.12</td>" in html and "| 0.76 (0.50 to 0.90) | 0.12 |" in md


def test_the_page_names_the_cycle_of_each_student():
    for page in make_report(**made_inputs()):
        assert "last cycle" in page and "train.watch.diversity_floor" not in page
    history = [row | {"best_step": 80 if row["step"] >= 80 else 25} for row in made_inputs()["train_history"]]
    for page in make_report(**made_inputs(train_history=history)):
        assert re.search(r"\bDMD [^.]*\b120, DP-DMD [^.]*\b80\.", page) and "train.watch.diversity_floor" in page


def test_missing_metrics_are_an_error():
    with refuses(MissingInputError, "metrics") as error:
        make_report(**made_inputs(metrics={}))
    assert error.value.stage == "evaluate"


def test_metrics_of_an_older_version_are_an_error_with_the_missing_part():
    metrics = made_metrics()
    metrics["rank_correlation"] = {"diversity.clip_shapes.vendi": {"value": 0.761, "low": 0.5, "high": 0.9}}
    with refuses(StageError, "clip_shapes.vendi") as error:
        make_report(**made_inputs(metrics=metrics))
    assert error.value.stage == "evaluate"
    metrics = made_metrics()
    metrics["dp_dmd"]["gap_recovered"]["coverage"] = 0.5
    with refuses(StageError, "gap_recovered.coverage"):
        make_report(**made_inputs(metrics=metrics))


def test_grids_of_the_first_prompts_have_their_labels():
    inputs = made_inputs()
    inputs["evaluate_options"] = {**inputs["evaluate_options"], "grid_prompts": 2}
    with pytest.raises(StageError, match=r"\b31\b.*\b2\b"):
        make_report(**{**inputs, "grid_teacher": Image.new("RGB", (90, 31))})
    html, md = make_report(**{**inputs, **{f"grid_{name}": Image.new("RGB", (90, 20)) for name in COLOURS}})
    assert "first 2 of 3" in html and "3. " not in md.split("## Numbers")[0]


def test_the_page_shows_how_to_reproduce_the_run_in_its_environment():
    for page in make_report(**made_inputs()):
        assert "make distill" in page and "dvc exp run -S" in page and "--env" not in page
    for page in make_report(**made_inputs(run_arguments="--env sd35 ")):
        assert "kedro run --env sd35 --pipeline=distill" in page and "conf/base" not in page
        assert "kedro run --env sd35 --pipeline=distill --params run=weight-1,train.diversity_weight=1" in page
        assert "make distill" not in page and "dvc exp" not in page


# ---- the terminal and the pipeline


def test_the_terminal_shows_every_metric_and_missing_ones(capsys):
    metrics = without_reader()
    metrics["dmd"]["missing"] = {"distribution.inception": "pip install 'dpdmd-pipeline[metrics]'"}
    show_result(metrics, "", "")
    shown = capsys.readouterr().out
    assert "preference.pickscore.score" in shown and "75 % (70 to 80)" in shown and shown.isascii()
    assert "distribution.inception: pip install 'dpdmd-pipeline[metrics]'" in shown
    assert shown.splitlines()[-1] == make_verdict(metrics)


def test_a_file_gets_a_row_per_metric_with_intervals_and_the_verdict_on_one_plain_line(capsys):
    show_result(made_metrics(), "", "")
    shown = capsys.readouterr().out
    head, *lines = [line for line in shown.splitlines() if line.strip()]
    assert head.split() == ["teacher", "DMD", "DP-DMD", "gap", "recovered"]
    (modes,) = (line for line in lines if line.startswith("  distinct kinds"))
    assert modes.split()[4:9] == ["64.0", "5.0", "58.0", "90", "%"] and " to " in modes
    assert lines[-1] == make_verdict(made_metrics())
    assert shown.isascii() and "\x1b" not in shown


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_terminal_gets_no_line_that_is_cut(capsys, monkeypatch, width):
    console = rich.get_console()
    monkeypatch.setattr(console, "_width", width)
    monkeypatch.setattr(console, "_force_terminal", True)
    metrics = made_metrics()
    show_result({**metrics, "dmd_start": metrics["dmd"]}, "", "")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width and "\N{HORIZONTAL ELLIPSIS}" not in "".join(lines)
    assert sum(line.strip().startswith("distinct kinds of picture") for line in lines) == 1


def test_the_pipeline_makes_both_reports_and_then_shows_the_result(capsys, tmp_path):
    stages = ("prompts", "evaluate")
    renamed = {"options": "params:report", **{f"{name}_options": f"params:{name}" for name in stages}}
    inputs = {renamed.get(name, name): MemoryDataset(value) for name, value in made_inputs().items()}
    reports = {name: TextDataset(filepath=str(tmp_path / name)) for name in ("report_html", "report_md")}
    SequentialRunner().run(create_pipeline(), DataCatalog({**inputs, **reports}))
    assert reports["report_html"].load().startswith("<!doctype html>")
    assert reports["report_md"].load().startswith("# DP-DMD")
    assert "gap recovered" in capsys.readouterr().out
