"""FLUX.1 and FLUX.2: rectified flows on packed latents."""

from typing import Any

import transformers
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import Mistral3Config

from tests.tiny.parts import (
    LENGTH,
    WIDTH,
    Tiny,
    byte_tokenizer,
    clip,
    decoder_config,
    kl,
    language_model,
    lively,
    mask,
    picture,
    t5,
)
from tests.tiny_pipelines import tokenizer

SIZE = 16  # pictures; latents are half, then packed 2x2
CALL = {"height": SIZE, "width": SIZE, "max_sequence_length": LENGTH}
BLOCKS = {
    "patch_size": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
}


def scheduler(**options):
    return FlowMatchEulerDiscreteScheduler(
        **{
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            **options,
        }
    )


def blocks(kind: Any = FluxTransformer2DModel, channels=16, **options):
    return kind(
        in_channels=channels,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        **{**BLOCKS, "guidance_embeds": True, **options},
    )


def flux(kind: Any = FluxPipeline, schedule=None, **options):
    parts = {"controlnet": options.pop("controlnet")} if "controlnet" in options else {}
    return kind(
        scheduler=schedule or scheduler(),
        vae=kl(use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=byte_tokenizer(),
        transformer=lively(blocks(**options)),
        **parts,
    )


def schnell():
    plain = scheduler(shift=1.0, use_dynamic_shifting=False)
    return flux(schedule=plain, guidance_embeds=False)


def flux_2_vae():
    return lively(
        AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
    )


def flux_2_blocks(guidance):
    return lively(
        Flux2Transformer2DModel(
            in_channels=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
            **{**BLOCKS, "joint_attention_dim": 3 * WIDTH},
        )
    )


def mistral_3(model="ForConditionalGeneration"):
    pictures = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    words = {"model_type": "mistral", **decoder_config()}
    config = Mistral3Config(text_config=words, vision_config=pictures, image_token_index=2)
    return lively(getattr(transformers, "Mistral3" + model)(config))


def flux_2(kind: Any, text_encoder, guidance):
    return kind(
        scheduler=scheduler(),
        vae=flux_2_vae(),
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(),
        transformer=flux_2_blocks(guidance),
    )


def dev_2():
    return flux_2(Flux2Pipeline, mistral_3(), guidance=True)


def klein():
    return flux_2(Flux2KleinPipeline, language_model("Qwen3", "ForCausalLM"), guidance=False)


def families():
    layers = {**CALL, "text_encoder_out_layers": (0, 1, 2)}
    shown = picture(SIZE)
    fill = {**CALL, "image": shown, "mask_image": mask(SIZE)}
    return [
        Tiny("FluxPipeline", flux, CALL),
        Tiny("FluxPipeline schnell", schnell, {**CALL, "guidance_scale": 0.0}),
        Tiny("Flux2Pipeline", dev_2, layers),
        Tiny("Flux2KleinPipeline", klein, layers),
        Tiny(
            "FluxControlNetPipeline",
            lambda: flux(FluxControlNetPipeline, controlnet=lively(blocks(FluxControlNetModel))),
            {**CALL, "control_image": shown},
        ),
        Tiny(
            "FluxControlPipeline",
            lambda: flux(FluxControlPipeline, channels=32, out_channels=16),
            {**CALL, "control_image": shown},
        ),
        Tiny(
            "FluxFillPipeline",
            # the packed latent, the masked picture's, and 2x2 pixels of mask for each of 2x2
            lambda: flux(FluxFillPipeline, channels=16 + 16 + 16, out_channels=16),
            fill,
        ),
    ]
