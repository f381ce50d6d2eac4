import math

import pytest
import torch
import torch.nn.functional as F

from dpdmd_pipeline.metrics.diversity import (
    duplicate_rate,
    duplicate_threshold,
    nearest_similarity,
    one_minus_cosine,
    pairwise_distance,
    vendi_score,
)


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(7, 20, generator=torch.Generator().manual_seed(0)) + 1


def test_one_minus_cosine_is_the_mean_over_pairs(embeddings):
    pairs = [(i, j) for i in range(7) for j in range(i)]
    cosines = [F.cosine_similarity(embeddings[i].double(), embeddings[j].double(), dim=0) for i, j in pairs]
    assert math.isclose(one_minus_cosine(embeddings), 1 - torch.stack(cosines).mean().item(), rel_tol=1e-12)


def test_copies_have_no_diversity_and_orthogonal_pictures_all_of_it():
    copies, orthogonal = torch.randn(1, 5).expand(4, 5), torch.eye(4) * 3
    assert 0 <= one_minus_cosine(copies) < 1e-12 and math.isclose(vendi_score(copies), 1, rel_tol=1e-9)
    assert one_minus_cosine(orthogonal) == 1 and math.isclose(vendi_score(orthogonal), 4)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_the_vendi_score_counts_groups_of_copies(groups):
    pictures = torch.eye(groups).repeat_interleave(3, dim=0)
    assert math.isclose(vendi_score(pictures), groups, rel_tol=1e-9)


def test_the_vendi_score_is_the_same_from_the_dual_matrix(embeddings):
    unit = F.normalize(embeddings.double(), dim=1)
    shares = torch.linalg.svdvals(unit).square() / 7  # eigenvalues of X'X / n, without zeros
    assert math.isclose(vendi_score(embeddings), math.exp(-(shares * shares.log()).sum()), rel_tol=1e-9)


def test_a_perfect_sampler_has_the_threshold_s_share_of_duplicates():
    torch.manual_seed(0)
    prompts = [nearest_similarity(torch.randn(9, 8)) for _ in range(400)]
    threshold = duplicate_threshold(torch.cat(prompts))
    again = torch.cat([nearest_similarity(torch.randn(9, 8)) for _ in range(400)])
    assert abs(duplicate_rate(again, threshold) - 0.01) < 0.005
    assert duplicate_rate(nearest_similarity(torch.ones(5, 3)), threshold) == 1


def test_copies_count_also_if_the_teacher_draws_some():
    torch.manual_seed(0)
    world = torch.randn(72, 16)
    teacher = torch.cat([nearest_similarity(world[torch.randint(72, (9,))]) for _ in range(200)])
    collapsed = torch.cat([nearest_similarity(world[torch.randint(3, (9,))]) for _ in range(200)])
    threshold = duplicate_threshold(teacher)
    assert abs(threshold - 1) < 1e-9
    # a picture has a copy unless the other eight all have other modes
    assert abs(duplicate_rate(teacher, threshold) - (1 - (71 / 72) ** 8)) < 0.03
    assert abs(duplicate_rate(collapsed, threshold) - (1 - (2 / 3) ** 8)) < 0.03


def test_one_picture_alone_is_refused():
    for metric in (one_minus_cosine, vendi_score, nearest_similarity):
        with pytest.raises(ValueError, match=r"\b2\b.*\b1\b"):
            metric(torch.ones(1, 3))


def test_pairwise_distance_is_the_rms_between_pictures():
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.full((3, 4, 4), 0.5)])
    assert math.isclose(pairwise_distance(images), (1 + 0.5 + 0.5) / 3, rel_tol=1e-6)
    with pytest.raises(ValueError, match=r"\b2\b.*\b1\b"):
        pairwise_distance(images[:1])
