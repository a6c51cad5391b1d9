"""Pipelines on pixels (DDPM, DDIM, consistency, DeepFloyd IF) and by class label (DiT)."""

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    IFPipeline,
)

from tests.tiny.parts import WIDTH, Tiny, byte_tokenizer, kl, lively, t5
from tests.tiny.stable_diffusion import unet
from tests.tiny_pipelines import pixel_pipeline


def pixels(kind, scheduler):
    pipe = pixel_pipeline(scheduler, kind, channels=3, size=16)
    lively(pipe.unet)
    return pipe


def dit():
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # the upper half is the variance, which the pipeline drops
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # the pipeline's empty class is 1000, whatever is said here
    )
    return DiTPipeline(
        transformer=lively(transformer), vae=kl(), scheduler=DDIMScheduler(clip_sample=False)
    )


def deep_floyd():
    """Its first stage; the network says the variance too, as in the published scheduler."""
    network = unet(
        3,
        out_channels=6,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="text_proj",
        time_embedding_act_fn="gelu",
    )
    return IFPipeline(
        tokenizer=byte_tokenizer(),
        text_encoder=t5(),
        unet=network,
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.5,
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def consistency():
    return pixels(ConsistencyModelPipeline, CMStochasticIterativeScheduler())


def families():
    return [
        Tiny("DiTPipeline", dit, prompt="class"),
        Tiny("DDPMPipeline", lambda: pixels(DDPMPipeline, DDPMScheduler()), prompt=None),
        Tiny("DDIMPipeline", lambda: pixels(DDIMPipeline, DDIMScheduler()), prompt=None),
        Tiny("ConsistencyModelPipeline", consistency, prompt=None),
        Tiny("IFPipeline", deep_floyd, {"height": 16, "width": 16, "clean_caption": False}),
    ]
