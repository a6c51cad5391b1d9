"""Random-weight pipelines, small enough to run in a test and built without any download."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

TOKENS = 16
SD_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SDXL_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def pixel_pipeline(scheduler, kind: Any = DDIMPipeline, classes=None, channels=1, size=8):
    """A DDIM or DDPM pipeline; `classes` makes its network class-conditional."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
            num_class_embeds=classes,
        )
    return quiet(kind(unet=unet.eval(), scheduler=scheduler))


def stable_diffusion(scheduler=None, guidance_embedding=None, size=8):
    """Stable Diffusion 1.x; `guidance_embedding` channels make it a distilled student."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = text_unet(size, cross_attention_dim=32, time_cond_proj_dim=guidance_embedding)
        vae = autoencoder(latent_channels=4)
        text_encoder = CLIPTextModel(text_config())
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=loud(text_encoder.eval()),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=scheduler or DDIMScheduler(**SD_SCHEDULE, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipe)


def stable_diffusion_xl(scheduler=None, size=8, **options):
    """Stable Diffusion XL, with both its text encoders."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = text_unet(
            size,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        vae = autoencoder(latent_channels=4)
        encoders = [CLIPTextModel(text_config()), CLIPTextModelWithProjection(text_config())]
    pipe = StableDiffusionXLPipeline(
        unet=unet,
        scheduler=scheduler or EulerDiscreteScheduler(**SDXL_SCHEDULE),
        vae=vae,
        text_encoder=loud(encoders[0].eval()),
        tokenizer=tokenizer(),
        text_encoder_2=loud(encoders[1].eval()),
        tokenizer_2=tokenizer(),
        **options,
    )
    return quiet(pipe)


def stable_diffusion_3(scheduler=None, size=8):
    """Stable Diffusion 3 without its T5 encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        transformer = SD3Transformer2DModel(
            sample_size=size,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=2 * size,
        )
        vae = autoencoder(latent_channels=4, use_quant_conv=False, use_post_quant_conv=False)
        encoders = [CLIPTextModelWithProjection(text_config()) for _ in range(2)]
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=loud(encoders[0].eval()),
        tokenizer=tokenizer(),
        text_encoder_2=loud(encoders[1].eval()),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return quiet(pipe)


def flux(scheduler=None, guidance=True, size=8):
    """FLUX.1-dev, or without `guidance` -schnell."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 8),
        )
        vae = autoencoder(latent_channels=4, use_quant_conv=False, use_post_quant_conv=False)
        text_encoder = CLIPTextModel(text_config())
        t5 = T5Config(
            vocab_size=len(vocabulary()), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
        )
        text_encoder_2 = T5EncoderModel(t5)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "add_v_proj" in name or "text_embed.text" in name or "guidance_emb" in name:
                weight.mul_(5)  # a random network hardly listens
    pipe = FluxPipeline(
        transformer=transformer.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=loud(text_encoder.eval()),
        tokenizer=tokenizer(),
        text_encoder_2=loud(text_encoder_2.eval()),
        tokenizer_2=tokenizer(),
    )
    pipe.default_sample_size = size  # 128 whatever the transformer
    return quiet(pipe)


def dit(scheduler=None, learned_variance=True, size=8):
    """DiT with ImageNet's thousand classes and the one that stands for none."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        transformer = DiTTransformer2DModel(
            sample_size=size,
            patch_size=2,
            in_channels=4,
            out_channels=8 if learned_variance else 4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_embeds_ada_norm=1000,
        )
        vae = autoencoder(latent_channels=4)
    pipe = DiTPipeline(
        transformer=transformer.eval(),
        vae=vae,
        scheduler=scheduler or DDIMScheduler(clip_sample=False),
    )
    return quiet(pipe)


def text_unet(size, **options):
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        **options,
    )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name:  # a random network hardly listens to its text
                weight.mul_(20)
    return unet.eval()


def autoencoder(**options):
    return AutoencoderKL(
        block_out_channels=[16, 32],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
        shift_factor=0.06,
        **options,
    ).eval()


def text_config():
    last = len(vocabulary()) - 1
    return CLIPTextConfig(
        vocab_size=last + 1,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
        projection_dim=32,
    )


def vocabulary():
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    return {word: k for k, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def tokenizer():
    return CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=TOKENS)


def loud(encoder):
    """Random text encoders tell prompts apart by almost nothing: raise what their tokens say."""
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "embedding" in name or "projection" in name:
                weight.mul_(30)
    return encoder


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
