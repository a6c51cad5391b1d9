"""The acceptability of texts is what its classifier says, on a tiny random one."""

import pytest
import torch

from samplers import BestOfN, sample
from steering import from_pipeline
from steering.rewards import Acceptability
from tests.tiny_pipelines import tokenizer

TEXTS = ["and it came to pass.", "god said", "qzx;;", "the day of the lord is come, and"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny classifier of three classes, with its tokenizer."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    words = tokenizer()
    config = RobertaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=37, max_position_embeddings=700, num_labels=3,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = RobertaForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "word_embeddings" in name or "classifier" in name or "value" in name:
                weight.mul_(20)  # random networks tell texts apart by almost nothing
    path = tmp_path_factory.mktemp("tiny") / "judge"
    net.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def pipe():
    """A tiny pipeline that writes texts of eight characters."""
    from steering.models.sequence_denoiser import SequenceDenoiser
    from steering.models.sequence_pipeline import SequencePipeline
    from steering.models.token_scheduler import TokenScheduler

    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = SequenceDenoiser(tokens=4, width=8, depth=1, fine=8, kernel=3).eval()
    return SequencePipeline(net, TokenScheduler(4), alphabet="abc ", length=8)


def test_it_is_the_log_probability_of_its_label(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    net = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = torch.cat(
            [net(**words(text, truncation=True, return_tensors="pt")).logits for text in TEXTS]
        )
    for label in range(3):
        reward = Acceptability(model=folder, label=label, batch=3)
        expected = logits.double().log_softmax(1)[:, label]
        # float32 sums in another order, behind padding; values are some units apart
        torch.testing.assert_close(reward(TEXTS, [None] * 4), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.05


def test_texts_that_come_twice_are_told_apart(folder):
    reward = Acceptability(model=folder)
    once, twice = reward(TEXTS, [None] * 4), reward(TEXTS[::-1] + TEXTS, [None] * 8)
    torch.testing.assert_close(twice[4:], once, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twice[:4], once.flip(0), rtol=1e-4, atol=1e-4)
    assert reward([], []).shape == (0,)


def test_a_broken_item_fails_alone(folder, pipe):
    reward = Acceptability(pipe.write, folder)
    items = torch.eye(4)[torch.randint(4, (3, 8), generator=torch.Generator().manual_seed(0))]
    whole = reward(items, [None] * 3)
    items[1, 2, 0] = torch.nan
    broken = reward(items, [None] * 3)
    assert broken.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(broken[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-4)


def test_it_steers_and_its_card_holds(folder, pipe):
    reward = Acceptability(pipe.write, folder)
    model = from_pipeline(pipe, prompts=["a_b", None], steps=4)
    run = sample(model, reward, BestOfN(), nfe=16, seed=0, progress=False)
    torch.testing.assert_close(
        run.rewards.double(), Acceptability(model=folder)(run.texts, [None] * len(run.texts)),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    kept = [text for text, row in zip(run.texts, run.rows, strict=True) if row == 0]
    assert all(text[0] == "a" and text[2] == "b" for text in kept)
    assert not reward.differentiable
    assert not reward.card.differentiable
    assert "does not read the prompt" in reward.card.notes
    assert (run.rewards <= reward.card.range[1]).all()


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(TypeError, match=r"write='a'"):
        Acceptability("a")
    with pytest.raises(ValueError, match=r"label=-1"):
        Acceptability(label=-1)
    with pytest.raises(ImportError, match=r"label=3 is beyond its 3 classes"):
        Acceptability(model=folder, label=3).load()
    with pytest.raises(TypeError, match=r"items Tensor: give texts, or write="):
        Acceptability(model=folder)(torch.zeros(2, 8, 4), [None] * 2)


def test_weights_that_are_no_safetensors_are_not_loaded(folder, tmp_path):
    from transformers import AutoConfig

    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ImportError, match="cannot be loaded"):
        Acceptability(model=str(tmp_path)).load()
