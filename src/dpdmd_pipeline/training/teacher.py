"""Train the embedded teachers: text encoders, autoencoder, transformer or UNet.

The world is finite, so the denoising target need not be sampled. The exact posterior over all legal images, given a
noisy latent, is one softmax; its mean is the quantity that flow matching and diffusion estimate. Training on it has the
same minimiser with far less variance (docs/decisions/0002-exact-targets.md).
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
from dpdmd_pipeline.training.checkpoint import Checkpoints, load_part
from dpdmd_pipeline.training.teacher_recipe import DecoderRecipe, FitRecipe, TeacherRecipe

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


# SDXL's size conditioning of an image that was neither scaled nor cropped: (H, W, 0, 0, H, W).
TIME_IDS = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]], dtype=torch.float32)

# No recipe changes these: both shipped teachers and the CLIP were trained with them.
_BETAS, _WEIGHT_DECAY = (0.9, 0.99), 0.01  # of AdamW
_WARMUP_SHARE = 0.1  # share of a fit's steps in which the learning rate rises; then it falls
_MAX_GRAD_NORM = 1.0
_KL_WEIGHT = 1e-5  # light: the latents are scaled to variance 1 afterwards, see `encode_gallery`
_L1_WEIGHT = 0.2  # beside the squared error
_MIN_UNIFORM = 0.01  # of the flow levels: the velocity target is divided by sigma
_TRAINING_SHIFT = 2.0  # of the flow levels: more weight at the levels that decide the free attributes


LossAt = Callable[[torch.Generator], Tensor]  # from a seeded generator to a scalar loss


def fit(
    modules: nn.Module,
    loss_at: LossAt,
    recipe: FitRecipe,
    *,
    seed: int,
    checkpoints: Checkpoints,
    checkpoint_every: int,
) -> Iterator[tuple[int, float]]:
    """Minimise a loss; yields (finished steps, loss). Step i draws from seed + i, so a fit resumes exactly.

    Raises:
        ValueError: if the loss is not finite.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=_BETAS, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.steps + 1, pct_start=_WARMUP_SHARE
    )
    stateful = {"modules": modules, "optimizer": optimizer, "schedule": schedule}
    start, state = checkpoints.load_latest() or (0, {})
    for name, content in state.items():
        load_part(stateful[name], content)
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
            state = {name: part.state_dict() for name, part in stateful.items()}
            checkpoints.save(done, state, finished=done == recipe.steps)
        yield done, loss.item()


def text_loss(
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    heads: nn.Module,
    tokenizer: CLIPTokenizer,
    _generator: torch.Generator,
) -> Tensor:
    """Cross-entropy of colour and shape read linearly from the pooled embedding of every caption; draws nothing."""
    tokens = tokenizer(captions(), padding="max_length", return_tensors="pt").input_ids
    prompts = torch.arange(len(tokens)) % NUM_PROMPTS
    output = encoder(tokens)
    pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
    colour, shape = heads(pooled).split([NUM_PROMPTS // len(SHAPES), len(SHAPES)], dim=1)
    return F.cross_entropy(colour, prompts // len(SHAPES)) + F.cross_entropy(shape, prompts % len(SHAPES))


def vae_loss(vae: AutoencoderKL, generator: torch.Generator, batch_size: int) -> Tensor:
    """Error of the restored image plus a light pull of the latents towards N(0, 1)."""
    pictures = gallery()
    images = pictures[torch.randint(len(pictures), (batch_size,), generator=generator)] * 2 - 1
    posterior = vae.encode(images).latent_dist
    restored = vae.decode(posterior.sample(generator)).sample
    return restoration_error(restored, images) + _KL_WEIGHT * posterior.kl().mean()


def restoration_error(restored: Tensor, images: Tensor) -> Tensor:
    """Squared and absolute error, [B, 3, H, W] in [-1, 1]."""
    return F.mse_loss(restored, images) + _L1_WEIGHT * F.l1_loss(restored, images)


def decoder_loss(vae: AutoencoderKL, latents: Tensor, generator: torch.Generator, recipe: DecoderRecipe) -> Tensor:
    """Error of images restored from latents with little noise.

    Together with the encoder, the decoder learns from samples of the posterior. Their noise hides the difference of a
    small circle and a small square; the latents of a teacher or a student are cleaner. `latents` has those of every
    legal image, in scaled units.
    """
    picture = torch.randint(len(latents), (recipe.batch_size,), generator=generator)
    clean = latents[picture]
    noisy = clean + recipe.noise * torch.randn(clean.shape, generator=generator)
    restored = vae.decode(noisy / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    return restoration_error(restored, gallery()[picture] * 2 - 1)


@torch.no_grad()
def encode_gallery(vae: AutoencoderKL) -> Tensor:
    """Latents of every legal image, [NUM_PROMPTS * NUM_MODES, C, H, W], with variance 1; SD3's are also centred.

    Sets the VAE's scaling factor, and its shift if it has one.
    """
    raw = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in gallery().split(96)])
    vae.register_to_config(scaling_factor=1 / raw.std().item())
    if vae.config.shift_factor is None:
        return raw * vae.config.scaling_factor
    vae.register_to_config(shift_factor=raw.mean().item())
    return (raw - vae.config.shift_factor) * vae.config.scaling_factor


def posterior_mean(noisy: Tensor, level: NoiseLevel, pictures: Tensor, allowed: Tensor) -> Tensor:
    """E[x0 | noisy] for x0 uniform over the allowed pictures: the exact denoiser.

    Args:
        noisy: [B, C, H, W] at `level`.
        level: per sample, [B, 1, 1, 1], none of them clean.
        pictures: [M, C, H, W], clean latents.
        allowed: [B, M] bool, True for the pictures that the sample's prompt permits.
    """
    flat, alpha, sigma = pictures.flatten(1), level.alpha.view(-1, 1), level.sigma.view(-1, 1)
    scores = alpha * (noisy.flatten(1) @ flat.T) - 0.5 * alpha**2 * flat.square().sum(1)
    weights = (scores / sigma**2).masked_fill(~allowed, -torch.inf).softmax(1)
    return (weights @ flat).view_as(noisy)


@dataclass(frozen=True)
class DenoisingData:
    """Training data of the denoising network: clean latents; embeddings of all captions, then of the empty prompt."""

    pictures: Tensor  # [NUM_PROMPTS * NUM_MODES, C, H, W]
    prompt_embeds: Tensor  # [N + 1, L, D]
    pooled_embeds: Tensor  # [N + 1, D]


class Examples(NamedTuple):
    """A batch: noisy latents, and their exact denoised x0."""

    noisy: Tensor  # [B, C, H, W] at `level`
    level: NoiseLevel  # per sample
    x0: Tensor  # [B, C, H, W], posterior mean under the sample's prompt
    row: Tensor  # [B] int64, of the data's embeddings


def draw_examples(
    data: DenoisingData,
    level_at: Callable[[Tensor], NoiseLevel],
    generator: torch.Generator,
    batch_size: int,
    dropout: float,
) -> Examples:
    """Noisy pictures under random captions; a share of the prompts is empty.

    Args:
        level_at: from uniform numbers [B, 1, 1, 1] in [0, 1) to noise levels.
        dropout: share of empty prompts, which permit all pictures.
    """
    num_captions = len(data.prompt_embeds) - 1
    caption = torch.randint(num_captions, (batch_size,), generator=generator)
    prompt = caption % NUM_PROMPTS
    picture = prompt * NUM_MODES + torch.randint(NUM_MODES, (batch_size,), generator=generator)
    empty = torch.rand(batch_size, generator=generator) < dropout
    level = level_at(torch.rand(batch_size, generator=generator).view(-1, 1, 1, 1))
    x0 = data.pictures[picture]
    noisy = add_noise(x0, torch.randn(x0.shape, generator=generator), level)
    owner = torch.arange(len(data.pictures)) // NUM_MODES
    allowed = empty[:, None] | (owner[None, :] == prompt[:, None])
    expected = posterior_mean(noisy, level, data.pictures, allowed)
    return Examples(noisy, level, expected, torch.where(empty, num_captions, caption))


def decisive_flow_level(uniform: Tensor) -> NoiseLevel:
    """Flow levels from uniform numbers by SD3's shift, [B, 1, 1, 1] both; none is clean."""
    uniform = uniform.clamp(min=_MIN_UNIFORM)
    return flow_level(_TRAINING_SHIFT * uniform / (1 + (_TRAINING_SHIFT - 1) * uniform))


def transformer_loss(
    transformer: nn.Module, data: DenoisingData, generator: torch.Generator, batch_size: int, dropout: float
) -> Tensor:
    """Velocity error against the exact posterior mean."""
    noisy, level, x0, row = draw_examples(data, decisive_flow_level, generator, batch_size, dropout)
    predicted = transformer(
        hidden_states=noisy,
        timestep=level.timestep.flatten(),
        encoder_hidden_states=data.prompt_embeds[row],
        pooled_projections=data.pooled_embeds[row],
    ).sample
    return F.mse_loss(predicted, (noisy - x0) / level.sigma)


def unet_loss(
    unet: nn.Module,
    alphas_cumprod: Tensor,
    data: DenoisingData,
    generator: torch.Generator,
    batch_size: int,
    dropout: float,
) -> Tensor:
    """Error of the predicted noise against that of the exact posterior mean, at uniform timesteps.

    The weight 1/alpha^2 makes it the error of the v-prediction (arXiv:2202.00512). An error of the noise moves x0 by
    sigma/alpha as much: 15 times at the first step, which decides the image.
    """

    def level_at(uniform: Tensor) -> NoiseLevel:
        return vp_level((uniform * len(alphas_cumprod)).long(), alphas_cumprod)

    noisy, level, x0, row = draw_examples(data, level_at, generator, batch_size, dropout)
    predicted = unet(
        noisy,
        level.timestep.flatten(),
        encoder_hidden_states=data.prompt_embeds[row],
        added_cond_kwargs={"text_embeds": data.pooled_embeds[row], "time_ids": TIME_IDS.expand(batch_size, -1)},
    ).sample
    noise = (noisy - level.alpha * x0) / level.sigma
    return ((predicted - noise) / level.alpha).square().mean()


# Runs one fit to its end: (name, total steps, records).
Follow = Callable[[str, int, Iterator[tuple[int, float]]], None]

# Trains one network: (name, modules, loss, recipe).
Train = Callable[[str, nn.Module, LossAt, FitRecipe], None]


def train_teacher(recipe: TeacherRecipe, state: Path, follow: Follow) -> DiffusionPipeline:
    """Train all networks in order; finished ones are loaded from the checkpoints in `state`."""

    def train(name: str, modules: nn.Module, loss_at: LossAt, fit_recipe: FitRecipe) -> None:
        checkpoints, every = Checkpoints(state / name), recipe.checkpoint_every
        records = fit(modules, loss_at, fit_recipe, seed=recipe.seed, checkpoints=checkpoints, checkpoint_every=every)
        follow(name, fit_recipe.steps, records)

    if recipe.transformer:
        pipeline = make_pipeline(max_length=recipe.max_length, shift=recipe.shift, seed=recipe.seed)
    else:
        pipeline = make_sdxl_pipeline(max_length=recipe.max_length, seed=recipe.seed)
    train_encoders(pipeline, recipe, train)
    data = encode_data(pipeline)
    if recipe.transformer:
        name, network_recipe = "transformer", recipe.transformer
        loss = partial(transformer_loss, pipeline.transformer, data)
    else:
        name, network_recipe = "unet", recipe.unet
        loss = partial(unet_loss, pipeline.unet, pipeline.scheduler.alphas_cumprod, data)
    loss = partial(loss, batch_size=network_recipe.batch_size, dropout=recipe.prompt_dropout)
    train(name, getattr(pipeline, name), loss, network_recipe)
    return pipeline


def train_encoders(pipeline: DiffusionPipeline, recipe: TeacherRecipe, train: Train) -> None:
    """Train everything before the denoising network: both text encoders, the autoencoder, and its decoder again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # of the heads, which are discarded
        for name, tokenizer in (("text_encoder", pipeline.tokenizer), ("text_encoder_2", pipeline.tokenizer_2)):
            encoder = getattr(pipeline, name)
            heads = nn.Linear(encoder.config.projection_dim, NUM_PROMPTS // len(SHAPES) + len(SHAPES))
            loss = partial(text_loss, encoder, heads, tokenizer)
            train(name, nn.ModuleList([encoder, heads]), loss, recipe.text_encoders)
    vae = pipeline.vae
    train("vae", vae, partial(vae_loss, vae, batch_size=recipe.vae.batch_size), recipe.vae)
    loss = partial(decoder_loss, vae, encode_gallery(vae), recipe=recipe.decoder)
    train("decoder", vae.decoder, loss, recipe.decoder)


@torch.no_grad()
def encode_data(pipeline: DiffusionPipeline) -> DenoisingData:
    """Encode the gallery and all captions; sets the VAE's scaling factor, and its shift if it has one.

    The empty prompt of SDXL is zeros.
    """
    pictures = encode_gallery(pipeline.vae)
    if hasattr(pipeline, "transformer"):
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [*captions(), ""], None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
    else:
        embeds, _, pooled, _ = pipeline.encode_prompt(captions(), do_classifier_free_guidance=False)
        embeds, pooled = (torch.cat([rows, torch.zeros_like(rows[:1])]) for rows in (embeds, pooled))
    return DenoisingData(pictures, embeds, pooled)
