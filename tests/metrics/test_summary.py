import math

import torch

from dpdmd_pipeline.metrics.summary import figure, gap_figure, interval, ratio_interval


def plain_interval(values, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (2000, len(values)), generator=generator)
    return values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def test_resampling_in_chunks_gives_the_same_interval(monkeypatch):
    values = torch.rand(37, generator=torch.Generator().manual_seed(0)).double()
    for size in (1, 1000, 1 << 22):
        monkeypatch.setattr("dpdmd_pipeline.metrics.summary._IN_MEMORY", size)
        result = interval(values, seed=5)
        assert [result["low"], result["high"]] == plain_interval(values, seed=5)


def test_a_figure_counts_pictures_and_leaves_unmeasured_prompts_out():
    result = figure(torch.tensor([1.0, math.nan, 3.0]), pictures=18, preset="p", seed=0)
    assert result["value"] == 2 and result["n"] == {"prompts": 2, "pictures": 18, "prompts_not_measured": 1}
    assert result["preset"] == "p" and result["low"] == 1 and result["high"] == 3


def test_one_prompt_has_no_interval_and_none_no_value():
    alone = figure(torch.tensor([4.0]), pictures=9, preset="", seed=0)
    assert (alone["value"], alone["low"], alone["high"]) == (4, None, None)
    assert figure(torch.tensor([math.nan]), pictures=0, preset="", seed=0)["value"] is None


def test_a_ratio_weighs_pictures_and_resamples_prompts():
    marks = torch.tensor([1.0, 1.0, 1.0, 0.0])
    result = ratio_interval(marks, torch.tensor([7, 7, 7, 9]), seed=0)
    assert result == {"value": 0.75, "low": 0.0, "high": 1.0}
    assert ratio_interval(marks, torch.zeros(4, dtype=torch.long), seed=0)["low"] is None


def test_the_gap_s_interval_holds_the_truth_and_is_tighter_when_prompts_agree():
    torch.manual_seed(0)
    prompt = torch.randn(60)  # difficulty of a prompt, the same for all three
    teacher, dmd = prompt + 2, prompt
    exact = gap_figure(teacher, dmd, prompt + 1, seed=0)
    assert all(math.isclose(exact[name], 0.5, abs_tol=1e-6) for name in ("value", "low", "high"))
    noisy = gap_figure(teacher, dmd, prompt + 1 + torch.randn(60), seed=0)
    assert noisy["low"] < 0.5 < noisy["high"]


def test_no_gap_has_no_share_and_a_doubtful_gap_no_interval():
    one = torch.tensor([1.0, 2.0, 3.0])
    assert gap_figure(one, one + 1, one, seed=0) == {"value": None, "low": None, "high": None}
    doubtful = gap_figure(torch.tensor([5.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]), seed=0)
    assert doubtful["value"] is not None and doubtful["low"] is None
