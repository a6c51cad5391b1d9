"""Masked language models of transformers: their law, their prompts, their mask anywhere."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from samplers import SMC, Ancestral, TreeSampling, TreeSearch, load, sample
from steering import from_masked_lm
from steering.discrete import cosine
from steering.pipelines.masked_lm import Vocabulary
from steering.rewards import from_text
from tests.exact.token_laws import law, unmasking_law
from tests.tiny.parts import lively

SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]", "sep_token": "[SEP]"}


def tokenizer(words: str, wrapped: bool = True):
    """Of words between spaces, "a b c"; the mask in the middle of the vocabulary."""
    vocabulary = ["[PAD]", "[CLS]", *words.split()]
    vocabulary[3:3] = ["[MASK]"]
    vocabulary.append("[SEP]")
    ids = {word: k for k, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wrapped:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[(t, ids[t]) for t in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def bert(size: int, length: int = 8):
    config = BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=length,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = BertForMaskedLM(config)
        lively(network, gain=2.0)
    return network


@pytest.fixture(scope="module")
def words():
    return tokenizer("a b")


@pytest.fixture(scope="module")
def network(words):
    return bert(len(words))


def test_the_vocabulary_goes_both_ways():
    words = Vocabulary(5, mask=2)
    assert words.order.tolist() == [0, 1, 3, 4, 2]
    ids = torch.tensor([[4, 3, 2, 0, 1]])
    x = words.state(ids)
    assert x.tolist() == [[3, 2, -1, 0, 1]]
    assert words.ids(torch.where(x < 0, 4, x)).tolist() == ids.tolist()
    weights = torch.eye(5)[torch.where(x < 0, 4, x)]
    assert words.ids(weights).argmax(-1).tolist() == ids.tolist()
    logits = torch.arange(5.0).expand(1, 1, 5)
    assert words.guess(logits).tolist() == [[[0.0, 1.0, 3.0, 4.0]]]


@pytest.mark.parametrize("schedule", ["loglinear", "cosine"])
def test_the_law_is_that_of_unmasking_by_the_networks_guesses(words, network, schedule):
    # [CLS] ? b? [SEP]: two free sites of 5 tokens, 3 steps, against the definition and bare calls
    model = from_masked_lm(network, words, length=4, steps=3, schedule=schedule)
    t = 1 - torch.arange(4, dtype=torch.float64) / 3
    level = (t if schedule == "loglinear" else cosine(t)).tolist()
    level[0], level[-1] = 1.0, 0.0
    mask, kept = words.mask_token_id, [k for k in range(6) if k != words.mask_token_id]

    def guess(state, i):
        ids = torch.tensor([[mask if v is None else kept[v] for v in state]])
        logits = network.eval()(input_ids=ids).logits[0, :, kept].double()
        return logits.softmax(-1).tolist()

    cls, sep = kept.index(words.cls_token_id), kept.index(words.sep_token_id)
    expected = unmasking_law(guess, [cls, None, None, sep], level)
    x, p = law(model)
    found = {tuple(s): q for s, q in zip(x.tolist(), p.tolist(), strict=True) if q > 1e-12}
    assert set(found) == {s for s, q in expected.items() if q > 1e-12}
    # float32 logits, and probabilities of a few products of them
    assert max(abs(found[s] - expected[s]) for s in found) < 1e-6
    assert len(found) == 25


def test_walks_have_that_law_and_texts(words, network):
    model = from_masked_lm(network, words, length=4, steps=3)
    x, p = law(model)
    index = {tuple(model.decode(s[None])[0].tolist()): k for k, s in enumerate(x)}
    n = 4000
    draws = sample(model, lambda items, _: [0.0] * len(items), Ancestral(n), nfe=3 * n,
                   batch=1024, progress=False)  # fmt: skip
    count = torch.zeros(len(p), dtype=torch.float64)
    for item, times in zip(draws.items.tolist(), draws.counts.tolist(), strict=True):
        count[index[tuple(item)]] += times
    likely = p * n > 5
    chi = ((count - p * n)[likely] ** 2 / (p * n)[likely]).sum()
    degrees = int(likely.sum()) - 1
    assert chi < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations
    text = draws.texts[0]
    assert set(text.split()) <= {"a", "b"}
    assert "[CLS]" not in text
    assert "distinct" in str(draws)


def test_prompts_are_kept_and_a_mask_in_one_is_filled(words, network):
    prompts = ["b a", "[MASK] b", ""]
    model = from_masked_lm(network, words, prompts, length=6, steps=2)
    draws = sample(model, lambda items, _: [0.0] * len(items), Ancestral(16), nfe=32,
                   progress=False)  # fmt: skip
    ids = words.convert_tokens_to_ids
    for item, row in zip(draws.items, draws.rows.tolist(), strict=True):
        assert item[0] == words.cls_token_id
        assert item[-1] == words.sep_token_id
        assert words.mask_token_id not in item
        assert row != 0 or item[1:3].tolist() == ids(["b", "a"])
        assert row != 1 or item[2] == ids("b")
    free = draws.items[draws.rows == 1, 1]
    assert len(free.unique()) > 1


def test_a_prompt_changes_the_law_of_what_follows(words, network):
    model = from_masked_lm(network, words, ["a", "b"], length=4, steps=2)
    # rows keep different tokens; what is drawn behind them is compared
    x = model.process.prior(torch.arange(2))
    guess = model.denoiser(x, torch.ones(2), torch.tensor([0, 1])).exp()
    assert (guess[0, 2] - guess[1, 2]).abs().max() > 1e-2


def test_relaxed_states_are_the_hard_ones_at_the_corners_with_gradients(words, network):
    model = from_masked_lm(network, words, ["a"], length=4, steps=2, items="weights")
    process = model.process
    x = process.noised(torch.tensor([[1, 0, 3, 2]] * 8), torch.ones(8).long(), torch.arange(8))
    t, row = process.time(torch.ones(8).long()), torch.zeros(8, dtype=torch.int64)
    soft = process.weights(x).requires_grad_()
    hard = model.denoiser(x, t, row)
    relaxed = model.denoiser(soft, t, row)
    masked = (x == process.tokens) & (model.denoiser.fixed < 0)
    assert masked.any()
    # one matrix product more, in float32
    torch.testing.assert_close(relaxed[masked], hard[masked], rtol=0, atol=1e-4)
    (slope,) = torch.autograd.grad(model.decode(relaxed).pow(2).sum(), soft)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    items = model.decode(x)
    assert items.shape == (8, 4, len(words))
    assert (items.argmax(-1) == words.mask_token_id).equal(x == process.tokens)


def test_items_of_both_kinds_are_written_alike(words, network):
    tokens, weights = (
        from_masked_lm(network, words, length=4, steps=2, items=kind)
        for kind in ("tokens", "weights")
    )
    guess = tokens.denoiser(
        tokens.process.prior(torch.arange(3)), torch.ones(3), torch.zeros(3).long()
    )
    assert tokens.decode(guess).dtype == torch.int64
    assert tokens.write(tokens.decode(guess)) == weights.write(weights.decode(guess))
    torch.testing.assert_close(weights.decode(guess).sum(-1), torch.ones(3, 4))


@pytest.mark.parametrize(
    "sampler",
    [SMC(particles=16), TreeSampling(parallel=4), TreeSearch(parallel=4)],
    ids=["smc", "dts", "dts-star"],
)
def test_samplers_steer_it_by_texts(words, network, sampler):
    model = from_masked_lm(network, words, ["a"], length=6, steps=4)

    @from_text(model)
    def bs(texts):
        return [float(text.split().count("b")) for text in texts]

    plain = sample(model, bs, Ancestral(200), nfe=800, progress=False)
    few = isinstance(sampler, TreeSearch)  # its draws are distinct, and there are 35 texts
    steered = sample(model, bs, sampler, nfe=800, draws=5 if few else 50, lam=3.0, progress=False)
    share = steered.counts.double() / steered.counts.sum()
    assert float(share @ steered.rewards) > float(plain.rewards.mean()) + 0.3
    assert all(text.split()[0] == "a" for text in steered.texts)


def test_a_run_is_kept_and_goes_on(words, network, tmp_path):
    model = from_masked_lm(network, words, length=5, steps=4)
    bs = from_text(model)(lambda texts: [float(text.count("b")) for text in texts])
    first = sample(model, bs, TreeSampling(), nfe=200, record=tmp_path / "run", progress=False)
    again = load(tmp_path / "run", model, bs)
    assert again.texts == first.texts
    assert again.more(nfe=200, progress=False).nfe > first.nfe
    other = from_masked_lm(network, words, ["a"], length=5, steps=4)
    with pytest.raises(ValueError, match="record"):
        load(tmp_path / "run", other, bs)


class Mdlm(nn.Module):
    """As MDLM's checkpoints are called: the mask last, total noise, bare logits unless asked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.out = nn.Linear(5, 7)
        self.told: list[torch.Tensor] = []

    def forward(self, input_ids=None, timesteps=None, output_hidden_states=None, return_dict=None):
        self.told.append(timesteps)
        x = self.embed(input_ids)
        return self.out(x + x.mean(1, keepdim=True))


def test_a_network_that_is_told_its_noise_and_has_a_mask_of_its_own():
    words = tokenizer("a b c", wrapped=False)  # ids 0 to 6, of which this one's mask is the last
    network = Mdlm()
    model = from_masked_lm(network, words, ["a"], length=3, steps=4, mask=6)
    network.told.clear()
    model.denoiser(model.process.prior(torch.arange(1)), torch.tensor([0.25]), torch.arange(1))
    # -log(1 - (1 - 1e-3) t), arXiv 2406.07524, in float32
    torch.testing.assert_close(network.told[0], -torch.log(torch.tensor([1 - 0.999 * 0.25])))
    with pytest.raises(ValueError, match="Mdlm takes no relaxed tokens"):
        model.denoiser(torch.ones(1, 3, 7) / 7, torch.ones(1), torch.arange(1))


def nothing(*_):
    raise AssertionError("it was run")


REFUSED = {
    "network": ({"network": "bert"}, "network is a str"),
    "tokenizer": ({"tokenizer": None}, "tokenizer is a NoneType"),
    "items": ({"items": "texts"}, "items='texts'"),
    "length": ({"length": 0}, "length=0"),
    "length-of-prompt": ({"length": 3, "prompts": ["a b"]}, "length=3 is too short"),
    "length-full": ({"length": 4, "prompts": ["a b"]}, "length=4 leaves no token"),
    "steps": ({"steps": 0}, "steps=0"),
    "schedule": ({"schedule": "linear"}, "schedule='linear'"),
    "remask": ({"remask": 2.0}, "remask=2.0"),
    "prompts": ({"prompts": "a"}, "prompts='a' is no list"),
    "prompts-number": ({"prompts": [3]}, "prompts has 3"),
    "mask": ({"mask": -1}, "mask=-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_before_any_call(words, name):
    changed, said = REFUSED[name]
    network = bert(len(words))
    network.forward = nothing
    with pytest.raises((TypeError, ValueError), match=said):
        from_masked_lm(
            **{"network": network, "tokenizer": words, "length": 6, "steps": 2, **changed}
        )


def test_what_a_call_shows_is_refused_by_name(words):
    short = bert(len(words), length=4)
    with pytest.raises(ValueError, match="does not take a sequence of length=6"):
        from_masked_lm(short, words, length=6, steps=2)
    with pytest.raises(ValueError, match="of mask=6, IndexError"):
        from_masked_lm(bert(len(words), length=8), words, length=6, steps=2, mask=6)
