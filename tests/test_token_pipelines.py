"""Diffusers' own pipelines of tokens: what they say, what they are run with, what is refused."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    BlockRefinementScheduler,
    DiscreteDDIMScheduler,
    LLaDA2Pipeline,
    UVit2DModel,
    VQModel,
)
from torch import nn

from samplers import SMC, Ancestral, TreeSampling, sample
from steering import from_pipeline
from steering.discrete import UniformProcess
from steering.pipelines.llada2 import BlockProcess
from steering.rewards import Jpeg, from_text
from tests import tiny_pipelines
from tests.exact.token_laws import law, unmasking_law
from tests.test_masked_lm import tokenizer
from tests.tiny.parts import clip, lively
from tests.tiny_pipelines import quiet

# --- aMUSEd ------------------------------------------------------------------------------------


def amused(schedule="cosine"):
    """Images of 16 pixels, 8 x 8 tokens out of 12; the mask is id 14 of 16."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        text = clip(projection=True)
        transformer = UVit2DModel(
            hidden_size=16, cond_embed_dim=text.config.projection_dim, micro_cond_encode_dim=4,
            micro_cond_embed_dim=20, encoder_hidden_size=text.config.hidden_size, vocab_size=16,
            codebook_size=12, in_channels=16, block_out_channels=16, num_res_blocks=1,
            block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            sample_size=8,
        )  # fmt: skip
        vqvae = VQModel(
            in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4, num_vq_embeddings=12, norm_num_groups=4, vq_embed_dim=4,
            lookup_from_codebook=True, mid_block_add_attention=False,
        )  # fmt: skip
        return quiet(
            AmusedPipeline(
                lively(vqvae), tiny_pipelines.tokenizer(), text, lively(transformer),
                AmusedScheduler(mask_token_id=14, masking_schedule=schedule),
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return amused()


def opened(pipe, *given, **more):
    with pytest.warns(UserWarning, match="AmusedScheduler .* MaskedProcess"):
        return from_pipeline(pipe, *given, **more)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_guesses_are_what_the_pipeline_draws_from(pipe, scale, monkeypatch):
    seen = []
    step = pipe.scheduler.step

    def watched(model_output, timestep, sample, **more):
        seen.append((sample, model_output))
        return step(model_output, timestep, sample, **more)

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    pipe("a cat", num_inference_steps=4, guidance_scale=scale,
         generator=torch.Generator().manual_seed(0))  # fmt: skip
    model = opened(pipe, ["a cat", "a dog"], steps=4, guidance_scale=scale)
    assert len(seen) == 4
    for k, (ids, logits) in enumerate(seen):
        x = torch.where(ids == 14, 12, ids).flatten(1)
        t, row = torch.full((1,), 1 - k / 4), torch.zeros(1, dtype=torch.int64)
        guess = model.denoiser(x, t, row)
        said = logits.flatten(2).mT.log_softmax(-1)
        masked = x == 12
        assert masked.any()
        torch.testing.assert_close(guess[masked], said[masked], rtol=0, atol=1e-4)
        other = model.denoiser(x, t, row + 1)
        assert (other - guess)[masked].abs().max() > 1e-2
    assert model.denoiser.rows(t, row).tolist() == [1 + (scale > 1)]


def test_tokens_are_decoded_as_the_pipeline_does_and_a_guess_by_its_mean_code(pipe):
    ids = torch.randint(12, (2, 8, 8), generator=torch.Generator().manual_seed(1))
    expected = pipe(["a", "b"], latents=ids, num_inference_steps=1, output_type="pt").images
    model = opened(pipe, ["a"], steps=2)
    torch.testing.assert_close(model.decode(ids.flatten(1)), expected, rtol=0, atol=1e-5)
    sure = torch.where(nn.functional.one_hot(ids.flatten(1), 12) > 0, 0.0, -1e4)
    torch.testing.assert_close(model.decode(sure), expected, rtol=0, atol=1e-5)
    assert model.decode(torch.full((1, 64), 12)).isfinite().all()  # masks alone


def test_the_chain_is_on_the_schedulers_schedule():
    for schedule, first in (("cosine", torch.cos(torch.tensor(torch.pi / 8))), ("linear", 0.75)):
        model = opened(amused(schedule), ["a"], steps=4)
        assert float(model.process.level[1]) == pytest.approx(float(first))


def test_relaxed_tokens_have_gradients_and_leave_no_hook(pipe):
    model = opened(pipe, ["a cat"], steps=2, guidance_scale=2.0)
    process = model.process
    x = process.noised(torch.arange(64)[None] % 12, torch.tensor([1]), torch.arange(1))
    t, row = torch.full((1,), 0.5), torch.zeros(1, dtype=torch.int64)
    soft = process.weights(x).requires_grad_()
    relaxed = model.denoiser(soft, t, row)
    masked = x == 12
    hard = model.denoiser(x, t, row)[masked]
    torch.testing.assert_close(relaxed[masked], hard, rtol=0, atol=1e-4)
    (slope,) = torch.autograd.grad(model.decode(relaxed).sum(), soft)
    assert slope.abs().max() > 0
    assert not pipe.transformer.embed.embeddings._forward_hooks


def test_it_is_steered_by_rewards_of_images(pipe):
    model = opened(pipe, ["a cat"], steps=3, guidance_scale=1.0)
    for sampler in (SMC(particles=8), TreeSampling(parallel=4)):
        result = sample(model, Jpeg(), sampler, nfe=72, draws=8, progress=False)
        assert result.images[0].size == (16, 16)
    assert "AmusedPipeline" in str(model)


def test_what_amused_cannot_do_is_refused_by_name(pipe):
    for more, said in (
        ({"eta": 1.0}, "eta is given"),
        ({"height": 15}, "height=15"),
        ({"call": {"temperature": 3}}, "native adapters take no temperature"),
        ({"route": "driven"}, "route='driven'"),
    ):
        with pytest.raises(ValueError, match=said):
            from_pipeline(pipe, ["a"], steps=2, **more)
    with pytest.raises(ValueError, match="prompts is missing"):
        from_pipeline(pipe, steps=2)


# --- LLaDA2 ------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Guesses from the mean of what it is shown; the mask counts, what is not shown does not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=size)
        self.place = nn.Embedding(16, 8)
        self.embed = nn.Embedding(size, 8)
        self.out = nn.Linear(8, size)

    @property
    def device(self):
        return self.out.weight.device

    def forward(self, x, attention_mask, position_ids):
        shown = attention_mask[..., None].float()
        mean = (self.embed(x) * self.place(position_ids) * shown).sum(1) / shown.sum(1)
        return SimpleNamespace(logits=self.out(mean[:, None] + self.place(position_ids)))


def llada2(words="a b"):
    read = tokenizer(words, wrapped=False)
    read.eos_token = "[SEP]"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = lively(Blocks(len(read)), gain=2.0)
    return quiet(LLaDA2Pipeline(network, BlockRefinementScheduler(block_length=2), read))


CALL = {"gen_length": 3, "block_length": 2}


def blocks(pipe, prompts=("a",), steps=2, call=CALL):
    with pytest.warns(UserWarning, match="BlockRefinementScheduler .* MaskedProcess"):
        return from_pipeline(pipe, list(prompts), steps=steps, call=call)


def test_its_blocks_are_chains_one_after_the_other():
    # a ? | ? ?: one site, then two, by the network shown the blocks up to this one, in 2 + 2 steps
    pipe = llada2()
    model = blocks(pipe)
    assert model.process.steps == 4
    mask = pipe.mask_token_id
    kept = [k for k in range(6) if k != mask]

    def within(window):
        def guess(state, i):
            ids = torch.tensor([[mask if v is None else kept[v] for v in state]])
            site = torch.arange(window)[None]
            logits = pipe.model(ids, torch.ones(1, window), site).logits[0, :, kept]
            return logits.double().softmax(-1).tolist()

        return guess

    level, a = [1.0, 0.5, 0.0], kept.index(pipe.tokenizer.convert_tokens_to_ids("a"))
    expected = {}
    for first, p in unmasking_law(within(2), [a, None], level).items():
        for whole, q in unmasking_law(within(4), [*first, None, None], level).items():
            expected[whole] = p * q
    x, p = law(model)
    assert len(expected) == 125
    for state, q in zip(x.tolist(), p.tolist(), strict=True):
        assert q == pytest.approx(expected.get(tuple(state), 0.0), abs=1e-6)  # float32 logits


def test_texts_are_what_is_written_up_to_the_end():
    pipe = llada2()
    model = blocks(pipe)
    ids = pipe.tokenizer.convert_tokens_to_ids(["a", "b", "a", "b"])
    assert model.write(torch.tensor([ids, [*ids[:2], pipe.eos_token_id, ids[0]]])) == ["b a b", "b"]
    guess = model.denoiser(torch.full((1, 4), 5), torch.ones(1), torch.zeros(1).long())
    assert model.decode(guess)[0, 2:].tolist() == [pipe.eos_token_id] * 2

    @from_text(model)
    def count(texts):
        return [float(text.count("b")) for text in texts]

    plain = sample(model, count, Ancestral(100), nfe=400, progress=False)
    steered = sample(model, count, SMC(particles=25), nfe=400, lam=3.0, progress=False)
    share = steered.counts.double() / steered.counts.sum()
    assert float(share @ steered.rewards) > float(plain.rewards.mean()) + 0.3


def test_a_tail_beyond_the_text_is_not_looked_at():
    pipe = llada2()
    model = blocks(pipe, call={"gen_length": 2, "block_length": 2})  # a ? | ? -
    x = model.denoiser.fixed.clone()
    x[0, 1:3] = torch.tensor([1, 5])  # the mask is the last token, of 6
    guess = model.denoiser(x, torch.tensor([0.5]), torch.zeros(1).long())
    kept = [k for k in range(6) if k != pipe.mask_token_id]
    ids = torch.tensor([[*(kept[k] for k in x[0, :2]), pipe.mask_token_id]])
    alone = pipe.model(ids, torch.ones(1, 3), torch.arange(3)[None]).logits[0, 2, kept]
    torch.testing.assert_close(guess[0, 2], alone.log_softmax(-1))


def test_noising_of_blocks_has_the_marginals_of_its_steps():
    process = BlockProcess.blocks(3, 2, 1, 4, 4)  # the first block is the prompt's
    n = 4000
    clean = torch.zeros(n, 6, dtype=torch.int64)
    i = torch.full((n,), 5)  # in the last block, after one of four steps
    lost = (process.noised(clean, i, torch.arange(n)) == 4).double().mean(0)
    assert lost[:4].tolist() == [0.0] * 4
    # five standard deviations of a share of 4000
    assert (lost[4:] - 0.75).abs().max() < 5 * (0.75 * 0.25 / n) ** 0.5
    assert float(process.level[5]) == pytest.approx(0.75 / 2)


def test_what_llada2_cannot_do_is_refused_by_name():
    pipe = llada2()
    for prompts, call, said in (
        (["a", "a b"], CALL, "prompts have .* make a model for each"),
        (["a"], {**CALL, "temperature": 1.0}, "call has 'temperature'"),
        (["a"], {**CALL, "gen_length": 0}, "gen_length=0"),
    ):
        with pytest.raises(ValueError, match=said):
            from_pipeline(pipe, prompts, steps=2, call=call)
    with pytest.raises(ValueError, match="guidance_scale is given"):
        from_pipeline(pipe, ["a"], steps=2, call=CALL, guidance_scale=2.0)
    model = blocks(pipe)
    with pytest.raises(ValueError, match="takes no relaxed tokens"):
        model.denoiser(torch.ones(1, 4, 6) / 6, torch.ones(1), torch.zeros(1).long())


# --- the others --------------------------------------------------------------------------------


def test_the_uniform_process_has_the_law_of_discrete_ddim():
    T, K, n = 4, 3, 60000
    scheduler = DiscreteDDIMScheduler(T)
    process = UniformProcess.of(1, K, T)
    logits = torch.tensor([0.3, -1.0, 0.8])
    for i in range(T):
        for token in range(K):
            x = torch.full((n, 1), token)
            ids = scheduler.step(
                logits.expand(n, 1, K), i, x, temperature=1.0,
                generator=torch.Generator().manual_seed(10 * i + token),
            ).prev_sample  # fmt: skip
            found = torch.bincount(ids.flatten(), minlength=K).double() / n
            guess = logits.log_softmax(-1).expand(1, 1, K)
            ours = process.transition(x[:1], torch.tensor([i]), guess).log_probs[0, 0].exp()
            # five standard deviations of each share
            tolerance = 5 * (ours * (1 - ours) / n).sqrt() + 1e-6
            assert ((found - ours).abs() < tolerance).all(), (i, token, found, ours)


@pytest.mark.parametrize(
    "name", ["VQDiffusionPipeline", "DiffusionGemmaPipeline", "AmusedInpaintPipeline"]
)
def test_pipelines_that_cannot_be_steered_are_refused_by_name(name):
    kind = type(name, (), {"__call__": lambda self: None, "components": {}})
    with pytest.raises(ValueError, match=f"pipe is a {name}, which from_pipeline does not take"):
        from_pipeline(kind(), ["a"], steps=4)
