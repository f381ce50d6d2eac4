import torch

from dpdmd_pipeline.metrics.shapes import attribute_counts, judge, mode_counts
from dpdmd_pipeline.shapes.world import LEGAL, NUM_MODES, caption, gallery


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


def test_every_mode_once_gives_every_value_its_share():
    modes = mode_counts(gallery()[:NUM_MODES], caption(0))
    assert torch.equal(modes, torch.ones(NUM_MODES).double())
    counts = attribute_counts(modes)
    assert set(counts["position"].values()) == {8} and len(counts["position"]) == 9
    assert counts["radius"] == {"small": 36, "large": 36}
    assert counts["background"] == {"black": 18, "grey": 18, "white": 18, "purple": 18}


def test_a_picture_counts_under_the_words_that_describe_it():
    from dpdmd_pipeline.shapes.clip import full_caption

    for row in (0, 17, 71):
        counts = attribute_counts(mode_counts(gallery()[row : row + 1], caption(0)))
        (position,), (radius,), (background,) = ([word for word, n in of.items() if n] for of in counts.values())
        words = full_caption(LEGAL[row])
        assert position in words and radius in words and words.endswith(f"on {background}")


def test_wrong_and_broken_pictures_do_not_count():
    pictures = torch.cat([gallery()[NUM_MODES : NUM_MODES + 3], torch.rand(2, 3, 32, 32)])
    assert mode_counts(pictures, caption(0)).sum() == 0
