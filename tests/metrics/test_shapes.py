import torch

from dpdmd_pipeline.metrics.shapes import judge
from dpdmd_pipeline.shapes.world import NUM_MODES, caption, gallery


def test_a_perfect_model_is_all_valid_and_all_modes():
    pictures = gallery().view(12, NUM_MODES, 3, 32, 32)
    judged = judge([pictures[3], pictures[7]], [caption(3), caption(7)], seed=0)
    assert judged["quality"]["valid"]["value"] == judged["quality"]["aligned"]["value"] == 1
    assert judged["quality"]["residual"]["value"] < 1e-3
    assert judged["diversity"]["coverage"]["value"] == 1


def test_a_collapsed_model_is_valid_and_has_one_mode():
    pictures = gallery()[:1].expand(9, 3, 32, 32)
    judged = judge([pictures], [caption(0)], seed=0)
    assert judged["quality"]["aligned"]["value"] == 1
    assert judged["diversity"]["effective_modes"]["value"] == 1
    assert judged["diversity"]["pairwise_distance"]["value"] == 0


def test_rubbish_and_the_wrong_prompt_earn_no_diversity():
    wrong = gallery()[NUM_MODES : 2 * NUM_MODES]  # all modes of the second prompt
    noise = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    judged = judge([wrong, noise], [caption(0), caption(0)], seed=0)
    assert judged["quality"]["valid"]["value"] == 0.5 and judged["quality"]["aligned"]["value"] == 0
    assert judged["diversity"]["effective_modes"]["value"] == 0
