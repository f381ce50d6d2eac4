"""Estimates against real networks, optimisers and caches on the CPU."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from tests.training.conftest import DMD, GUIDANCE, RECIPE, asked
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.memory import (
    MemoryModel,
    MemorySplit,
    _Wanted,
    anchor_bytes,
    conditioning_like,
    describe_remedies,
    embedding_bytes,
    remedies,
    waiting_passes,
)
from dpdmd_pipeline.training.optimizer import make_optimizer
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import make_roles, trainable


def alike(samples: int, checkpointing: bool, **rest) -> MemorySplit:
    return MemorySplit.alike(samples, gradient_checkpointing=checkpointing, **rest)


SMALL = alike(2, False)


def recipe(**changes) -> Recipe:
    return Recipe(**{**RECIPE, **changes})


@pytest.fixture(scope="session")
def backbone(world_teacher):
    """Of the sizes that are counted: in a smaller network what the counts leave out would weigh more."""
    return load_backbone("sd3", world_teacher, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))


@pytest.fixture(scope="session")
def ask_teacher(backbone, embeddings):
    return asked(backbone, embeddings)


@pytest.fixture(scope="module")
def model(backbone, world_teacher) -> MemoryModel:
    return MemoryModel(backbone, world_teacher, conditioning_like(backbone), GUIDANCE)


@pytest.fixture(scope="module")
def half(world_teacher):
    """The same teacher in bfloat16, and its estimates."""
    options = {"resolution": 32, "max_sequence_length": 0, "level_range": (0.02, 0.98), "dtype": torch.bfloat16}
    backbone = load_backbone("sd3", world_teacher, **options)
    like = conditioning_like(backbone)
    return backbone, MemoryModel(backbone, world_teacher, like, GUIDANCE)


def size(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def networks(roles) -> list:
    held = [roles.teacher, roles.student, roles.fake_score]
    return [*held, roles.student._shared[0]] if hasattr(roles.student, "_shared") else held


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_gradients_and_moments_are_exactly_those_of_real_networks(backbone, model, half, kind, precision):
    family, estimates = (backbone, model) if precision == "float32" else half
    asked = recipe(roles=kind, precision=precision)
    roles = make_roles(family, asked, gradient_checkpointing=False, sharded=False)
    memory = estimates.estimate(asked, SMALL)
    assert memory.weights == size(t for network in networks(roles) for t in (*network.parameters(), *network.buffers()))
    moments, gradients = 0, []
    for role, optimizer_recipe in ((roles.student, asked.student), (roles.fake_score, asked.fake_score)):
        for parameter in trainable(role):
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(size(p.grad for p in trainable(role)))
        optimizer = make_optimizer(trainable(role), optimizer_recipe)
        optimizer.step()
        moments += size(value for state in optimizer.state.values() for value in state.values())
    assert memory.optimizer == moments
    assert memory.gradients == 2 * gradients[0]  # two, while the ratio of the two losses' gradients is measured
    assert estimates.estimate(recipe(roles=kind, precision=precision, **DMD), SMALL).gradients == max(gradients)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_average_takes_the_trained_weights_of_another_student(backbone, model, kind):
    with_average, without = (model.estimate(recipe(ema=ema, roles=kind), SMALL) for ema in (0.9, 0.0))
    roles = make_roles(backbone, recipe(roles=kind), gradient_checkpointing=False, sharded=False)
    assert with_average.average == size(trainable(roles.student)) and without.average == 0


def test_processes_that_share_the_networks_divide_what_belongs_to_them(model):
    asked = recipe(ema=0.9, batch_size=8, **DMD)  # one backward pass a turn: no gradient waits for another
    alone, four = (model.estimate(asked, alike(2, True, processes=4, sharded=sharded)) for sharded in (False, True))
    for part in ("gradients", "optimizer", "average"):
        assert getattr(four, part) == pytest.approx(getattr(alone, part) / 4, rel=1e-3)
    networks = 2 * alone.average  # student and fake score
    assert four.weights == pytest.approx(alone.weights - 0.75 * networks, rel=1e-3)
    assert 0 < four.activations < 3 * alone.average  # what is brought together: at most weights and gradients


@pytest.mark.parametrize("micro_batch, changes", [(1, DMD), (2, {})], ids=["two parts", "two losses"])
def test_a_gradient_that_waits_for_its_exchange_is_counted_whole(model, micro_batch, changes):
    shards = alike(2, True, processes=4, sharded=True)
    split = replace(shards, student_micro_batch=micro_batch)
    once, waiting = (
        model.estimate(recipe(batch_size=8, **given), now).gradients for given, now in ((DMD, shards), (changes, split))
    )
    student = 4 * once
    assert waiting == pytest.approx(student + (2 if changes == {} else 1) * once, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_pass_keeps_is_counted_on_weightless_networks_as_on_real_ones(
    backbone, model, half, embeddings, kind, precision
):
    """Real tensors on the CPU, collected as autograd asks for them, without and with checkpointing."""
    family, estimates = (backbone, model) if precision == "float32" else half
    asked = recipe(roles=kind, precision=precision)
    for checkpointing in (False, True):
        roles = make_roles(family, asked, gradient_checkpointing=checkpointing, sharded=False)
        own = {p.untyped_storage().data_ptr() for network in networks(roles) for p in network.parameters()}
        found = {}

        def pack(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        cond = {name: value[:2].to(family.dtype) for name, value in embeddings.tensors.items()}
        level = family.random_level(torch.rand(2))
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            denoised = family.denoise(roles.student, torch.randn(2, *family.latent_shape), level, cond)
        kept = sum(storage.nbytes() for name, storage in found.items() if name not in own)
        counted = counted_pass(estimates, asked)
        assert kept == pytest.approx(counted.kept_between if checkpointing else counted.kept, rel=0.04)
        del denoised


def counted_pass(estimates: MemoryModel, asked: Recipe):
    from dpdmd_pipeline.training.memory import _Wanted

    return estimates._pass(_Wanted.by(asked), "student", 2)


def test_operations_are_those_of_plain_matrix_products(backbone, model, embeddings):
    """torch's own counter on a real pass, in which attention is two products."""
    network, level = backbone.load_model(), backbone.random_level(torch.rand(1))
    cond = {name: value[:1] for name, value in embeddings.tensors.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.denoise(network, torch.randn(1, *backbone.latent_shape), level, cond)
    assert model.forward_flops(recipe()) == counter.get_total_flops()


VARIANTS = {
    "dp_dmd": {},
    "dmd": DMD,
    "through_the_first_step": {"stop_gradient": False},
    "two_anchored_steps": {"anchored_steps": 2},
    "through_two_steps": {"anchored_steps": 2, "stop_gradient": False},
    "random_step": {"graded_steps": "random"},
    "lora": {"roles": "lora"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_many_passes_wait_for_a_backward_pass_as_are_counted(start, tmp_path, model, variant):
    """The largest amount that autograd holds at a time during a real cycle."""
    roles, records = start(tmp_path, max_steps=1, **VARIANTS[variant])
    own = {p.untyped_storage().data_ptr() for network in networks(roles) for p in network.parameters()}
    held = Held(own)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        next(records)
    asked = recipe(**VARIANTS[variant])
    expected = waiting_passes(asked) * counted_pass(model, asked).kept
    assert held.most == pytest.approx(expected, rel=0.05)


class Held:
    """Bytes of the storages that autograd holds, and their largest sum."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.users, self.now, self.most = own, {}, 0, 0

    def pack(self, tensor: torch.Tensor):
        box = _Box(tensor)
        storage = tensor.untyped_storage()
        name, size = storage.data_ptr(), storage.nbytes()
        if name not in self.own:
            self.users[name] = self.users.get(name, 0) + 1
            self.now += size if self.users[name] == 1 else 0
            self.most = max(self.most, self.now)
            weakref.finalize(box, self._free, name, size)
        return box

    def unpack(self, box) -> torch.Tensor:
        return box.tensor

    def _free(self, name: int, size: int) -> None:
        self.users[name] -= 1
        self.now -= size if self.users[name] == 0 else 0


class _Box:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_counting_leaves_no_network_and_no_number_behind(model):
    state = torch.get_rng_state()
    model.estimate(recipe(), SMALL)
    gc.collect()
    assert torch.equal(state, torch.get_rng_state())


# ---- what helps


def test_every_remedy_spares_what_it_says(model):
    asked, split = recipe(ema=0.5, batch_size=64), alike(64, False)
    found = dict(remedies(model, asked, split))
    now = model.estimate(asked, split).total
    less = {
        "train.roles=lora": (recipe(ema=0.5, batch_size=64, roles="lora"), split),
        "train.student_micro_batch=32, train.fake_score_micro_batch=32, train.rollout_micro_batch=32": (
            asked,
            alike(32, False),
        ),
        "train.gradient_checkpointing=true": (asked, alike(64, True)),
        "train.graded_steps=random": (recipe(ema=0.5, batch_size=64, graded_steps="random"), split),
    }
    for text, changed in less.items():
        assert found[text] == now - model.estimate(*changed).total > 0
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert f"train.roles=lora spares {found['train.roles=lora'] / 2**30:.1f} GiB" in describe_remedies(found.items())


def test_a_guided_call_in_two_halves_keeps_less(model):
    joint, apart = (
        model.estimate(recipe(batch_size=64), alike(64, True, guidance_batch=batch)).activations
        for batch in ("joint", "apart")
    )
    assert apart < joint


def test_sharding_is_named_where_several_processes_could_share_the_networks(model):
    asked, text = recipe(batch_size=8, ema=0.5), "train.launch.sharding=fsdp2"
    assert dict(remedies(model, asked, alike(2, True, processes=4)))[text] > 0
    assert text not in dict(remedies(model, asked, alike(2, True)))
    assert text not in dict(remedies(model, recipe(batch_size=8, roles="lora"), alike(2, True, processes=4)))
    already = dict(remedies(model, asked, alike(2, True, processes=4, sharded=True)))
    assert text not in already
    assert not any("roles=lora" in found and "sharding=none" not in found for found in already)


@pytest.mark.parametrize("found, said", [(None, " (first `pip install bitsandbytes`)"), (object(), "")])
def test_moments_in_8_bits_are_named_with_the_library_they_lack(model, monkeypatch, found, said):
    monkeypatch.setattr("dpdmd_pipeline.training.memory.find_spec", lambda _: found)
    assert f"kind=adamw_8bit for both optimizers{said}" in dict(remedies(model, recipe(batch_size=8), alike(8, True)))


def test_where_nothing_helps_the_words_say_so():
    assert describe_remedies([]) == "no option makes it smaller: take a card with more memory"


@pytest.mark.parametrize("less, more", [(16, 32), (32, 64)])
def test_a_larger_part_keeps_more_and_a_checkpointed_one_less(model, less, more):
    asked = recipe(batch_size=64)
    small, large = (model.estimate(asked, alike(n, False)).activations for n in (less, more))
    assert model.estimate(asked, alike(more, True)).activations < large and small < large


# ---- disk


def test_caches_on_disk_have_the_bytes_that_are_estimated(backbone, world_teacher, tmp_path):
    cond = backbone.encode(["a red circle", "a blue square", ""])
    like = conditioning_like(backbone)
    anchors = {"prompt": torch.zeros(6, dtype=torch.int64), "seed": torch.zeros(6, dtype=torch.int64)}
    anchors |= {f"anchor_{number}": torch.zeros(6, *backbone.latent_shape).half() for number in range(2)}
    shape = backbone.latent_shape
    expected = {
        "embeddings": (cond, embedding_bytes(like, 2)),
        "anchors": (anchors, anchor_bytes(shape, 6, 2, with_denoised=False, dtype=torch.float16)),
    }
    for name, (tensors, estimated) in expected.items():
        ShardedDataset(filepath=str(tmp_path / name)).save(LazyShards({"00000": lambda t=tensors: t}, name, {}))
        path = tmp_path / name / "00000.safetensors"
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header == estimated


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"roles": "lora"}], ids=["full", "averaged", "lora"])
def test_a_state_on_disk_has_the_bytes_that_are_estimated(start, tmp_path, model, changes):
    _, records = start(tmp_path, **changes)
    next(records), next(records), records.close()
    _, state = Checkpoints(tmp_path).load_latest()
    written = size(tensors_in(state))
    assert written == model.checkpoint_bytes(recipe(**changes))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


def test_a_large_rollout_is_what_a_run_of_small_parts_needs(model):
    asked = recipe(batch_size=64, fake_score_turns=5, anchored_steps=0, diversity_weight=0.0, stop_gradient=False)
    small, large, more = (
        model.estimate(asked, replace(alike(1, False), rollout_micro_batch=rollout)).activations
        for rollout in (1, 320, 1000)
    )
    assert small < large == more  # no more than a cycle's pictures are drawn
    assert large == model._pass(_Wanted.by(asked), "student", 320).block
    shared = asked.model_copy(update={"fake_rollout": "shared"})
    assert model.estimate(shared, replace(alike(1, False), rollout_micro_batch=320)).activations < large
