"""Metrics of sequences against plain loops over letters, and the classifier's symmetries."""

import sqlite3
from itertools import combinations, product

import pytest
import torch

from steering.metrics import (
    Motif,
    hamming_diversity,
    kmer_correlation,
    kmer_counts,
    motif_correlation,
    motif_hits,
    read_jaspar,
)
from steering.models.sequence_classifier import SequenceClassifier, log_odds
from steering.rewards import LogOdds
from steering.zoo.dna_sites import encode, read_sites, reverse_complement

LETTERS = "ACGT"


def drawn(n, length, seed=0):
    return torch.randint(4, (n, length), generator=torch.Generator().manual_seed(seed))


def text(row):
    return "".join(LETTERS[k] for k in row)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_words_are_counted_as_in_a_loop(k):
    x = drawn(7, 20)
    rows = [text(row) for row in x.tolist()]
    found = dict(zip(map("".join, product(LETTERS, repeat=k)), kmer_counts(x, k).tolist(),
                     strict=True))  # fmt: skip
    for word, count in found.items():
        starts = range(20 - k + 1)
        assert count == sum(row[i : i + k] == word for row in rows for i in starts)


def test_correlation_of_words_is_pearsons():
    a, b = kmer_counts(drawn(9, 30), 2), kmer_counts(drawn(5, 30, seed=1), 2)
    x, y = (v.double() - v.double().mean() for v in (a, b))
    expected = float(x @ y / (x.norm() * y.norm()))
    assert kmer_correlation(a, b) == pytest.approx(expected, abs=1e-12)
    assert kmer_correlation(a, 3 * a) == pytest.approx(
        1, abs=1e-12
    )  # of the sets' sizes it is free


def motif(word, seen=97.0):
    counts = torch.ones(len(word), 4)
    counts[torch.arange(len(word)), [LETTERS.index(c) for c in word]] = seen
    return Motif.of("X.1", word, counts)


def test_log_odds_of_a_motif_are_its_counts():
    found = motif("AC").log_odds
    # (97 + 1/4) / 101 against 1/4, and (1 + 1/4) / 101
    assert float(found[0, 0].exp()) == pytest.approx(4 * 97.25 / 101, rel=1e-6)
    assert float(found[1, 0].exp()) == pytest.approx(4 * 1.25 / 101, rel=1e-6)


def test_hits_are_found_on_either_strand_once_a_place():
    words = ["GATAAG", "ACGT"]  # the second is its own reverse complement
    x = encode(["GATAAGTTTTTTTTTTACGT", "TTTTCTTATCTTTTTTTTTT", "TTTTTTTTTTTTTTTTTTTT"])
    hits = motif_hits(x, [motif(w) for w in words])
    assert hits.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert motif_hits(reverse_complement(x), [motif(w) for w in words]).tolist() == hits.tolist()


def test_hits_are_those_of_a_loop_for_a_ragged_motif():
    counts = torch.rand(5, 4, generator=torch.Generator().manual_seed(3)) * 50
    one = Motif.of("X.1", "x", counts)
    x, share = drawn(70, 40), 0.5  # more than one chunk of sequences
    least = share * float(one.log_odds.max(1).values.sum())

    def score(row, at):
        return sum(float(one.log_odds[j, row[at + j]]) for j in range(5))

    for row, found in zip(x, motif_hits(x, [one, motif("A" * 41)], share).tolist(), strict=True):
        other = reverse_complement(row)
        places = [
            score(row, at) >= least or score(other, 40 - 5 - at) >= least for at in range(40 - 4)
        ]
        assert found == [sum(places), 0]  # the second is longer than the sequences


def test_correlation_of_motifs_is_of_ranks():
    hits = torch.tensor([[0, 3, 5, 9], [0, 1, 9, 9]])
    bent = torch.tensor([[0, 1, 20, 400]])
    assert motif_correlation(hits, bent) == pytest.approx(1)
    assert motif_correlation(hits, -bent) == pytest.approx(-1)


def test_diversity_is_the_mean_over_pairs():
    x = drawn(6, 15)
    pairs = [float((a != b).double().mean()) for a, b in combinations(x, 2)]
    assert hamming_diversity(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert hamming_diversity(x[:1].repeat(4, 1)) == 0


def test_jaspar_gives_the_newest_of_a_species(tmp_path):
    path = tmp_path / "JASPAR.sqlite"
    base = sqlite3.connect(path)
    base.executescript(
        "create table MATRIX (ID integer, COLLECTION text, BASE_ID text, VERSION integer, NAME);"
        "create table MATRIX_SPECIES (ID integer, TAX_ID text);"
        "create table MATRIX_DATA (ID integer, row text, col integer, val float);"
    )
    known = [
        (1, "CORE", "MA1", 1),
        (2, "CORE", "MA1", 2),
        (3, "CORE", "MA2", 1),
        (4, "POLII", "X", 1),
    ]
    for key, collection, stem, version in known:
        row = (key, collection, stem, version, f"n{key}")
        base.execute("insert into MATRIX values (?, ?, ?, ?, ?)", row)
        base.execute("insert into MATRIX_SPECIES values (?, ?)", (key, 10090 if key == 3 else 9606))
        for place, letter in product((1, 2), LETTERS):
            value = 10.0 * key if LETTERS.index(letter) == place else 0.0
            base.execute("insert into MATRIX_DATA values (?, ?, ?, ?)", (key, letter, place, value))
    base.commit()
    base.close()
    (found,) = read_jaspar(path)
    assert (found.id, found.name) == ("MA1.2", "n2")
    assert float(found.log_odds[0, 1].exp()) == pytest.approx(4 * 20.25 / 21, rel=1e-6)
    assert float(found.log_odds[1, 2]) == pytest.approx(float(found.log_odds[0, 1]))
    assert [m.id for m in read_jaspar(path, ids=("MA2.1", "MA1.1"))] == ["MA2.1", "MA1.1"]
    with pytest.raises(ValueError, match=r"ids has 'MA9.1'"):
        read_jaspar(path, ids=("MA9.1",))
    with pytest.raises(ValueError, match="is no file: give a JASPAR"):
        read_jaspar(tmp_path / "none.sqlite")


def test_wrong_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens has values from 0 to 4"):
        kmer_counts(torch.tensor([[0, 4, 1]]))
    with pytest.raises(ValueError, match=r"tokens has shape \[2, 3, 4\]"):
        hamming_diversity(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="k=9: give 1 to 8"):
        kmer_counts(drawn(2, 8), 9)
    with pytest.raises(ValueError, match="1 sequences: give two"):
        hamming_diversity(drawn(1, 8))


def test_sites_are_read_from_known_data_alone(tmp_path):
    with pytest.raises(ValueError, match=r"holds no K562_.*give the wheel or its folder"):
        read_sites(tmp_path)
    (tmp_path / "K562_hESCT0_HepG2_GM12878_12k_sequences_per_group.txt").write_text("chr\tTAG\n")
    with pytest.raises(ValueError, match=r"has sha256 .* expected ba1063a9"):
        read_sites(tmp_path)
    with pytest.raises(ValueError, match=r"sequences\[1\]='ACN' has other letters"):
        encode(["ACG", "ACN"])
    assert text(reverse_complement(encode(["AACGG"]))[0].tolist()) == "CCGTT"


# --- the classifier ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return SequenceClassifier(motifs=8, width=5, channels=8, depth=2).double().eval()


def test_classifier_reads_both_strands_alike(classifier):
    x = drawn(3, 40)
    apart = classifier(x) - classifier(reverse_complement(x))
    assert apart.abs().max() < 1e-12
    assert (classifier(x)[0] - classifier(x)[1]).abs().max() > 1e-6


def test_gradient_of_log_odds_is_the_finite_difference(classifier):
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(3, 40, 4, generator=rng, dtype=torch.float64).softmax(-1).requires_grad_()
    reward = LogOdds(classifier, 1)
    (grad,) = torch.autograd.grad(reward(x, [None] * 3)[0], x)
    assert grad[1:].norm() == 0  # items are apart
    way = torch.rand(x.shape, generator=rng, dtype=torch.float64) - 0.5
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (log_odds(classifier(x + sign * step * way), 1)[0] for sign in (1, -1))
    # central differences err by step², and rounding by 1e-16 / step
    assert float((grad * way)[0].sum()) == pytest.approx(
        float(ahead - behind) / (2 * step), rel=1e-4, abs=1e-8
    )


def test_log_odds_are_of_the_softmax(classifier):
    logits = classifier(drawn(5, 40))
    p = logits.softmax(1)[:, 2]
    torch.testing.assert_close(log_odds(logits, 2), (p / (1 - p)).log(), rtol=1e-9, atol=1e-9)


def test_log_odds_refuses_what_cannot_be(classifier):
    with pytest.raises(ValueError, match="label=-1: give a class number"):
        LogOdds(classifier, -1)
    with pytest.raises(TypeError, match="net=3 is not callable"):
        LogOdds(3, 1)
    with pytest.raises(TypeError, match="label=4: it must return"):
        LogOdds(classifier, 4)(torch.rand(2, 40, 4), [None] * 2)
