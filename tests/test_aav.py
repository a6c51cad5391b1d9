"""Measured mutants of a capsid: what is read of them, the law of libraries, the additive reward."""

import hashlib
import itertools
import json
import math
import zipfile

import pytest
import torch

from benchmarks import aav_data
from benchmarks.aav_data import ALPHABET, END, LOST, START, TISSUES, Capsid, Library, judge, parse
from benchmarks.aav_frontier import methods
from steering.rewards import Additive

COLUMNS = "mut_type,aa_seq,oof_stop,edit_dist,mut_start,mut_end_wt,mut_end_var,log2_packaging_v_wt"


def effects(packaging, heart=None):
    told = {f"log2_{tissue}_v_wt": 0.5 for tissue in TISSUES}
    return {**told, "log2_packaging_v_wt": packaging, "log2_heart_v_wt": heart}


def tiny():
    """The two files of a protein MA*: the stop counts as no amino acid."""
    singles = {
        "0": {"M": effects(0.0, 0.0), "*": effects(-9.0)},
        "1": {"A": effects(0.0, 0.0), "C": effects(-1.5, 2.0), "W": effects(-6.0)},
    }
    rows = [COLUMNS + "".join(f",{tissue}_log2_biodistribution_v_wt" for tissue in TISSUES)]
    for kind, sequence, stop, distance, start, packaging, heart in (
        ("sub", "MA*", "OOF1:AAP", 0, -1, -4.0, 9.0),
        ("sub", "MA*", "none", 0, -1, -0.1, 0.0),
        ("sub", "MC*", "none", 1, 1, -1.5, 2.0),
        ("ins", "WMA*", "none", 1, 0, -2.0, 1.0),
        ("ins", "MWA*", "none", 1, 1, -4.0, ""),
        ("ins", "M*A*", "none", 1, 1, -8.0, 1.0),
        ("del", "M*", "none", 1, 1, -3.0, 0.0),
    ):
        others = ",".join(["0.25"] * (len(TISSUES) - 1))
        rows.append(f"{kind},{sequence},{stop},{distance},{start},1,1,{packaging},{heart},{others}")
    return json.dumps(singles).encode(), "\n".join(rows).encode()


def test_the_files_are_read():
    capsid = parse(*tiny())
    c, w = ALPHABET.index("C"), ALPHABET.index("W")
    assert capsid.wild_type == "MA"
    assert capsid.substituted["packaging"][1, [c, w]].tolist() == [-1.5, -6.0]
    assert capsid.substituted["heart"][1, c] == 2
    assert capsid.substituted["heart"][1, w].isnan()  # null: not measured
    assert capsid.substituted["packaging"].isfinite().sum() == 4
    # W before site 0, and between the two: what is beside a site is averaged over both sides
    assert capsid.inserted["packaging"][:, w].tolist() == [-3.0, -4.0]
    assert capsid.inserted["heart"][0, w] == 1
    assert capsid.inserted["heart"][1, w].isnan()
    assert capsid.inserted["packaging"].isfinite().sum() == 2


def test_files_are_checked_wherever_they_are(tmp_path, monkeypatch):
    files = dict(zip((aav_data.SINGLES, aav_data.MUTANTS), tiny(), strict=True))
    with pytest.raises(ValueError, match="holds no AAV2_single_subs"):
        aav_data.read(tmp_path)
    with zipfile.ZipFile(tmp_path / "flexs-0.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(f"flexs/landscapes/data/additive_aav_packaging/{name}", content)
    with pytest.raises(ValueError, match="has sha256"):
        aav_data.read(tmp_path)
    known = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(aav_data, "SHA256", known)
    assert aav_data.read(tmp_path).wild_type == "MA"
    assert aav_data.read(tmp_path / "flexs-0.whl").wild_type == "MA"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / aav_data.MUTANTS).write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"all_data_clean\.csv has sha256"):
        aav_data.read(tmp_path)


@pytest.fixture
def library():
    r = torch.Generator().manual_seed(0)
    packaging = 2 * torch.randn(3, 4, generator=r, dtype=torch.float64)
    wild = torch.tensor([2, 0, 1])
    packaging[range(3), wild] = 0
    return Library(wild, packaging, rate=0.4)


@pytest.mark.parametrize("tilted", [False, True])
def test_draws_follow_the_stated_law(library, tilted):
    r = torch.Generator().manual_seed(1)
    tilt = 0.5 * torch.randn(3, 4, generator=r, dtype=torch.float64) * tilted
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    weight = []
    for x in every.tolist():  # as the docstring has it, by hand
        lib = math.prod(0.6 if v == w else 0.4 / 3
                        for v, w in zip(x, library.wild_type.tolist(), strict=True))  # fmt: skip
        S = sum(float(library.packaging[k, v]) for k, v in enumerate(x))
        up = sum(float(tilt[k, v]) for k, v in enumerate(x))
        weight.append(lib * min(1, 2**S) * math.exp(up))
    law = torch.tensor(weight, dtype=torch.float64)
    n = 40_000
    drawn, log_norm = library.draw(n, r, tilt)
    share = torch.bincount(drawn @ torch.tensor([16, 4, 1]), minlength=64) / n
    p = law / law.sum()
    # each share is off by sqrt(p (1 - p) / n); 64 of them stay within 4.5 of it
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1e-4).all()
    # the norm is an acceptance rate of some 0.6: standard error below .005
    assert log_norm == pytest.approx(math.log(law.sum()), abs=0.02)
    if not tilted:
        exact = library.log_prob(every, math.log(law.sum())).exp()
        torch.testing.assert_close(exact, p)


def capsid_of(seed):
    r = torch.Generator().manual_seed(seed)

    def table():
        return -4 * torch.rand(600, 20, generator=r, dtype=torch.float64)

    names = ("packaging", *TISSUES)
    wild = "".join(ALPHABET[k] for k in torch.randint(20, (600,), generator=r).tolist())
    return Capsid(wild, {n: table() for n in names}, {n: table() for n in names})


def test_the_judge_never_reads_the_reward_in_the_window():
    capsid = capsid_of(0)
    one = capsid.substituted
    one["heart"] = 0.5 * one["lung"] + 0.2 * capsid.inserted["heart"] - 1
    table, agreement = judge(capsid, "heart")
    wild = torch.tensor([[c == v for v in ALPHABET] for c in capsid.wild_type[START:END]])
    # 11,440 equations of a linear law without noise; the ridge of 1 shrinks by 1 in 10^4
    torch.testing.assert_close(table[~wild], one["heart"][START:END][~wild], atol=1e-2, rtol=0)
    assert (table[wild] == 0).all()
    assert agreement > 0.999
    one["heart"][START:END] = torch.rand(28, 20).double()
    assert torch.equal(judge(capsid, "heart")[0], table)
    one["heart"][0, 0] += 5
    assert not torch.equal(judge(capsid, "heart")[0], table)


def test_what_was_not_measured_counts_as_not_found():
    capsid = capsid_of(1)
    capsid.substituted["packaging"][START, 3] = math.nan
    assert aav_data.window(capsid, "packaging")[0, 3] == LOST["packaging"]
    tokens = aav_data.wild_tokens(capsid).tolist()
    assert "".join(ALPHABET[k] for k in tokens) == capsid.wild_type[START:END]


def test_an_additive_reward_is_the_mean_over_sequences_of_independent_sites():
    r = torch.Generator().manual_seed(2)
    effects = torch.randn(3, 4, generator=r, dtype=torch.float64)
    reward = Additive(effects)
    p = torch.randn(2, 3, 4, generator=r, dtype=torch.float64).softmax(-1).requires_grad_()
    every = list(itertools.product(range(4), repeat=3))
    means = [
        sum(math.prod(float(q[k, v]) for k, v in enumerate(x))
            * sum(float(effects[k, v]) for k, v in enumerate(x)) for x in every)
        for q in p.detach()
    ]  # fmt: skip
    torch.testing.assert_close(reward(p, [None] * 2), torch.tensor(means, dtype=torch.float64))
    (slope,) = torch.autograd.grad(reward(p, [None] * 2)[0], p)
    assert torch.equal(slope[0], effects)  # exactly, and nothing of the other item
    assert (slope[1] == 0).all()
    assert reward(torch.zeros(1, 3, 4), [None]).tolist() == [0]
    assert reward.differentiable
    assert reward.card.differentiable
    assert reward.card.range == (float(effects.amin(1).sum()), float(effects.amax(1).sum()))
    assert reward.name != Additive(effects + 1).name
    assert (2 * reward + reward)(p.detach(), [None] * 2).shape == (2,)


def test_an_additive_reward_refuses_what_does_not_fit():
    with pytest.raises(TypeError, match=r"\[L, K\]"):
        Additive(torch.zeros(3))
    with pytest.raises(ValueError, match="nan"):
        Additive(torch.full((3, 4), math.nan))
    with pytest.raises(TypeError, match="these effects"):
        Additive(torch.zeros(3, 4))(torch.zeros(2, 4, 3), [None] * 2)


def test_every_line_of_the_frontier_has_a_name_of_its_own():
    for quick in (True, False):
        titles = [m.title for m in methods(quick)]
        assert len(set(titles)) == len(titles)
