"""The memory that is predicted, against what is allocated."""

from __future__ import annotations

import pytest

from benchmarks.memory import peak_bytes
from steering.finetune.drakes import Paths, drakes, predicted_bytes
from steering.finetune.loop import copied, frozen
from steering.models.sequence_denoiser import SequenceDenoiser
from steering.models.sequence_pipeline import SequencePipeline
from steering.models.token_scheduler import TokenScheduler
from steering.pipelines import from_pipeline
from tests.finetune.small import count_c


@pytest.mark.parametrize("checkpointing", [True, False])
def test_prediction_is_within_a_quarter(checkpointing, capsys):
    # what autograd keeps is counted; what a backward pass holds on top, and what it lets go of as
    # it goes, is not
    net = SequenceDenoiser(4, width=64, depth=4, kernel=5, fine=32).eval()
    pipe = SequencePipeline(net, TokenScheduler(4), length=64)
    mine, network, original = copied(pipe)
    models = from_pipeline(mine, steps=5), from_pipeline(pipe, steps=5)
    paths = Paths(*models, 5, checkpointing=checkpointing)
    with frozen(original):
        kept, states, step = predicted_bytes(paths, network, original, batch=8)
    there = sum(p.numel() * p.element_size() for p in net.parameters())
    measured = peak_bytes(
        lambda: drakes(
            pipe, count_c, alpha=0.5, steps=5, truncate=5, batch=8, updates=1, every=10,
            checkpointing=checkpointing,
        )
    )  # fmt: skip
    assert kept + states + step - there == pytest.approx(measured, rel=1 / 4)
    assert step > 5 * states * (1 if checkpointing else 5)
    said = capsys.readouterr().out
    assert f"predicted peak memory: {(kept + states + step) / 2**30:.3g} GB" in said
