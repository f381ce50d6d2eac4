"""Tiny pipelines of the real classes, one folder per family.

python tests/teachers.py z_image FOLDER    # or flux2_klein, qwen_image
"""

import json
import shutil
import sys

import pytest
import torch


@pytest.fixture(scope="session")
def edited(tmp_path_factory):
    """Function that copies a teacher's folder and changes values in one of its JSON files."""

    def edit(teacher, file, **values):
        folder = tmp_path_factory.mktemp("edited") / "teacher"
        shutil.copytree(teacher, folder)
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))
        return folder

    return edit


@pytest.fixture(scope="session")
def decoding_teacher(tiny_teacher, edited):
    """The tiny teacher with SD3.5's scale and shift of latents, so that decoding must undo both."""
    return edited(tiny_teacher, "vae/config.json", scaling_factor=1.5305, shift_factor=0.0609)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory, edited):
    """An untrained StableDiffusionXLPipeline directory of the embedded world's sizes, with SDXL's scale of latents."""
    from dpdmd_pipeline.shapes.models import make_sdxl_pipeline

    folder = tmp_path_factory.mktemp("sdxl") / "teacher"
    make_sdxl_pipeline(max_length=12, seed=0).save_pretrained(folder)
    return edited(folder, "vae/config.json", scaling_factor=0.13025)


@pytest.fixture(scope="session")
def tiny_sdxl_v(tiny_sdxl, edited):
    """The tiny SDXL with a network that returns the v-prediction."""
    return edited(tiny_sdxl, "scheduler/scheduler_config.json", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_sana(tmp_path_factory):
    """An untrained SanaPipeline directory: 32x32 pixels to 8x8x8 latents, one token per byte, SANA's shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    folder = tmp_path_factory.mktemp("sana") / "teacher"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, text_encoder = make_gemma()
        SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=make_deep_compression_autoencoder(),
            transformer=make_linear_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)
    return folder


def make_gemma():
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    config = Gemma2Config(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    return tokenizer, Gemma2Model(config)


def make_linear_transformer():
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        timestep_scale=0.5,  # not 1, so that forgetting it shows
    )


def make_deep_compression_autoencoder():
    from diffusers import AutoencoderDC

    both = {
        "block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
        "block_out_channels": (8, 16, 16),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), ()),
    }
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        downsample_block_type="stride_conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in both.items()},
    )


def save_teacher(make, folder):
    """Save the pipeline that a function makes, with its random weights from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (  # of Qwen3, for one question of a user
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_qwen_tokenizer():
    """Qwen's tokenizer without merges: one token per byte and per special word, and a chat template."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_config(kind, tokenizer, **values):
    """Config of a tiny language model of Qwen's shape."""
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        **{"num_hidden_layers": 3, **values},
    )


def make_z_image():
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = make_qwen_tokenizer()
    return ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(qwen_config(Qwen3Config, tokenizer)),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=16,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=make_single_stream_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory):
    """An untrained ZImagePipeline directory: 32x32 pixels to 16x8x8 latents, Z-Image's shift, scale and patches."""
    return save_teacher(make_z_image, tmp_path_factory.mktemp("z_image") / "teacher")


def make_single_stream_transformer():
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 8, 8],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # zeros in an untrained network, so that a wrong padding would not show
    return transformer


def make_qwen_image():
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    tokenizer = make_qwen_tokenizer()
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=make_vision_language_model(tokenizer),
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]),
        transformer=make_dual_stream_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


@pytest.fixture(scope="session")
def tiny_qwen_image(tmp_path_factory):
    """An untrained QwenImagePipeline directory: 32x32 pixels to 16x8x8 latents, Qwen-Image's scheduler."""
    return save_teacher(make_qwen_image, tmp_path_factory.mktemp("qwen_image") / "teacher")


def make_vision_language_model(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextConfig

    text = qwen_config(
        Qwen2_5_VLTextConfig, tokenizer, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}
    )
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision))


def make_dual_stream_transformer():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


KLEIN_MEANS, KLEIN_VARIANCES = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)  # of packed latents


def normalised(latents):
    """Packed latents of the tiny Klein's autoencoder as its network sees them."""
    mean, variance = (value.view(1, -1, 1, 1) for value in (KLEIN_MEANS, KLEIN_VARIANCES))
    return (latents - mean) / (variance + 1e-4).sqrt()


def make_flux2_klein():
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_qwen_tokenizer()
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.bn.running_mean.copy_(KLEIN_MEANS)
    vae.bn.running_var.copy_(KLEIN_VARIANCES)
    return Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3ForCausalLM(qwen_config(Qwen3Config, tokenizer, num_hidden_layers=28)),
        vae=vae,
        transformer=make_klein_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@pytest.fixture(scope="session")
def tiny_flux2_klein(tmp_path_factory):
    """An untrained Flux2KleinPipeline directory: 32x32 pixels to 16x8x8 packed latents, Klein's scheduler."""
    return save_teacher(make_flux2_klein, tmp_path_factory.mktemp("flux2_klein") / "teacher")


def make_klein_transformer():
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


if __name__ == "__main__":
    family, folder = sys.argv[1:]
    makers = {"flux2_klein": make_flux2_klein, "qwen_image": make_qwen_image, "z_image": make_z_image}
    save_teacher(makers[family], folder)
