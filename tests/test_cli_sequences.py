"""The `steer` command on sequences: texts instead of pictures."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from samplers import cli
from samplers.cli.words import parse_reward
from steering import zoo
from steering.models.sequence_classifier import SequenceClassifier
from steering.rewards import LogOdds, Sum, Table
from tests.test_cli import fails
from tests.test_sequence_pipeline import pipeline

OWN = """
from steering.models.sequence_pipeline import SequencePipeline
from steering.rewards import from_text

@from_text(SequencePipeline.from_pretrained("model"))
def bs(texts, prompts):
    return [float(text.count("b")) for text in texts]
"""
ASKED = ["sample", "--model", "model", "--steps", "4", "--nfe", "80", "--quiet", "--draws", "6",
         "--reward", "own_texts:bs", "--out", "out"]  # fmt: skip


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a saved pipeline by class and a reward of its texts, as a user would have."""
    pipeline(classes=3, length=6).save_pretrained(tmp_path / "model")
    (tmp_path / "own_texts.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_texts", None)


@pytest.mark.parametrize("sampler", [["dts", "branch=even"], ["smc"]], ids=["dts", "smc"])
def test_sequences_are_written_as_texts(own, sampler):
    asked = [*ASKED, "--prompt", "a_c", "--prompt", "2", "--sampler", *sampler]
    assert cli.main(asked) == 0
    account = json.loads(Path("out/result.json").read_text())
    lines = Path("out/draws.txt").read_text().splitlines()
    texts = lines[1::2]
    assert texts == account["draws"]["texts"]
    assert len(texts) == account["distinct"]
    for head, text, row in zip(lines[::2], texts, account["draws"]["rows"], strict=True):
        found = re.fullmatch(r">\d{4} reward=(\S+) count=\d+ prompt=('a_c'|2)", head)
        assert found
        assert float(found[1]) == text.count("b")
        assert (found[2] == "2") == (row == 1)
        assert row or re.fullmatch("a[abc]c[abc]{3}", text)
    names = {path.name for path in Path("out").iterdir()}
    assert names & {"grid.png", "images", "strip.png"} == set()
    assert ("tree.html" in names) == (sampler[0] == "dts")
    if sampler[0] == "dts":
        page = Path("out/tree.html").read_text()
        (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
        data = json.loads(data)
        leaves = {text for text in data["texts"] if "_" not in text}
        assert set(texts) <= leaves
        assert any("_" in text for text in data["texts"])  # states on their way
        assert data["images"] == []
        tree = data["trees"][0]
        node, text = tree["readings"][0]
        assert tree["reward"][node] in (None, data["texts"][text].count("b"))
    assert cli.main(asked) == 0  # answered from the record
    assert Path("out/draws.txt").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--prompt", "axe"], "prompts has 'axe' with 'e'"),
        (["--prompt", "7"], "prompts has 7: this model has labels 0 to 2"),
        (["--prompt", "abcabca"], "of 7 characters"),
        (["--eta", "1"], "eta is given, but tokens have none"),
    ],
)
def test_a_mistake_gets_one_line(own, capsys, given, said):
    assert said in fails(capsys, *ASKED, *given)


def test_rewards_of_the_built_in_models_are_one_word_away(monkeypatch, capsys):
    net = SequenceClassifier(tokens=4, classes=4)
    monkeypatch.setattr(zoo, "tfbind8_scores", lambda: torch.rand((4,) * 8))
    monkeypatch.setattr(zoo, "load", lambda name, **_: net)
    assert isinstance(parse_reward("tfbind8", "cpu"), Table)
    dna = parse_reward("dna:1", "cpu")
    assert isinstance(dna, LogOdds)
    assert dna.label == 1
    assert isinstance(parse_reward("bible", "cpu"), LogOdds)
    assert isinstance(parse_reward("2*dna:1+-1*dna:0", "cpu"), Sum)
    with pytest.raises(ValueError, match="class 'HepG2': give 0 to 3"):
        parse_reward("dna:HepG2", "cpu")
