"""Train the reward and the judge of DNA: in which of four cell types is a 200 bp site open?

    pip download --no-deps --dest DIR dnadiffusion==0.0.0.dev0
    python -m steering.zoo.train_dna_classifier --data DIR --out DIR

Two networks of one make on chromosomes that they do not share: `dna-reward` on 3 to 9, `dna-judge`
on 10 to 22, X and Y. What is tuned to the one is judged by the other. A quarter of what they see
has some bases hidden, from none to all, replaced by a quarter of each base: so they can be asked
about guesses, too. Chromosome 2 is watched, chromosome 1 measured once at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from steering.models.sequence_classifier import SequenceClassifier, log_odds
from steering.zoo.classifier_training import fit_epochs, save_classifier
from steering.zoo.dna_sites import CELLS, Sites, read_sites

BATCH = 128
PEAK_LR = 2e-3
CHROMOSOMES = {
    "dna-reward": [f"chr{k}" for k in range(3, 10)],
    "dna-judge": [*(f"chr{k}" for k in range(10, 23)), "chrX", "chrY"],
}


def hidden(weights: Tensor, rng: torch.Generator) -> Tensor:
    """Weights [N, L, 4] of which the first quarter of rows lose some bases, from none to all."""
    n = len(weights) // 4
    lost = torch.rand(weights[:n, :, :1].shape, generator=rng)
    lost = lost < torch.rand((n, 1, 1), generator=rng)
    return torch.cat([torch.where(lost, 0.25, weights[:n]), weights[n:]])


def logits_of(model: SequenceClassifier, tokens: Tensor) -> Tensor:
    """[N, 4] for tokens [N, L], some at a time."""
    with torch.inference_mode():
        return torch.cat([model(part.long()) for part in tokens.split(256)])


def area_under_curve(score: Tensor, positive: Tensor) -> float:
    """Share of pairs of a positive and a negative in which the positive scores more."""
    rank = score.double().argsort().argsort().double() + 1
    n, m = int(positive.sum()), int((~positive).sum())
    return (float(rank[positive].sum()) - n * (n + 1) / 2) / (n * m)


def areas(model: SequenceClassifier, sites: Sites) -> dict[str, float]:
    """Area under the curve of each cell type's log-odds against the rest."""
    logits = logits_of(model, sites.tokens)
    return {
        name: round(area_under_curve(log_odds(logits, k), sites.cell == k), 4)
        for k, name in enumerate(CELLS)
    }


def train(sites: Sites, name: str, epochs: int, out: Path, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    own = sites.where(torch.tensor([c in CHROMOSOMES[name] for c in sites.chromosome]))
    held_out = {"val": sites.of("val"), "test": sites.of("test")}

    def loss_of(rows: Tensor) -> Tensor:
        weights = one_hot(own.tokens[rows].long(), 4).float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(hidden(weights, rng))
        return cross_entropy(logits.float(), own.cell[rows])

    def watch(epoch: int) -> dict[str, dict[str, float]]:
        # chromosome 2 is watched, never selected on
        found = {"val_areas": areas(model, held_out["val"])}
        return found | ({"test_areas": areas(model, held_out["test"])} if epoch == epochs else {})

    # weights and dropout draw from the global generator: seed it here, and leave it as it was
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = SequenceClassifier(classes=len(CELLS))
        told = f"{name} {len(own)} sites "
        lines = fit_epochs(model, loss_of, len(own), BATCH, epochs, PEAK_LR, 3e-2, rng, watch, told)
    save_classifier(model, lines, out / name, torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the wheel, or its folder")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the zoo's folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sites = read_sites(args.data)
    for name in CHROMOSOMES:
        train(sites, name, args.epochs, args.out, args.seed)


if __name__ == "__main__":
    main()
