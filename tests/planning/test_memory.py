"""Estimates against real networks, optimizers and caches on the CPU."""

import gc
import weakref

import pytest
import torch
from tests.training.conftest import ALONE, DMD, GUIDANCE, execution_with, recipe_with, teacher_anchors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
from dpdmd_pipeline.planning.disk import anchor_bytes, embedding_bytes
from dpdmd_pipeline.planning.gpu import describe_remedies, remedies
from dpdmd_pipeline.planning.memory import MemoryModel, waiting_passes
from dpdmd_pipeline.planning.weightless import conditioning_like
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.optimizer import make_optimizer
from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.roles import make_roles, trainable


def micro_batches_of(samples: int, *, processes: int = 1, sharded: bool = False, **changes) -> Execution:
    """All micro-batches of one size."""
    launch = {**ALONE, "processes": processes, "sharding": "fsdp2" if sharded else "none"}
    sizes = dict.fromkeys(("student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch"), samples)
    return execution_with(launch=launch, **sizes, **changes)


SMALL = micro_batches_of(2)
CHECKPOINTED = {"gradient_checkpointing": True}
FOUR = {**CHECKPOINTED, "processes": 4}


@pytest.fixture(scope="session")
def backbone(world_teacher):
    """The embedded teacher: in a smaller network the small tensors that the counts leave out would weigh more."""
    return load_backbone("sd3", world_teacher, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))


@pytest.fixture(scope="session")
def ask_teacher(backbone, embeddings):
    return teacher_anchors(backbone, embeddings)


@pytest.fixture(scope="module")
def model(backbone, world_teacher) -> MemoryModel:
    return MemoryModel(backbone, world_teacher, conditioning_like(backbone), GUIDANCE, device="cpu")


@pytest.fixture(scope="module")
def half(world_teacher):
    """The same teacher in bfloat16, and its estimates."""
    options = {"resolution": 32, "max_sequence_length": 0, "level_range": (0.02, 0.98), "dtype": torch.bfloat16}
    backbone = load_backbone("sd3", world_teacher, **options)
    return backbone, MemoryModel(backbone, world_teacher, conditioning_like(backbone), GUIDANCE, device="cpu")


def size(tensors) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def networks(roles) -> list:
    networks = [roles.teacher, roles.student, roles.fake_score]
    return [*networks, roles.student._shared[0]] if hasattr(roles.student, "_shared") else networks


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_and_moments_are_exactly_those_of_real_networks(backbone, model, half, kind, precision):
    family, estimates = (backbone, model) if precision == "float32" else half
    recipe = recipe_with(roles=kind, precision=precision)
    roles = make_roles(family, recipe, gradient_checkpointing=False, sharded=False)
    memory = estimates.estimate(recipe, SMALL)
    assert memory.weights == size(t for network in networks(roles) for t in (*network.parameters(), *network.buffers()))
    moments = 0
    for role, optimizer_recipe in ((roles.student, recipe.student), (roles.fake_score, recipe.fake_score)):
        for parameter in trainable(role):
            parameter.grad = torch.zeros_like(parameter)
        optimizer = make_optimizer(trainable(role), optimizer_recipe)
        optimizer.step()
        moments += size(value for state in optimizer.state.values() for value in state.values())
    assert memory.optimizer == moments


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_average_takes_the_trained_weights_of_another_student(backbone, model, kind):
    with_average, without = (model.estimate(recipe_with(ema=ema, roles=kind), SMALL) for ema in (0.9, 0.0))
    roles = make_roles(backbone, recipe_with(roles=kind), gradient_checkpointing=False, sharded=False)
    assert with_average.average == size(trainable(roles.student)) and without.average == 0


def test_processes_that_share_the_networks_divide_their_memory(model):
    # one backward pass of one step per update: no gradient waits for another
    recipe = recipe_with(ema=0.9, batch_size=8, graded_steps="last", **DMD)
    alone, four = (model.estimate(recipe, micro_batches_of(2, sharded=sharded, **FOUR)) for sharded in (False, True))
    for part in ("optimizer", "average"):
        assert getattr(four, part) == pytest.approx(getattr(alone, part) / 4, rel=1e-3)
    networks = 2 * alone.average  # student and fake score
    assert four.weights == pytest.approx(alone.weights - 0.75 * networks, rel=1e-3)
    assert 0 < four.activations < 3 * alone.average  # gathered tensors: at most weights and gradients


@pytest.mark.parametrize("micro_batch, changes", [(1, DMD), (2, {})], ids=["two micro-batches", "two losses"])
def test_a_gradient_that_waits_for_its_exchange_is_counted_whole(model, micro_batch, changes):
    one_pass = micro_batches_of(2, sharded=True, **FOUR)
    two_passes = one_pass.model_copy(update={"student_micro_batch": micro_batch})
    once, waiting = (
        model.estimate(recipe_with(batch_size=8, graded_steps="last", **changed), execution).gradients
        for changed, execution in ((DMD, one_pass), (changes, two_passes))
    )
    student = 4 * once
    assert waiting == pytest.approx(student + (2 if changes == {} else 1) * once, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_tensors_kept_by_a_pass_are_counted_on_weightless_networks_as_on_real_ones(
    backbone, model, half, embeddings, kind, precision
):
    """Real tensors on the CPU, collected when autograd saves them, without and with checkpointing."""
    family, estimates = (backbone, model) if precision == "float32" else half
    recipe = recipe_with(roles=kind, precision=precision)
    for checkpointing in (False, True):
        roles = make_roles(family, recipe, gradient_checkpointing=checkpointing, sharded=False)
        own = {p.untyped_storage().data_ptr() for network in networks(roles) for p in network.parameters()}
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        cond = {name: value[:2].to(family.dtype) for name, value in embeddings.tensors.items()}
        level = family.random_level(torch.rand(2))
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            denoised = family.denoise(roles.student, torch.randn(2, *family.latent_shape), level, cond)
        saved = sum(storage.nbytes() for name, storage in storages.items() if name not in own)
        counted = estimates.pass_memory(recipe, "student", 2)
        assert saved == pytest.approx(counted.saved_between if checkpointing else counted.saved, rel=0.04)
        del denoised


def test_operations_are_those_of_plain_matrix_products(backbone, model, embeddings):
    """torch's own counter on a real pass, in which attention is two products."""
    network, level = backbone.load_model(), backbone.random_level(torch.rand(1))
    cond = {name: value[:1] for name, value in embeddings.tensors.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.denoise(network, torch.randn(1, *backbone.latent_shape), level, cond)
    assert model.forward_flops(recipe_with()) == counter.get_total_flops()


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
def test_the_passes_that_wait_for_a_backward_pass_are_counted(start, tmp_path, model, variant):
    """Compared with the largest amount that autograd holds at a time during a real cycle."""
    roles, records = start(tmp_path, max_steps=1, **VARIANTS[variant])
    own = {p.untyped_storage().data_ptr() for network in networks(roles) for p in network.parameters()}
    saved = SavedTensors(own)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        next(records)
    recipe = recipe_with(**VARIANTS[variant])
    expected = waiting_passes(recipe) * model.pass_memory(recipe, "student", 2).saved
    assert saved.peak == pytest.approx(expected, rel=0.05)


class SavedTensors:
    """Bytes of the storages that autograd holds, and their largest sum."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.users, self.now, self.peak = own, {}, 0, 0

    def pack(self, tensor: torch.Tensor):
        box = _Box(tensor)
        storage = tensor.untyped_storage()
        name, size = storage.data_ptr(), storage.nbytes()
        if name not in self.own:
            self.users[name] = self.users.get(name, 0) + 1
            self.now += size if self.users[name] == 1 else 0
            self.peak = max(self.peak, self.now)
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
    model.estimate(recipe_with(), SMALL)
    gc.collect()
    assert torch.equal(state, torch.get_rng_state())


# ---- remedies


def test_every_remedy_saves_the_bytes_it_names(model):
    recipe, execution = recipe_with(ema=0.5, batch_size=64), micro_batches_of(64)
    saved = dict(remedies(model, recipe, execution))
    now = model.estimate(recipe, execution).total
    smaller = {
        "train.roles=lora": (recipe_with(ema=0.5, batch_size=64, roles="lora"), execution),
        "train.student_micro_batch=32, train.fake_score_micro_batch=32, train.rollout_micro_batch=32": (
            recipe,
            micro_batches_of(32),
        ),
        "train.gradient_checkpointing=true": (recipe, micro_batches_of(64, **CHECKPOINTED)),
        "train.graded_steps=random": (recipe_with(ema=0.5, batch_size=64, graded_steps="random"), execution),
    }
    for text, changed in smaller.items():
        assert saved[text] == now - model.estimate(*changed).total > 0
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    phrase = next(phrase for phrase in describe_remedies(saved.items()).split("; ") if "train.roles=lora" in phrase)
    assert f"{saved['train.roles=lora'] / 2**30:.1f} GiB" in phrase


def test_a_guided_call_in_two_halves_keeps_less(model):
    joint, separate = (
        model.estimate(recipe_with(batch_size=64), micro_batches_of(64, guidance_batch=batch, **CHECKPOINTED))
        for batch in ("joint", "apart")
    )
    assert separate.activations < joint.activations


def test_sharding_is_named_only_if_several_processes_can_share_the_networks(model):
    recipe, text = recipe_with(batch_size=8, ema=0.5), "train.launch.sharding=fsdp2"
    assert dict(remedies(model, recipe, micro_batches_of(2, **FOUR)))[text] > 0
    assert text not in dict(remedies(model, recipe, micro_batches_of(2, **CHECKPOINTED)))
    assert text not in dict(remedies(model, recipe_with(batch_size=8, roles="lora"), micro_batches_of(2, **FOUR)))
    options = dict(remedies(model, recipe, micro_batches_of(2, sharded=True, **FOUR)))
    assert text not in options
    assert not any("roles=lora" in option and "sharding=none" not in option for option in options)


@pytest.mark.parametrize("spec, installs", [(None, True), (object(), False)], ids=["absent", "installed"])
def test_moments_in_8_bits_are_named_with_their_library_if_it_is_missing(model, monkeypatch, spec, installs):
    monkeypatch.setattr("dpdmd_pipeline.planning.gpu.find_spec", lambda _: spec)
    options = remedies(model, recipe_with(batch_size=8), micro_batches_of(8, **CHECKPOINTED))
    (eight_bits,) = [text for text, _ in options if "kind=adamw_8bit" in text]
    assert ("`pip install bitsandbytes`" in eight_bits) == installs


def test_without_remedies_the_description_is_still_a_phrase():
    assert "no option" in describe_remedies([])


@pytest.mark.parametrize("smaller, larger", [(16, 32), (32, 64)])
def test_a_larger_micro_batch_keeps_more_and_a_checkpointed_one_less(model, smaller, larger):
    recipe = recipe_with(batch_size=64)
    small, large = (model.estimate(recipe, micro_batches_of(size)).activations for size in (smaller, larger))
    assert model.estimate(recipe, micro_batches_of(larger, **CHECKPOINTED)).activations < large and small < large


def test_memory_is_that_of_the_largest_picture_size_and_work_that_of_the_mean(world_teacher):
    def of(resolution):
        options = {"resolution": resolution, "max_sequence_length": 0, "level_range": (0.02, 0.98)}
        family = load_backbone("sd3", world_teacher, **options)
        return MemoryModel(family, world_teacher, conditioning_like(family), GUIDANCE, device="cpu")

    several, largest, recipe = of([[16, 16], [32, 32]]), of(32), recipe_with(roles="lora")
    assert several.estimate(recipe, SMALL) == largest.estimate(recipe, SMALL)
    assert several.forward_flops(recipe) == largest.forward_flops(recipe) * (1 + 1 / 4) / 2


# ---- disk


def test_caches_on_disk_have_the_estimated_bytes(backbone, world_teacher, tmp_path):
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
def test_a_state_on_disk_has_the_estimated_bytes(start, tmp_path, model, changes):
    _, records = start(tmp_path, **changes)
    next(records), next(records), records.close()
    _, state = Checkpoints(tmp_path).load_latest()
    assert size(tensors_in(state)) == model.checkpoint_bytes(recipe_with(**changes))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


def test_a_large_rollout_decides_the_memory_of_a_run_of_small_micro_batches(model):
    recipe = recipe_with(batch_size=64, fake_score_turns=5, **DMD)
    rollouts = [micro_batches_of(1).model_copy(update={"rollout_micro_batch": size}) for size in (1, 320, 1000)]
    small, large, more = (model.estimate(recipe, execution).activations for execution in rollouts)
    assert small < large == more  # only the samples of one cycle are drawn
    assert large == model.pass_memory(recipe, "student", 320).block
    shared = recipe_with(batch_size=64, fake_score_turns=5, fake_rollout="shared", **DMD)
    assert model.estimate(shared, rollouts[1]).activations < large
