"""Sequences for backbones: what the network sees, what it must not see, and the way to samplers."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from samplers import SMC, TreeSampling, sample
from steering.models.inverse_folding import InverseFoldingDenoiser
from steering.pipelines.inverse_folding import (
    AMINO_ACIDS,
    Backbone,
    inverse_folding,
    read_pdb,
)


def random_of(seed):
    return torch.Generator().manual_seed(seed)


def network(**options):
    """Untrained, from a fixed seed, with biases and embeddings that are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = InverseFoldingDenoiser(**{"width": 32, "neighbours": 8, **options})
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    return net.eval()


def protein(length, seed=0):
    """[1, L, 4, 3] Å: a walk of steps of 3.8 Å, with the other atoms at random around it."""
    r = random_of(seed)
    step = torch.nn.functional.normalize(torch.randn(length, 3, generator=r), dim=1)
    ca = 3.8 * step.cumsum(0)
    off = torch.nn.functional.normalize(torch.randn(length, 4, 3, generator=r), dim=2)
    atoms = ca[:, None] + 1.45 * off
    atoms[:, 1] = ca
    return atoms[None]


def tokens(length, seed=1):
    return torch.randint(21, (1, length), generator=random_of(seed))


def rotation(seed=2):
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=random_of(seed)).double())
    q = q * r.diagonal().sign()
    q[:, 0] *= q.det()  # no mirror image
    return q.float()


def test_moved_and_turned_proteins_are_the_same():
    net, x, atoms = network(), tokens(20), protein(20)
    here = net(x, coordinates=atoms).logits
    moved = atoms @ rotation().T + torch.tensor([100.0, -50.0, 20.0])
    there = net(x, coordinates=moved).logits
    # float32 holds a coordinate near 100 Å to 4e-6 Å, and features slope by about 1 per Å; 25-fold
    # for what the layers make of it
    assert (here - there).abs().max() < 1e-4 * here.std()
    mirror = net(x, coordinates=atoms * torch.tensor([1.0, 1.0, -1.0])).logits
    assert (here - mirror).abs().max() > 0.1 * here.std()


def test_backbone_and_tokens_both_count():
    net, x, atoms = network(), tokens(20), protein(20)
    here = net(x, coordinates=atoms).logits
    assert (net(x, coordinates=protein(20, 5)).logits - here).abs().max() > 0.1 * here.std()
    # messages are sums of 8 over 30, and the network is not trained: tokens say less
    assert (net(tokens(20, 6), coordinates=atoms).logits - here).abs().max() > 0.03 * here.std()


def test_what_lies_beyond_the_layers_is_not_seen():
    # one layer of three neighbours: the token of a residue far away changes nothing
    net = network(encoders=1, decoders=1, neighbours=3)
    atoms, x = protein(20), tokens(20)
    structure = net.encode(atoms)
    other = x.clone()
    other[0, 0] = (x[0, 0] + 1) % 21
    changed = (net(x, coordinates=atoms).logits != net(other, coordinates=atoms).logits).any(-1)
    assert torch.equal(changed, (structure.neighbours == 0).any(-1))


def test_padding_changes_nothing():
    net, x, atoms = network(), tokens(5), protein(5)
    real = torch.tensor([[True] * 5 + [False] * 4])
    junk = torch.cat([atoms, 1e3 * torch.randn(1, 4, 4, 3, generator=random_of(3))], 1)
    longer = torch.cat([x, tokens(4, 9)], 1)
    padded = net(longer, coordinates=junk, mask=real).logits
    # sums over neighbours in another order: float32 rounding of numbers of order 1
    torch.testing.assert_close(padded[:, :5], net(x, coordinates=atoms).logits, atol=1e-4, rtol=0)
    assert (padded[:, 5:] == 0).all()


def test_items_of_a_batch_do_not_see_each_other():
    net = network()
    x, atoms = torch.cat([tokens(9), tokens(9, 4)]), torch.cat([protein(9), protein(9, 4)])
    both = net(x, coordinates=atoms).logits
    # products of matrices round differently over batch sizes
    torch.testing.assert_close(both[:1], net(x[:1], coordinates=atoms[:1]).logits,
                               atol=1e-4, rtol=0)  # fmt: skip


def test_chains_and_gaps_are_told():
    net, x, atoms = network(), tokens(9), protein(9)
    here = net(x, coordinates=atoms).logits
    gap = torch.arange(9)[None] + 10 * (torch.arange(9) > 4)
    apart = (torch.arange(9) > 4).long()[None]
    assert not torch.equal(here, net(x, coordinates=atoms, residue=gap).logits)
    assert not torch.equal(here, net(x, coordinates=atoms, chain=apart).logits)
    shifted = net(x, coordinates=atoms, residue=torch.arange(9)[None] + 100).logits
    assert torch.equal(here, shifted)


def test_gradients_of_relaxed_tokens_match_finite_differences():
    net = network(width=16).double()
    atoms = protein(6).double()
    structure = net.encode(atoms)
    weights = torch.rand(1, 6, 21, generator=random_of(7)).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: net(w, structure=structure).logits, weights, atol=1e-7, rtol=1e-5
    )
    hard = tokens(6)
    torch.testing.assert_close(
        net(one_hot(hard, 21).double(), structure=structure).logits,
        net(hard, structure=structure).logits,
    )


def test_it_saves_and_loads_bit_equal(tmp_path):
    net, x, atoms = network(), tokens(7), protein(7)
    net.save_pretrained(tmp_path)
    again = InverseFoldingDenoiser.from_pretrained(tmp_path)
    assert torch.equal(net(x, coordinates=atoms).logits, again(x, coordinates=atoms).logits)
    assert net(x, coordinates=atoms, return_dict=False)[0].shape == (1, 7, 20)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "coordinates"),
        ({"coordinates": torch.zeros(1, 5, 3)}, r"\[N, L, 4, 3\]"),
        ({"coordinates": torch.full((1, 5, 4, 3), math.nan)}, "nan"),
        ({"coordinates": torch.zeros(1, 6, 4, 3)}, "sample has shape"),
        ({"coordinates": torch.zeros(1, 5, 4, 3), "mask": torch.ones(1, 4)}, "mask has shape"),
        ({"coordinates": torch.zeros(1, 5, 4, 3), "class_labels": 0}, "class_labels"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        network()(tokens(5), **options)


def record(serial, atom, residue, chain, number, place, alternative=" ", kind="ATOM"):
    x, y, z = place
    return (
        f"{kind:6}{serial:5}  {atom:3}{alternative}{residue} {chain}{number:>5}   "
        f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00"
    )


def pdb_of(residues):
    """Text of a PDB file of (name, chain, number with its insertion code), atoms all apart."""
    lines, k = [], 0
    for residue, chain, number in residues:
        for atom in ("N", "CA", "C", "O", "CB"):
            lines.append(record(k, atom, residue, chain, number, (k, -k / 2, 0.125)))
            k += 1
    return "\n".join(lines)


def test_a_pdb_file_is_read():
    text = pdb_of([("MET", "A", "5 "), ("GLY", "A", "5A"), ("LYS", "A", "6 "), ("TRP", "B", "1 ")])
    lines: list[str] = list(text.splitlines())
    lines.insert(6, record(99, "N", "ALA", "A", "5A", (9, 9, 9), alternative="B"))  # a second place
    lines.append(record(100, "N", "ALA", "B", "2 ", (0, 0, 0)))  # not resolved any further
    lines.append(record(101, "CA", "HOH", "B", "3 ", (0, 0, 0), kind="HETATM"))
    lines += ["ENDMDL", record(102, "N", "VAL", "C", "1 ", (0, 0, 0))]
    b = read_pdb("\n".join(["HEADER    TEST", *lines]), "mine")
    assert (b.name, b.sequence, len(b)) == ("mine", "MGKW", 4)
    assert b.residue.tolist() == [5, 6, 7, 1]
    assert b.chain.tolist() == [0, 0, 0, 1]
    assert b.coordinates.shape == (4, 4, 3)
    assert b.coordinates[1, 0].tolist() == [5, -2.5, 0.125]
    assert b.coordinates[2].tolist() == [[k, -k / 2, 0.125] for k in (10, 11, 12, 13)]
    assert read_pdb("\n".join(lines), chains="B").sequence == "W"
    with pytest.raises(ValueError, match="chains 'Z'"):
        read_pdb("\n".join(lines), chains="Z")
    with pytest.raises(ValueError, match="line 1: no PDB record"):
        read_pdb(lines[0][:40])


def backbone(name, length, seed):
    at = torch.arange(length)
    return Backbone(name, "A" * length, protein(length, seed)[0], at, 0 * at)


LETTERS, LENGTHS = {"one": "W", "two": "K"}, {"one": 6, "two": 8}


class Likes:
    """How many residues of a backbone's own favourite letter; differentiable."""

    differentiable = True

    def __call__(self, items, prompts):
        return torch.stack([
            item[: LENGTHS[p], AMINO_ACIDS.index(LETTERS[p])].sum()
            for item, p in zip(items, prompts, strict=True)
        ])  # fmt: skip


@pytest.mark.parametrize("sampler", [SMC(64), TreeSampling()])
def test_backbones_are_steered_apart(sampler):
    pair = [backbone("one", 6, 0), backbone("two", 8, 1)]
    model = inverse_folding(network(), pair, steps=4, keep=["_C____", "________"])
    plain = sample(model, Likes(), SMC(64), nfe=256, lam=0.0, draws=32, progress=False)
    found = sample(model, Likes(), sampler, nfe=1024, lam=3.0, draws=32, progress=False)
    assert found.prompts.count("one") == (found.rows == 0).sum() > 0
    for row, name in enumerate(("one", "two")):
        means = [
            float((r.rewards * r.counts)[r.rows == row].sum() / r.counts[r.rows == row].sum())
            for r in (plain, found)
        ]
        assert means[1] > means[0] + 0.5
        assert {t[1] for t, p in zip(found.texts, found.prompts, strict=True) if p == "one"} == {
            "C"
        }
        assert name in found.prompts
    # beyond the end of the shorter one there is nothing to choose
    assert {t[6:] for t, p in zip(found.texts, found.prompts, strict=True) if p == "one"} == {"AA"}


def test_a_backbone_is_guessed_alone_as_beside_others(tmp_path):
    pair, net = [backbone("one", 6, 0), backbone("two", 8, 1)], network()
    both = inverse_folding(net, pair, steps=4)
    alone = inverse_folding(net, pair[:1], steps=4)
    assert both.name != alone.name
    x = torch.full((1, 8), 20)
    guess = [m.denoiser(x[:, :n], torch.ones(1), torch.zeros(1, dtype=torch.int64))
             for m, n in ((both, 8), (alone, 6))]  # fmt: skip
    torch.testing.assert_close(guess[0][:, :6], guess[1], atol=1e-4, rtol=0)
    (tmp_path / "1abc.pdb").write_text(pdb_of([("MET", "A", "1 "), ("GLY", "A", "2 ")]))
    assert inverse_folding(net, [tmp_path / "1abc.pdb"]).prompts == ("1abc",)


@pytest.mark.parametrize(
    ("backbones", "keep", "said"),
    [
        ([], None, "at least one"),
        ([backbone("one", 6, 0)] * 2, None, "another name"),
        (["nowhere.pdb"], None, "no file"),
        ([backbone("one", 6, 0)], ["C"], "6 letters"),
        ([backbone("one", 6, 0)], "______", "list of one template"),
    ],
)
def test_wrong_arguments_are_named(backbones, keep, said):
    with pytest.raises(ValueError, match=said):
        inverse_folding(network(), backbones, keep=keep)
