"""Trains the embedded teachers: tokenizer and text encoders, autoencoder, transformer or UNet.

The world is finite, so the denoising target need not be sampled: given a noisy latent, the exact
posterior over all legal pictures is one softmax, and its mean is what flow matching and diffusion
estimate. Training on it has the same minimiser with far less variance
(docs/decisions/0002-exact-targets.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdmd_pipeline.dpdmd.noise import NoiseLevel, add_noise, flow_level, vp_level
from dpdmd_pipeline.shapes.models import make_pipeline, make_sdxl_pipeline
from dpdmd_pipeline.shapes.world import NUM_MODES, NUM_PROMPTS, RESOLUTION, SHAPES, captions, gallery
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.sharding import load_whole_state
from dpdmd_pipeline.training.teacher_recipe import DecoderRecipe, FitRecipe, TeacherRecipe

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


# What SDXL is told of a picture that was neither scaled nor cropped: (H, W, 0, 0, H, W).
TIME_IDS = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]], dtype=torch.float32)

# What no recipe changes: both teachers and the CLIP that are shipped were trained with these.
_BETAS, _WEIGHT_DECAY = (0.9, 0.99), 0.01  # of AdamW
_RISING_SHARE = 0.1  # of a fit's steps: the learning rate rises for so long, then falls
_MAX_GRAD_NORM = 1.0
_KL_WEIGHT = 1e-5  # light: the latents are brought to variance 1 afterwards, see `encode_gallery`
_L1_WEIGHT = 0.2  # beside the squared error
_LEAST_UNIFORM = 0.01  # of the flow's levels: the velocity's target is divided by sigma
_TRAINING_SHIFT = 2.0  # of the flow's levels: more weight where the free attributes are decided


def fit(
    modules: nn.Module,
    loss_at: Callable[[torch.Generator], Tensor],
    recipe: FitRecipe,
    *,
    seed: int,
    checkpoints: Checkpoints,
    checkpoint_every: int,
) -> Iterator[tuple[int, float]]:
    """Minimise `loss_at(generator)`; yields (finished steps, loss). Resumes from the checkpoints, exactly.

    Args:
        modules: whose parameters are trained.
        loss_at: from a seeded generator to a scalar loss.
        recipe: sizes and rates.
        seed: step i draws from seed + i.
        checkpoints: where to resume from and save to.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: when the loss is not finite.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps + 1, pct_start=_RISING_SHARE
    )
    stateful = {"modules": modules, "optimizer": optimizer, "schedule": schedule}
    start, state = checkpoints.load_latest() or (0, {})
    for name, content in state.items():
        load_whole_state(stateful[name], content)
    for step in range(start, recipe.steps):
        loss = loss_at(torch.Generator().manual_seed(seed + step))
        if not loss.isfinite():
            raise ValueError(f"loss is {loss.item()} at step {step + 1}: lower learning_rate={recipe.learning_rate}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % checkpoint_every == 0 or done == recipe.steps:
            state = {name: thing.state_dict() for name, thing in stateful.items()}
            checkpoints.save(done, state, finished=done == recipe.steps)
        yield done, loss.item()


def text_loss(
    encoder: CLIPTextModel | CLIPTextModelWithProjection, heads: nn.Module, tokenizer: CLIPTokenizer
) -> Tensor:
    """Cross-entropy of colour and shape read linearly from the pooled embedding of every caption."""
    tokens = tokenizer(captions(), padding="max_length", return_tensors="pt").input_ids
    prompts = torch.arange(len(tokens)) % NUM_PROMPTS
    output = encoder(tokens)
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    colour, shape = heads(pooled).split([NUM_PROMPTS // len(SHAPES), len(SHAPES)], dim=1)
    return F.cross_entropy(colour, prompts // len(SHAPES)) + F.cross_entropy(shape, prompts % len(SHAPES))


def vae_loss(vae: AutoencoderKL, generator: torch.Generator, batch_size: int) -> Tensor:
    """Error of the restored picture plus a light pull of the latents towards N(0, 1)."""
    pictures = gallery()
    images = pictures[torch.randint(len(pictures), (batch_size,), generator=generator)] * 2 - 1
    posterior = vae.encode(images).latent_dist
    restored = vae.decode(posterior.sample(generator)).sample
    return restoration_error(restored, images) + _KL_WEIGHT * posterior.kl().mean()


def restoration_error(restored: Tensor, images: Tensor) -> Tensor:
    """Squared and absolute error, [B, 3, H, W] in [-1, 1]."""
    return F.mse_loss(restored, images) + _L1_WEIGHT * F.l1_loss(restored, images)


def decoder_loss(vae: AutoencoderKL, latents: Tensor, generator: torch.Generator, recipe: DecoderRecipe) -> Tensor:
    """The same error from latents that are hardly noisy.

    Beside the encoder the decoder learns from samples of the posterior, whose noise hides the difference of a small
    circle and a small square; the latents that a teacher or a student makes are cleaner than that.

    Args:
        vae: of which the decoder learns.
        latents: of every legal picture, in scaled units.
        generator: decides pictures and noise.
        recipe: has the batch size and the noise.
    """
    picture = torch.randint(len(latents), (recipe.batch_size,), generator=generator)
    clean = latents[picture]
    noisy = clean + recipe.noise * torch.randn(clean.shape, generator=generator)
    restored = vae.decode(noisy / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    return restoration_error(restored, gallery()[picture] * 2 - 1)


@torch.no_grad()
def encode_gallery(vae: AutoencoderKL) -> Tensor:
    """Latents of every legal picture with variance 1: sets the VAE's scaling factor, and its shift if it has one.

    Returns:
        [NUM_PROMPTS * NUM_MODES, C, H, W]; SD3's are centred, SDXL's scaled alone.
    """
    raw = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in gallery().split(96)])
    vae.register_to_config(scaling_factor=1 / raw.std().item())
    if vae.config.shift_factor is None:
        return raw * vae.config.scaling_factor
    vae.register_to_config(shift_factor=raw.mean().item())
    return (raw - vae.config.shift_factor) * vae.config.scaling_factor


def posterior_mean(noisy: Tensor, level: NoiseLevel, pictures: Tensor, allowed: Tensor) -> Tensor:
    """E[x0 | noisy] when x0 is uniform over the allowed pictures: the exact denoiser.

    Args:
        noisy: [B, C, H, W] at `level`.
        level: per sample, [B, 1, 1, 1], none of them clean.
        pictures: [M, C, H, W], clean latents.
        allowed: [B, M] bool, which pictures the sample's prompt permits.
    """
    flat, alpha, sigma = pictures.flatten(1), level.alpha.view(-1, 1), level.sigma.view(-1, 1)
    scores = alpha * (noisy.flatten(1) @ flat.T) - 0.5 * alpha**2 * flat.square().sum(1)
    weights = (scores / sigma**2).masked_fill(~allowed, -torch.inf).softmax(1)
    return (weights @ flat).view_as(noisy)


@dataclass(frozen=True)
class Lesson:
    """What the denoising network learns from: clean latents and the embeddings of all captions.

    Attributes:
        pictures: [NUM_PROMPTS * NUM_MODES, C, H, W].
        prompt_embeds, pooled_embeds: of the captions, then of the empty prompt; [N + 1, L, D], [N + 1, D].
    """

    pictures: Tensor
    prompt_embeds: Tensor
    pooled_embeds: Tensor


class Examples(NamedTuple):
    """A batch to learn from: noisy latents, and the exact x0 that is expected of them."""

    noisy: Tensor  # [B, C, H, W] at `level`
    level: NoiseLevel  # per sample
    x0: Tensor  # [B, C, H, W], posterior mean under the sample's prompt
    row: Tensor  # [B] int64, of the lesson's embeddings


def draw_examples(
    lesson: Lesson,
    level_at: Callable[[Tensor], NoiseLevel],
    generator: torch.Generator,
    batch_size: int,
    dropout: float,
) -> Examples:
    """Noisy pictures under random captions; a share of the prompts is empty.

    Args:
        lesson: pictures and captions.
        level_at: from uniform numbers [B, 1, 1, 1] in [0, 1) to noise levels.
        generator: decides all draws.
        batch_size: B.
        dropout: share of empty prompts, whose posterior runs over all pictures.
    """
    num_captions = len(lesson.prompt_embeds) - 1
    caption = torch.randint(num_captions, (batch_size,), generator=generator)
    prompt = caption % NUM_PROMPTS
    picture = prompt * NUM_MODES + torch.randint(NUM_MODES, (batch_size,), generator=generator)
    empty = torch.rand(batch_size, generator=generator) < dropout
    level = level_at(torch.rand(batch_size, generator=generator).view(-1, 1, 1, 1))
    x0 = lesson.pictures[picture]
    noisy = add_noise(x0, torch.randn(x0.shape, generator=generator), level)
    owner = torch.arange(len(lesson.pictures)) // NUM_MODES
    allowed = empty[:, None] | (owner[None, :] == prompt[:, None])
    expected = posterior_mean(noisy, level, lesson.pictures, allowed)
    return Examples(noisy, level, expected, torch.where(empty, num_captions, caption))


def decisive_flow_level(uniform: Tensor) -> NoiseLevel:
    """SD3's shifted map of the uniform, [B, 1, 1, 1] both; none is clean."""
    uniform = uniform.clamp(min=_LEAST_UNIFORM)
    return flow_level(_TRAINING_SHIFT * uniform / (1 + (_TRAINING_SHIFT - 1) * uniform))


def transformer_loss(
    transformer: nn.Module, lesson: Lesson, generator: torch.Generator, batch_size: int, dropout: float
) -> Tensor:
    """Velocity error against the exact posterior mean."""
    noisy, level, x0, row = draw_examples(lesson, decisive_flow_level, generator, batch_size, dropout)
    predicted = transformer(
        hidden_states=noisy,
        timestep=level.timestep.flatten(),
        encoder_hidden_states=lesson.prompt_embeds[row],
        pooled_projections=lesson.pooled_embeds[row],
    ).sample
    return F.mse_loss(predicted, (noisy - x0) / level.sigma)


def unet_loss(
    unet: nn.Module,
    alphas_cumprod: Tensor,
    lesson: Lesson,
    generator: torch.Generator,
    batch_size: int,
    dropout: float,
) -> Tensor:
    """Error of the predicted noise against that of the exact posterior mean, at uniform timesteps.

    It is weighted by 1/alpha^2, which makes it the error of the v-prediction (arXiv:2202.00512): an error of the
    noise moves x0 by sigma/alpha as much, 15 times at the first step, and that step decides what is drawn.
    """

    def level_at(uniform: Tensor) -> NoiseLevel:
        return vp_level((uniform * len(alphas_cumprod)).long(), alphas_cumprod)

    noisy, level, x0, row = draw_examples(lesson, level_at, generator, batch_size, dropout)
    predicted = unet(
        noisy,
        level.timestep.flatten(),
        encoder_hidden_states=lesson.prompt_embeds[row],
        added_cond_kwargs={"text_embeds": lesson.pooled_embeds[row], "time_ids": TIME_IDS.expand(batch_size, -1)},
    ).sample
    noise = (noisy - level.alpha * x0) / level.sigma
    return ((predicted - noise) / level.alpha).square().mean()


# Consumes the records of one fit: (name, total steps, records).
Follow = Callable[[str, int, Iterator[tuple[int, float]]], None]


# Trains one network: (name, what is trained, its loss, how).
Train = Callable[[str, nn.Module, Callable[[torch.Generator], Tensor], FitRecipe], None]


def train_teacher(recipe: TeacherRecipe, state: Path, follow: Follow) -> DiffusionPipeline:
    """Train all parts in order; what is finished is loaded from `state`, not trained again.

    Args:
        recipe: which teacher, and how it is trained.
        state: folder of the checkpoints.
        follow: runs each fit to its end.
    """

    def train(name: str, modules: nn.Module, loss_at: Callable[[torch.Generator], Tensor], fitted: FitRecipe) -> None:
        checkpoints = Checkpoints(state / name)
        records = fit(
            modules,
            loss_at,
            fitted,
            seed=recipe.seed,
            checkpoints=checkpoints,
            checkpoint_every=recipe.checkpoint_every,
        )
        follow(name, fitted.steps, records)

    return {"sd3": train_sd3, "sdxl": train_sdxl}[recipe.family](recipe, train)


def train_sd3(recipe: TeacherRecipe, train: Train) -> StableDiffusion3Pipeline:
    """The flow-matching teacher."""
    pipeline = make_pipeline(max_length=recipe.max_length, shift=recipe.shift, seed=recipe.seed)
    train_encoders(pipeline, recipe, train)
    fitted = recipe.transformer
    loss = partial(
        transformer_loss,
        pipeline.transformer,
        sd3_lesson(pipeline),
        batch_size=fitted.batch_size,
        dropout=recipe.prompt_dropout,
    )
    train("transformer", pipeline.transformer, loss, fitted)
    return pipeline


def train_sdxl(recipe: TeacherRecipe, train: Train) -> StableDiffusionXLPipeline:
    """The diffusion teacher."""
    pipeline = make_sdxl_pipeline(max_length=recipe.max_length, seed=recipe.seed)
    train_encoders(pipeline, recipe, train)
    fitted = recipe.unet
    loss = partial(
        unet_loss,
        pipeline.unet,
        pipeline.scheduler.alphas_cumprod,
        sdxl_lesson(pipeline),
        batch_size=fitted.batch_size,
        dropout=recipe.prompt_dropout,
    )
    train("unet", pipeline.unet, loss, fitted)
    return pipeline


def train_encoders(pipeline: DiffusionPipeline, recipe: TeacherRecipe, train: Train) -> None:
    """What comes before the denoising network: both text encoders, the autoencoder, and its decoder once more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # of the heads, which are thrown away
        for name, tokenizer in (("text_encoder", pipeline.tokenizer), ("text_encoder_2", pipeline.tokenizer_2)):
            encoder = getattr(pipeline, name)
            heads = nn.Linear(encoder.config.projection_dim, NUM_PROMPTS // len(SHAPES) + len(SHAPES))
            loss = partial(_text_loss_at, encoder, heads, tokenizer)
            train(name, nn.ModuleList([encoder, heads]), loss, recipe.text_encoders)
    vae = pipeline.vae
    train("vae", vae, partial(vae_loss, vae, batch_size=recipe.vae.batch_size), recipe.vae)
    loss = partial(decoder_loss, vae, encode_gallery(vae), recipe=recipe.decoder)
    train("decoder", vae.decoder, loss, recipe.decoder)


def _text_loss_at(encoder: nn.Module, heads: nn.Module, tokenizer: CLIPTokenizer, _: torch.Generator) -> Tensor:
    return text_loss(encoder, heads, tokenizer)


@torch.no_grad()
def sd3_lesson(pipeline: StableDiffusion3Pipeline) -> Lesson:
    """Encode the gallery and all captions; the VAE's shift and scaling factors are set on the way."""
    pictures = encode_gallery(pipeline.vae)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        [*captions(), ""], None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    return Lesson(pictures, embeds, pooled)


@torch.no_grad()
def sdxl_lesson(pipeline: StableDiffusionXLPipeline) -> Lesson:
    """Encode the gallery and all captions, the empty prompt as zeros; the VAE's scaling factor is set on the way."""
    pictures = encode_gallery(pipeline.vae)
    embeds, _, pooled, _ = pipeline.encode_prompt(captions(), do_classifier_free_guidance=False)
    embeds, pooled = (torch.cat([known, torch.zeros_like(known[:1])]) for known in (embeds, pooled))
    return Lesson(pictures, embeds, pooled)
