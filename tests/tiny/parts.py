"""Text encoders, tokenizers and autoencoders of a few thousand weights, shared by the pipelines."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from tests.tiny_pipelines import TOKENS, autoencoder, quiet, text_config

WIDTH = 32  # of every text encoder
LENGTH = 24  # tokens of a prompt, where the call takes that number
VOCABULARY = 400  # bytes, SPECIAL, and room for `learn`
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ message.content if message.content is string else message.content[0].text }}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Tiny:
    """A pipeline that takes well under a second, and how to call it.

    make: builds the pipeline, drawing its weights from the global generator; see `build`.
    call: arguments of its `__call__` besides the prompt, steps, latents, output type, generator.
    kind: what comes out, "image" [B, 3, H, W] or "clip" [B, F, 3, H, W] (output_type="pt").
    prompt: what the prompt is: "text", "class" (`class_labels`), or None where there is none.
    """

    name: str
    make: Callable[[], Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["image", "clip"] = "image"
    prompt: Literal["text", "class"] | None = "text"

    def build(self):
        """A fresh pipeline: the same weights each time, the global generator left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return quiet(self.make())


def lively(module, gain=1.0):
    """Redraw every matrix with variance 1/inputs: no zero start, no network deaf to text or time.

    Unlike the default start, this also covers weights that a constructor leaves at zero (gates,
    control outputs) or as memory happened to be (padding tokens).
    """
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, gain * weight[0].numel() ** -0.5)
    return module.eval()


def byte_tokenizer(end="</s>", **options):
    """One token a byte, `end` closing every text; a chat is its user's text."""
    words = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    vocabulary = {word: k for k, word in enumerate(words)}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    if end:
        bytes_.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT,
        **options,
    )


def learn(tokenizer, template):
    """One token a word of a pipeline's fixed text, of which it drops a fixed number of tokens."""
    words = re.findall(r" ?[A-Za-z]+", re.sub(r"<\|.*?\|>", "", template))
    tokenizer.add_tokens(sorted(set(words)))


def picture(size):
    """A colour ramp [1, 3, size, size] in 0..1."""
    ramp = torch.linspace(0, 1, size)
    return torch.stack([ramp.expand(size, size), ramp.expand(size, size).T, ramp.outer(ramp)])[None]


def mask(size):
    """[1, 1, size, size]: 1 on the right half, which is to be painted."""
    return (torch.arange(size) >= size // 2).float().expand(1, 1, size, size)


def clip(projection=False, positions=TOKENS):
    kind: Any = CLIPTextModelWithProjection if projection else CLIPTextModel
    config = text_config()
    config.max_position_embeddings = positions
    return lively(kind(config), gain=2.0)


def t5(kind="T5", width=WIDTH, vocabulary=VOCABULARY):
    """The encoder of T5 or, with kind="UMT5", of multilingual T5."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=1,
        num_heads=4,
    )
    return lively(getattr(transformers, f"{kind}EncoderModel")(config))


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=80,
    )
    return lively(transformers.BertModel(config))


def decoder_config(**options):
    """What the configurations of Llama, Qwen, Mistral, Gemma and GLM language models share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 3,
        **options,
    }


def language_model(kind, model="Model", **options):
    """`kind` as transformers names it: language_model("Qwen3", "ForCausalLM")."""
    config = getattr(transformers, f"{kind}Config")(**decoder_config(**options))
    return lively(getattr(transformers, kind + model)(config))


def kl(latent_channels=4, **options):
    """A picture autoencoder that halves each side."""
    return lively(autoencoder(latent_channels=latent_channels, **options))


def qwen_vl(kind="Qwen2_5_VL", model="ForConditionalGeneration", layers=2):
    """A vision-language model, of which pipelines use the language half."""
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = decoder_config(rope_parameters=rope, num_hidden_layers=layers)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    return lively(getattr(transformers, kind + model)(config))


def wan_vae(kind: Any = AutoencoderKLWan, **options):
    """4 latent channels; each side and the frames (all but the first) shrink 4 times."""
    return lively(
        kind(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            **options,
        )
    )
