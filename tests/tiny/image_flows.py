"""Text-to-image flows with joint attention to text and picture, beside FLUX and SD 3."""

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.tiny.parts import (
    LENGTH,
    WIDTH,
    Tiny,
    byte_tokenizer,
    clip,
    kl,
    language_model,
    learn,
    lively,
    qwen_vl,
    t5,
    wan_vae,
)
from tests.tiny_pipelines import SD_SCHEDULE, TOKENS, tokenizer

SIZE = 16  # pictures; latents are half
SQUARE = {"height": SIZE, "width": SIZE}
CALL = {**SQUARE, "max_sequence_length": LENGTH}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def euler(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


def qwen_image():
    pipe = QwenImagePipeline(
        scheduler=euler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=wan_vae(AutoencoderKLQwenImage),
        text_encoder=qwen_vl(),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=1,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
                **HEADS,
            )
        ),
    )
    learn(pipe.tokenizer, pipe.prompt_template_encode)
    return pipe


def z_image():
    return ZImagePipeline(
        scheduler=euler(shift=3.0),
        vae=kl(**NO_QUANT),
        text_encoder=language_model("Qwen3"),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 6, 6],
                axes_lens=[64, 16, 16],
            )
        ),
    )


def lumina_2():
    return Lumina2Pipeline(
        scheduler=euler(shift=6.0),
        vae=kl(**NO_QUANT),
        text_encoder=language_model("Gemma2"),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            Lumina2Transformer2DModel(
                in_channels=4,
                hidden_size=24,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 4, 4),
                axes_lens=(300, 16, 16),
                cap_feat_dim=WIDTH,
            )
        ),
    )


def hidream():
    pipe = HiDreamImagePipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=kl(**NO_QUANT),
        text_encoder=clip(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=byte_tokenizer(),
        text_encoder_4=language_model("Llama", "ForCausalLM", attn_implementation="eager"),
        tokenizer_4=byte_tokenizer(),
        transformer=lively(
            HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                caption_channels=[WIDTH, WIDTH],
                text_emb_dim=2 * WIDTH,
                axes_dims_rope=(4, 6, 6),
                max_resolution=(8, 8),
                llama_layers=[0, 1],
                **HEADS,
            )
        ),
    )
    pipe.default_sample_size = SIZE // 2  # pictures of 128 squared latents, whatever is asked for
    return pipe


def aura_flow():
    return AuraFlowPipeline(
        scheduler=euler(shift=1.73),
        vae=kl(),
        text_encoder=t5("UMT5"),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            AuraFlowTransformer2DModel(
                sample_size=8,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                joint_attention_dim=WIDTH,
                caption_projection_dim=32,
                pos_embed_max_size=16,
                **HEADS,
            )
        ),
    )


def cogview(kind: Any, network: Any, scheduler, text_encoder, **options):
    return kind(
        scheduler=scheduler,
        vae=kl(),
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(padding_side="left"),
        transformer=lively(
            network(
                in_channels=4,
                out_channels=4,
                num_layers=1,
                text_embed_dim=WIDTH,
                time_embed_dim=16,
                condition_dim=8,
                pos_embed_max_size=8,
                sample_size=8,
                **HEADS,
                **options,
            )
        ),
    )


def cogview_4():
    scheduler = euler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    text = language_model("Glm")
    return cogview(
        CogView4Pipeline, CogView4Transformer2DModel, scheduler, text, rope_axes_dim=(8, 8)
    )


def cogview_3():
    scheduler = CogVideoXDDIMScheduler(
        beta_start=SD_SCHEDULE["beta_start"],
        snr_shift_scale=4.0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return cogview(CogView3PlusPipeline, CogView3PlusTransformer2DModel, scheduler, t5())


def chroma():
    return ChromaPipeline(
        scheduler=euler(use_beta_sigmas=True),
        vae=kl(**NO_QUANT),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            ChromaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=16,
                approximator_hidden_dim=16,
                approximator_layers=1,
                **HEADS,
            )
        ),
    )


def ovis():
    pipe = OvisImagePipeline(
        scheduler=euler(shift=3.0, use_dynamic_shifting=True),
        vae=kl(**NO_QUANT),
        text_encoder=language_model("Qwen3"),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            OvisImageTransformer2DModel(
                in_channels=16,
                out_channels=16,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
                **HEADS,
            )
        ),
    )
    learn(pipe.tokenizer, pipe.system_prompt)
    return pipe


def families():
    by_eight = {"height": 64, "width": 64}  # asks for 1/8 of it, whatever the autoencoder's scale
    return [
        Tiny("QwenImagePipeline", qwen_image, CALL),
        Tiny("ZImagePipeline", z_image, CALL),
        Tiny("Lumina2Pipeline", lumina_2, {**CALL, **by_eight, "system_prompt": "be"}),
        Tiny("HiDreamImagePipeline", hidream, {**SQUARE, "max_sequence_length": TOKENS}),
        Tiny("AuraFlowPipeline", aura_flow, CALL),
        Tiny("CogView4Pipeline", cogview_4, CALL),
        Tiny("CogView3PlusPipeline", cogview_3, CALL),
        Tiny("ChromaPipeline", chroma, CALL),
        Tiny("OvisImagePipeline", ovis, CALL),
    ]
