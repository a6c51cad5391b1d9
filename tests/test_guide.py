"""The guide's Python and commands run as they stand, on tiny pipelines in place of the hub's."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from diffusers import AutoencoderTiny, DiffusionPipeline

from samplers import cli
from samplers.cli import sample as command
from tests.tiny import families
from tests.tiny_pipelines import stable_diffusion

GUIDE = (Path(__file__).parent.parent / "docs" / "pipelines.md").read_text()
TINY = {tiny.name: tiny for tiny in families()}
STANDS_FOR = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
    "black-forest-labs/FLUX.1-schnell": "FluxPipeline schnell",
    "black-forest-labs/FLUX.2-klein-base-9B": "Flux2KleinPipeline",
    "Qwen/Qwen-Image": "QwenImagePipeline",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "WanPipeline",
}
MY_REWARDS = "def motion(clips, prompts):\n    return clips.mean((1, 2, 3, 4))\n"


def size_of(tiny):
    return {name: tiny.call[name] for name in ("height", "width") if name in tiny.call}


def call_of(tiny):
    """What a tiny pipeline must be given besides its size."""
    asked = {**tiny.call}
    for name in ("height", "width", "guidance_scale", "negative_prompt"):
        asked.pop(name, None)
    return asked


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def small_autoencoder(channels):
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()


def test_the_guides_python_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    flux, controlnet = TINY["FluxPipeline schnell"], TINY["StableDiffusionControlNetPipeline"]
    wan = TINY["WanPipeline"]
    names = {
        "pipe": flux.build(),
        "size": size_of(flux),
        "reward": brightness,
        "sd": stable_diffusion(),
        "small": small_autoencoder(4),
        "controlnet": controlnet.build(),
        "controlnet_size": size_of(controlnet),
        "edges": controlnet.call["image"],
        "wan": wan.build(),
        "wan_size": size_of(wan),
        "wan_call": call_of(wan),
    }
    for block in blocks:
        exec(compile(block, "pipelines.md", "exec"), names)  # our own text
    assert len(names["result"].clips) == 1
    assert list(names["result"].also) == [names["steady"].name]


COMMANDS = re.findall(r"^(steer sample .*?)(?=\n\n|\n```)", GUIDE, re.MULTILINE | re.DOTALL)


def test_every_pipeline_of_the_recipes_has_one():
    assert {shlex.split(c.replace("\\\n", " "))[3] for c in COMMANDS} == set(STANDS_FOR)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a reward module in it, as a user would have."""
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("text", COMMANDS, ids=[c.split()[3] for c in COMMANDS])
def test_a_recipe_runs(text, folder, monkeypatch):
    words = shlex.split(text.replace("\\\n", " "))[1:]
    tiny = TINY[STANDS_FOR[words[words.index("--model") + 1]]]
    replaced = {"--nfe": "60", "--dtype": "float32", "--steps": "3"}
    if "zero-order" in words:
        replaced["--nfe"] = "24"
    for name, value in {**replaced, **{f"--{k}": str(v) for k, v in size_of(tiny).items()}}.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    given = {w.partition("=")[0] for w in words if "=" in w}
    for name, value in call_of(tiny).items():
        if name in given:
            place = next(k for k, w in enumerate(words) if w.startswith(f"{name}="))
            words[place] = f"{name}={value}"
        else:
            words += ["--call", f"{name}={value}"]
    loaded = []

    def from_pretrained(name, **options):
        assert options["use_safetensors"] is True
        loaded.append(name)
        return tiny.build()

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", lambda name, **_: small_autoencoder(
        tiny.build().vae.config.latent_channels))  # fmt: skip
    offloaded = []
    monkeypatch.setattr(
        DiffusionPipeline,
        "enable_model_cpu_offload",
        lambda self, device: offloaded.append(device),  # there is no device to come from
    )
    parse = command.parse_reward

    def rewards(words, device, offload):  # the learned ones' weights are the hub's
        return brightness if words in ("imagereward", "clip") else parse(words, device, offload)

    monkeypatch.setattr(command, "parse_reward", rewards)
    assert cli.main([*words, "--device", "cpu", "--quiet"]) == 0
    assert len(loaded) == 1
    assert len(offloaded) == ("--offload" in words)
    written = list((folder / "runs").glob("*/images/0000.*"))
    assert [path.suffix for path in written] == [".webp" if tiny.kind == "clip" else ".png"]
