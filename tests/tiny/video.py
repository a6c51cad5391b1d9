"""Text-to-video flows; a clip is 2 latent frames."""

from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    DPMSolverMultistepScheduler,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.tiny.parts import (
    LENGTH,
    WIDTH,
    Tiny,
    byte_tokenizer,
    clip,
    language_model,
    lively,
    qwen_vl,
    t5,
    wan_vae,
)
from tests.tiny_pipelines import tokenizer

SIZE = 16
SQUARE = {"height": SIZE, "width": SIZE}
CALL = {**SQUARE, "num_frames": 5, "max_sequence_length": LENGTH}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}


def wan():
    return WanPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5("UMT5"),
        vae=wan_vae(scale_factor_spatial=4),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=lively(
            WanTransformer3DModel(
                in_channels=4,
                out_channels=4,
                text_dim=WIDTH,
                freq_dim=16,
                ffn_dim=32,
                rope_max_seq_len=32,
                **HEADS,
            )
        ),
    )


def ltx():
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=2,
    )
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            shift_terminal=0.1,
        ),
        vae=lively(vae),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            LTXVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                cross_attention_dim=32,
                caption_channels=WIDTH,
                **HEADS,
            )
        ),
    )


def hunyuan_video():
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )
    return HunyuanVideoPipeline(
        text_encoder=language_model("Llama"),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            HunyuanVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                rope_axes_dim=(4, 6, 6),
                **HEADS,
            )
        ),
        vae=lively(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(positions=77),
        tokenizer_2=tokenizer(),
    )


def mochi():
    vae = AutoencoderKLMochi(
        latent_channels=12,  # the pipeline knows no other number
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 12,
        latents_std=(1.0,) * 12,
    )
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=lively(vae, gain=0.8),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            MochiTransformer3DModel(
                pooled_projection_dim=16,
                in_channels=12,
                text_embed_dim=WIDTH,
                time_embed_dim=8,
                **HEADS,
            )
        ),
        force_zeros_for_empty_prompt=True,
    )


def easy_animate():
    vae = AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_group_norm=False,
    )
    return EasyAnimatePipeline(
        vae=lively(vae, gain=0.8),
        text_encoder=qwen_vl("Qwen2VL"),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            EasyAnimateTransformer3DModel(
                in_channels=4,
                out_channels=4,
                patch_size=2,
                sample_width=2,
                sample_height=2,
                mmdit_layers=1,
                time_embed_dim=8,
                text_embed_dim=WIDTH,
                **HEADS,
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def sana_video():
    return SanaVideoPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=language_model("Gemma2"),
        vae=wan_vae(scale_factor_spatial=4),
        transformer=lively(
            SanaVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_cross_attention_heads=2,
                cross_attention_head_dim=16,
                cross_attention_dim=32,
                caption_channels=WIDTH,
                rope_max_seq_len=32,
                **HEADS,
            )
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )


def families():
    easy = {**SQUARE, "num_frames": 5, "negative_prompt": ""}  # has no default of its own
    # sides must be multiples of 32, whatever the autoencoder's scale
    sana = {
        "height": 32,
        "width": 32,
        "frames": 5,
        "max_sequence_length": LENGTH,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    }
    # the template's own length in tokens is fixed, and no byte tokenizer's
    bare = {"template": "{}", "crop_start": 0}
    return [
        Tiny("WanPipeline", wan, CALL, "clip"),
        Tiny("LTXPipeline", ltx, {**CALL, "height": 32, "width": 32}, "clip"),
        Tiny("HunyuanVideoPipeline", hunyuan_video, {**CALL, "prompt_template": bare}, "clip"),
        Tiny("MochiPipeline", mochi, {**CALL, "num_frames": 7}, "clip"),
        Tiny("EasyAnimatePipeline", easy_animate, easy, "clip"),
        Tiny("SanaVideoPipeline", sana_video, sana, "clip"),
    ]
