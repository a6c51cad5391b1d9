"""Text-to-image flows of 2025 and later, which read their text with a language model."""

from diffusers import (
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    BriaPipeline,
    BriaTransformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)

from tests.tiny.flux import flux_2_vae, mistral_3
from tests.tiny.flux import scheduler as flux_scheduler
from tests.tiny.parts import (
    LENGTH,
    WIDTH,
    Tiny,
    byte_tokenizer,
    clip,
    kl,
    learn,
    lively,
    qwen_vl,
    t5,
    wan_vae,
)
from tests.tiny_pipelines import tokenizer

SIZE = 16
SQUARE = {"height": SIZE, "width": SIZE}
CALL = {**SQUARE, "max_sequence_length": LENGTH}
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}


def krea_2():
    pipe = Krea2Pipeline(
        scheduler=flux_scheduler(shift=1.0),
        vae=wan_vae(AutoencoderKLQwenImage),
        text_encoder=qwen_vl("Qwen3VL", "Model"),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            Krea2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=16,
                text_hidden_dim=WIDTH,
                num_text_layers=2,
                text_num_attention_heads=2,
                text_num_key_value_heads=1,
                text_intermediate_size=32,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 6, 6),
                **HEADS,
            )
        ),
        text_encoder_select_layers=(0, 1),
    )
    learn(pipe.tokenizer, pipe.prompt_template_encode_prefix)
    return pipe


def hunyuan_image():
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=SIZE,
        scaling_factor=0.75,
    )
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=lively(vae),
        text_encoder=qwen_vl(layers=3),
        tokenizer=byte_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=byte_tokenizer(),
        transformer=lively(
            HunyuanImageTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=WIDTH,
                text_embed_2_dim=WIDTH,
                rope_axes_dim=(8, 8),
                **HEADS,
            )
        ),
    )
    learn(pipe.tokenizer, pipe.prompt_template_encode)
    pipe.tokenizer_max_length = LENGTH  # a thousand padding tokens would take most of the time
    return pipe


def bria():
    return BriaPipeline(
        scheduler=flux_scheduler(),
        vae=kl(**NO_QUANT),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        transformer=lively(
            BriaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=WIDTH,
                axes_dims_rope=[4, 6, 6],
                **HEADS,
            )
        ),
    )


def longcat():
    tokenizer = byte_tokenizer(end=None)
    pipe = LongCatImagePipeline(
        scheduler=flux_scheduler(),
        vae=kl(16, **NO_QUANT),  # the pipeline knows no other number of channels
        text_encoder=qwen_vl(),
        tokenizer=tokenizer,
        text_processor=tokenizer,
        transformer=lively(
            LongCatImageTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                axes_dims_rope=[4, 6, 6],
                **HEADS,
            )
        ),
    )
    learn(pipe.tokenizer, pipe.prompt_template_encode_prefix)
    pipe.tokenizer_max_length = LENGTH  # 512 padding tokens would take most of the time
    return pipe


def ernie():
    return ErnieImagePipeline(
        transformer=lively(
            ErnieImageTransformer2DModel(
                hidden_size=32,
                num_attention_heads=2,
                num_layers=1,
                ffn_hidden_size=32,
                in_channels=16,
                out_channels=16,
                text_in_dim=WIDTH,
                rope_axes_dim=(4, 6, 6),
            )
        ),
        vae=flux_2_vae(),
        text_encoder=mistral_3("Model"),
        tokenizer=byte_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def kandinsky_5():
    pipe = Kandinsky5T2IPipeline(
        transformer=lively(
            Kandinsky5Transformer3DModel(
                in_text_dim=WIDTH,
                in_text_dim2=WIDTH,
                time_dim=16,
                model_dim=32,
                ff_dim=32,
                num_text_blocks=1,
                num_visual_blocks=1,
                axes_dims=(4, 6, 6),
            )
        ),
        vae=kl(),
        text_encoder=qwen_vl(),
        tokenizer=byte_tokenizer(),
        text_encoder_2=clip(positions=77),
        tokenizer_2=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    learn(pipe.tokenizer, pipe.prompt_template)
    pipe.resolutions = [(4 * SIZE, 4 * SIZE)]  # it takes the nearest of these
    return pipe


def families():
    by_eight = {"height": 64, "width": 64}  # asks for 1/8 of it, whatever the autoencoder's scale
    return [
        Tiny("Krea2Pipeline", krea_2, {**CALL}),
        Tiny("HunyuanImagePipeline", hunyuan_image, SQUARE),
        Tiny("BriaPipeline", bria, CALL),
        Tiny("LongCatImagePipeline", longcat, {**SQUARE, "enable_prompt_rewrite": False}),
        Tiny("Kandinsky5T2IPipeline", kandinsky_5, {**CALL, **by_eight}),
        Tiny("ErnieImagePipeline", ernie, {**SQUARE, "use_pe": False}),
    ]
