"""Text-to-image transformers that read their text by cross-attention."""

from typing import Any

from diffusers import (
    AutoencoderDC,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from tests.tiny.parts import (
    LENGTH,
    WIDTH,
    Tiny,
    bert,
    byte_tokenizer,
    kl,
    language_model,
    lively,
    t5,
)
from tests.tiny_pipelines import SD_SCHEDULE

SIZE = 16  # pictures; latents are half
SQUARE = {"height": SIZE, "width": SIZE}
PLAIN = {**SQUARE, "max_sequence_length": LENGTH, "clean_caption": False}
CALL = {**PLAIN, "use_resolution_binning": False}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}


def sana(kind: Any = SanaPipeline, scheduler=None, **options):
    """The autoencoder shrinks each side 4 times, the real one 32 times."""
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=SIZE // 2,
        **HEADS,
        **options,
    )
    flow = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return kind(
        tokenizer=byte_tokenizer(),
        text_encoder=language_model("Gemma2"),
        vae=lively(autoencoder),
        transformer=lively(transformer),
        scheduler=scheduler or flow,
    )


def sana_sprint():
    return sana(
        SanaSprintPipeline,
        SCMScheduler(),
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )


def pixart(kind: Any = PixArtSigmaPipeline, **options):
    transformer = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,  # the upper half is the variance, which the pipeline drops
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=SIZE // 2,
        **HEADS,
        **options,
    )
    return kind(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(),
        vae=kl(),
        transformer=lively(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def hunyuan_dit():
    text_length = 77  # both pipelines' numbers are fixed
    transformer = HunyuanDiT2DModel(
        in_channels=4,
        patch_size=2,
        sample_size=SIZE // 2,
        hidden_size=16,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=16,
        text_len=text_length,
        text_len_t5=256,
        **HEADS,
    )
    schedule = {
        "beta_schedule": "scaled_linear",
        "beta_start": SD_SCHEDULE["beta_start"],
        "beta_end": 0.018,
        "prediction_type": "v_prediction",
        "steps_offset": 1,
        "clip_sample": False,
    }
    return HunyuanDiTPipeline(
        vae=kl(),
        text_encoder=bert(),
        tokenizer=byte_tokenizer(model_max_length=text_length),
        transformer=lively(transformer),
        scheduler=DDPMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=byte_tokenizer(model_max_length=256),
    )


def lumina():
    transformer = LuminaNextDiT2DModel(
        sample_size=SIZE // 2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=WIDTH,
    )
    return LuminaPipeline(
        transformer=lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl(),
        text_encoder=language_model("Gemma"),
        tokenizer=byte_tokenizer(),
    )


def families():
    # sides must be multiples of 32, whatever the autoencoder's scale
    by_32 = {**CALL, "height": 32, "width": 32, "complex_human_instruction": None}
    square = {**SQUARE, "use_resolution_binning": False}
    by_eight = {"height": 64, "width": 64}  # asks for 1/8 of it, whatever the autoencoder's scale
    return [
        Tiny("SanaPipeline", sana, by_32),
        Tiny(
            "SanaSprintPipeline",
            sana_sprint,
            {**by_32, "intermediate_timesteps": None},
        ),
        Tiny(
            "PixArtAlphaPipeline",
            lambda: pixart(PixArtAlphaPipeline, use_additional_conditions=False),
            CALL,
        ),
        Tiny("PixArtSigmaPipeline", pixart, CALL),
        Tiny("HunyuanDiTPipeline", hunyuan_dit, square),
        Tiny("LuminaPipeline", lumina, {**PLAIN, **by_eight}),
    ]
