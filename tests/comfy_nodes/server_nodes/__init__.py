"""Nodes for the server tests: tensors in and out of a workflow through files, and a tiny SDXL."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import comfy.latent_formats
import comfy.ldm.flux.model
import comfy.model_detection
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from safetensors.torch import load_file, save_file

TINY_CHANNELS, TINY_CONTEXT, TINY_POOLED = 64, 64, 32
_FOREIGN = {"kedro", "dvc", "diffusers", "accelerate", "dpdmd_pipeline"}


class TinySDXL(comfy.supported_models.SDXL):
    """SDXL with other sizes, by which ComfyUI detects it. Everything after detection is ComfyUI's own SDXL."""

    unet_config = comfy.supported_models.SDXL.unet_config | {
        "model_channels": TINY_CHANNELS,
        "transformer_depth": [0, 1],
        "context_dim": TINY_CONTEXT,
        "adm_in_channels": TINY_POOLED + 6 * 256,
    }


TINY_UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": TINY_CHANNELS,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "num_head_channels": 64,
    "context_dim": TINY_CONTEXT,
    "num_classes": "sequential",
    "adm_in_channels": TINY_POOLED + 6 * 256,
    "legacy": False,
    "dtype": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}


def _register_tiny_sdxl() -> None:
    detect = comfy.model_detection.unet_config_from_diffusers_unet

    def with_tiny(state_dict, *args, **kwargs):
        if state_dict.get("conv_in.weight", torch.empty(0)).shape[:1] == (TINY_CHANNELS,):
            return comfy.model_detection.convert_config(dict(TINY_UNET))
        return detect(state_dict, *args, **kwargs)

    comfy.model_detection.unet_config_from_diffusers_unet = with_tiny
    comfy.supported_models.models.insert(0, TinySDXL)


_register_tiny_sdxl()


TINY_Z_IMAGE = {  # 3 heads of 128, as wide as Z-Image's; its own network has 30
    "dim": 384,
    "n_heads": 3,
    "n_kv_heads": 3,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}


def _register_tiny_z_image() -> None:
    if not hasattr(comfy.supported_models, "ZImage"):  # older versions
        return
    detect = comfy.model_detection.detect_unet_config

    def with_tiny(*args, **kwargs):
        config = detect(*args, **kwargs)
        is_tiny = config is not None and config.get("dim") == TINY_Z_IMAGE["dim"]
        return config | TINY_Z_IMAGE if is_tiny and config.get("image_model") == "lumina2" else config

    class TinyZImage(comfy.supported_models.ZImage):
        unet_config = {"image_model": "lumina2", "dim": TINY_Z_IMAGE["dim"]}

    comfy.model_detection.detect_unet_config = with_tiny
    comfy.supported_models.models.insert(0, TinyZImage)


_register_tiny_z_image()

TINY_QWEN_IMAGE = {  # ComfyUI reads none of these off the weights
    "num_attention_heads": 1,
    "attention_head_dim": 64,
    "joint_attention_dim": 32,
    "axes_dims_rope": (16, 24, 24),
}


def _register_tiny_qwen_image() -> None:
    detect = comfy.model_detection.detect_unet_config

    def with_tiny(state_dict, prefix, *args, **kwargs):
        config = detect(state_dict, prefix, *args, **kwargs)
        is_qwen = config is not None and config.get("image_model") == "qwen_image"
        is_tiny = is_qwen and len(state_dict[f"{prefix}img_in.weight"]) == 64
        return config | TINY_QWEN_IMAGE if is_tiny else config

    comfy.model_detection.detect_unet_config = with_tiny


_register_tiny_qwen_image()

_TINY_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 1,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 24, 24],
    "theta": 10000,
    "qkv_bias": True,
}
if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:  # older versions of ComfyUI lack it
    _TINY_FLUX["txt_ids_dims"] = []
_TINY_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [300, 64, 64],
}
TINY = {  # name -> ComfyUI's class of the family, with sizes that take the tests' prompts
    "Flux": ("Flux", _TINY_FLUX | {"guidance_embed": True}),
    "FluxSchnell": ("FluxSchnell", _TINY_FLUX | {"guidance_embed": False}),
    "QwenImage": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "num_layers": 1,
            **TINY_QWEN_IMAGE,
        },
    ),
    "Wan": (
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 128,
            "ffn_dim": 64,
            "text_dim": 32,
            "num_heads": 1,
            "num_layers": 1,
        },
    ),
    "Lumina2": ("Lumina2", _TINY_LUMINA),
    "ZImage": ("ZImage", _TINY_LUMINA | {"z_image_modulation": True, "time_scale": 1000.0}),  # not in older versions
    "OtherText": ("Lumina2", _TINY_LUMINA | {"cap_feat_dim": 48}),
}


def _node(returns: tuple[str, ...], **inputs):
    """Turn a function into a node; its last input is always a path."""

    def decorate(function):
        class Node:
            RETURN_TYPES = returns
            FUNCTION = "run"
            CATEGORY = "test"
            OUTPUT_NODE = not returns

            @classmethod
            def INPUT_TYPES(cls):  # noqa: N802
                return {"required": {name: (kind, {}) for name, kind in inputs.items()}}

            def run(self, **values):
                return function(**values) or {}

        NODE_CLASS_MAPPINGS[function.__name__] = Node
        return function

    return decorate


NODE_CLASS_MAPPINGS: dict[str, type] = {}


@_node(("CONDITIONING",), path="STRING")
def TestConditioning(path):  # noqa: N802
    """Embeddings from a file: prompt_embeds [1, tokens, width], pooled_embeds [1, width]; optionally attention_mask."""
    embeds = load_file(path)
    tokens = embeds.pop("prompt_embeds")
    return ([[tokens, {"pooled_output": embeds.pop("pooled_embeds"), **embeds}]],)


@_node(("LATENT",), path="STRING")
def TestLatent(path):  # noqa: N802
    """A LATENT from a file: samples, optionally noise_mask and batch_index."""
    latent = load_file(path)
    if "batch_index" in latent:
        latent["batch_index"] = latent["batch_index"].tolist()
    return (latent,)


@_node(("SIGMAS",), text="STRING", path="STRING")
def ManualSigmasForTests(text, path):  # noqa: N802
    """Any numbers as SIGMAS; older versions have no node for it."""
    return (torch.tensor([float(word) for word in text.split(",")]),)


@_node((), latent="LATENT", path="STRING")
def TestSaveLatent(latent, path):  # noqa: N802
    save_file({"samples": latent["samples"].contiguous()}, path)


@_node((), image="IMAGE", path="STRING")
def TestSaveImage(image, path):  # noqa: N802
    save_file({"image": image.contiguous()}, path)


@_node((), number="FLOAT", path="STRING")
def TestSaveNumber(number, path):  # noqa: N802
    Path(path).write_text(json.dumps(number))


@_node(("VAE",), path="STRING")
def TestVAE(path):  # noqa: N802
    """A stand-in that shows three channels of the latents, eight times as large."""

    class Decoder:
        def decode(self, samples):
            pixels = samples[:, :3].sigmoid().movedim(1, -1)
            return pixels.repeat_interleave(8, -3).repeat_interleave(8, -2)

    return (Decoder(),)


@_node((), noise="NOISE", path="STRING")
def TestSaveNestedNoise(noise, path):  # noqa: N802
    """Noise for pictures and sound in one LATENT, as models of films with sound have it."""
    from comfy.nested_tensor import NestedTensor

    samples = NestedTensor([torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 5)])
    pictures, sound = noise.generate_noise({"samples": samples}).unbind()
    save_file({"pictures": pictures, "sound": sound}, path)


@_node((), sigmas="SIGMAS", path="STRING")
def TestSaveSigmas(sigmas, path):  # noqa: N802
    save_file({"sigmas": sigmas.contiguous()}, path)


@_node((), text="STRING", path="STRING")
def TestSaveText(text, path):  # noqa: N802
    Path(path).write_text(text)


@_node(("MODEL",), family="STRING", seed="INT", path="STRING")
def TestTinyModel(family, seed, path):  # noqa: N802
    """A small network of one of ComfyUI's families, with random weights."""
    name, sizes = TINY[family]
    config = getattr(comfy.supported_models, name)(dict(sizes))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return (comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")),)


@_node(("MODEL",), model="MODEL", path="STRING")
def TestPatch(model, path):  # noqa: N802
    """A model with one changed weight, as a LoRA changes it."""
    model = model.clone()
    key, weight = next((key, value) for key, value in model.model.state_dict().items() if value.ndim == 2)
    model.add_patches({key: ("diff", (torch.full_like(weight, 0.01),))})
    return (model,)


@_node(("MODEL",), model="MODEL", path="STRING")
def TestLatentFormat(model, path):  # noqa: N802
    """A model whose latents come from another VAE."""
    model = model.clone()
    model.add_object_patch("latent_format", comfy.latent_formats.Flux())
    return (model,)


@_node((), model="MODEL", path="STRING")
def TestSaveNetwork(model, path):  # noqa: N802
    """A network in ComfyUI's own spelling, as checkpoints have it."""
    state = model.model.diffusion_model.state_dict()
    save_file({f"model.diffusion_model.{key}": value.contiguous() for key, value in state.items()}, path)


@_node((), model="MODEL", form="STRING", path="STRING")
def TestSaveQuantised(model, form, path):  # noqa: N802
    """A network with quantised linear layers: in GGUF's Q8_0, or in a format of ComfyUI, named in the metadata."""
    network = model.model.diffusion_model
    linear = {name for name, module in network.joint_blocks.named_modules() if isinstance(module, torch.nn.Linear)}
    linear = {f"joint_blocks.{name}" for name in linear}  # as usual: ComfyUI reads sizes off the layers around them
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    if form == "gguf":
        return _save_gguf(state, path)
    if form == "scaled_fp8":  # ComfyUI's first format
        for name in linear:
            weight = state[f"{name}.weight"]
            state[f"{name}.scale_weight"] = weight.abs().max() / 448
            state[f"{name}.weight"] = (weight / state[f"{name}.scale_weight"]).to(torch.float8_e4m3fn)
        return save_file(state | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path)
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    for name in linear:
        weight = QuantizedTensor.from_float(state[f"{name}.weight"], layout, scale="recalculate")
        state |= weight.state_dict(f"{name}.weight")
    layers = {name: {"format": form} for name in linear}
    save_file(state, path, {"_quantization_metadata": json.dumps({"layers": layers})})


def _save_gguf(state, path):
    import gguf

    writer = gguf.GGUFWriter(path, "sd3")
    kind = gguf.GGMLQuantizationType.Q8_0
    for key, value in state.items():
        if key.endswith(".weight") and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(key, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, value.numpy())
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@_node(("MODEL",), model="MODEL", seconds="FLOAT", path="STRING")
def TestCountCalls(model, seconds, path):  # noqa: N802
    """A model that writes the level and batch size of each call into a file, then sleeps."""
    model = model.clone()
    apply_model = model.model.apply_model

    def call(x, t, *args, **kwargs):
        with Path(path).open("a") as file:
            file.write(f"{t[0].item():.6g} {len(x)}\n")
        time.sleep(seconds)
        return apply_model(x, t, *args, **kwargs)

    model.add_object_patch("apply_model", call)
    return (model,)


@_node(("MODEL",), model="MODEL", form="STRING", values="STRING", path="STRING")
def TestScalePictures(model, form, values, path):  # noqa: N802
    """A model with a patch that holds one value per picture."""
    model, factors = model.clone(), torch.tensor([float(word) for word in values.split(",")])

    def scale(output):
        return output * factors[: len(output)].view(-1, *[1] * (output.ndim - 1))

    if form == "function":
        model.set_model_unet_function_wrapper(
            lambda apply_model, call: scale(apply_model(call["input"], call["timestep"], **call["c"]))
        )
    elif form == "attention":
        model.set_model_attn1_output_patch(lambda output, extra: scale(output))
    else:
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        model.add_wrapper(kind, lambda execute, *args, **kwargs: scale(execute(*args, **kwargs)))
    return (model,)


@_node(("MODEL",), model="MODEL", form="STRING", path="STRING")
def TestWrap(model, form, path):  # noqa: N802
    """A model with a wrapper of a kind that writes a line per call."""

    def wrapper(execute, *args, **kwargs):
        with Path(path).open("a") as file:
            file.write(f"{form}\n")
        return execute(*args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(form, "test", wrapper)
    return (model,)


@_node((), after="MODEL", path="STRING")
def TestReadFiles(after, path):  # noqa: N802
    """Write the names of all files that ComfyUI's own reader has read."""
    Path(path).write_text("\n".join(_READ))


_READ: list[str] = []
_load_torch_file = comfy.utils.load_torch_file


def _read(ckpt, *args, **kwargs):
    _READ.append(Path(ckpt).name)
    return _load_torch_file(ckpt, *args, **kwargs)


comfy.utils.load_torch_file = _read


@_node((), path="STRING")
def TestPack(path):  # noqa: N802
    """Write the CPU seconds of importing the pack, and the loaded modules that no pack should need."""
    pack = Path(folder_paths.get_folder_paths("custom_nodes")[0]) / "dpdmd"
    spec = importlib.util.spec_from_file_location(
        "dpdmd_again", pack / "__init__.py", submodule_search_locations=[str(pack)]
    )
    start = time.thread_time()
    sys.modules["dpdmd_again"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["dpdmd_again"])
    importlib.import_module("dpdmd_again.nodes")
    seconds = time.thread_time() - start
    foreign = sorted({name.split(".")[0] for name in sys.modules} & _FOREIGN)
    Path(path).write_text(json.dumps({"seconds": seconds, "foreign": foreign}))
