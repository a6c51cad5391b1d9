"""The `steer` command: what it writes, and one line for every mistake."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from samplers import (
    SMC,
    SVDD,
    Beam,
    BestOfN,
    Importance,
    TreeSampling,
    TreeSearch,
    ZeroOrder,
    cli,
    load,
)
from samplers.cli.words import parse_reward, parse_sampler, sampler_words
from search.widen import Widening
from steering import from_pipeline, zoo
from steering.rewards import (
    Aesthetic,
    Classifier,
    ClipScore,
    Imscore,
    Jpeg,
    Judge,
    PickScore,
    Sum,
)
from tests import tiny_rewards

ROOT = Path(__file__).parent.parent
SMALL = ["sample", "--model", "zoo:mnist", "--steps", "4", "--nfe", "64", "--quiet"]
OWN = """
from steering.rewards import from_pil

def bright(images, prompts):
    return images.mean((1, 2, 3))

@from_pil
def wide(images):
    return [float(image.width) for image in images]

def asked(images, prompts):
    return ["7"] * len(images)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a reward module in it, as a user would have."""
    (tmp_path / "my_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def fails(capsys, *arguments) -> str:
    """The one line that a mistake gets."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("steer: ")
    return lines[0]


def test_sample_writes_pictures_an_account_and_the_record(own):
    out = own / "out"
    asked = ["--reward", "jpeg", "--also", "my_rewards:bright", "--draws", "5", "--seed", "3"]
    assert cli.main([*SMALL, *asked, "--out", str(out)]) == 0
    account = json.loads((out / "result.json").read_text())
    assert account["settings"]["seed"] == 3
    assert account["status"] == "done"
    assert account["spent"]["rows"][0] <= 64
    draws = account["draws"]
    assert sum(draws["counts"]) == 5
    assert len(draws["also: bright"]) == len(draws["rewards"]) == account["distinct"]
    assert len(list((out / "images").iterdir())) == account["distinct"]
    for name in ("grid.png", "tree.png", "curve.png"):
        assert Image.open(out / name).size[0] >= 72
    assert "<canvas" in (out / "tree.html").read_text(encoding="utf-8")
    model = from_pipeline(zoo.load("mnist"), steps=4)
    again = load(out / "record", model, Jpeg(), draws=5)
    assert again.rewards.tolist() == draws["rewards"]
    assert Image.open(out / "images" / "0000.png").tobytes() == again.images[0].tobytes()


def test_sample_asked_again_answers_from_its_record(own, capsys):
    asked = [*SMALL, "--reward", "jpeg", "--out", "out"]
    assert cli.main(asked) == 0
    first = json.loads(Path("out/result.json").read_text())
    assert cli.main(asked) == 0
    again = json.loads(Path("out/result.json").read_text())
    assert again["draws"] == first["draws"]
    assert again["spent"]["calls"] == 0 < first["spent"]["calls"]
    assert "out/record" in fails(capsys, *asked, "--seed", "1")


@pytest.mark.slow
def test_demo_writes_its_pictures_and_a_table(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "demo"), "--nfe", "800"]) == 0
    printed = capsys.readouterr()
    for word in ("plain draws", "importance", "DTS", "DTS*", "mean reward", "tree.html"):
        assert word in printed.out
    for name in ("plain", "importance", "dts", "dts_star", "tree", "curve"):
        assert Image.open(tmp_path / "demo" / f"{name}.png").size[0] >= 72
    account = json.loads((tmp_path / "demo" / "result.json").read_text())
    mean = {k: sum(v["draws"]["rewards"]) / v["distinct"] for k, v in account.items()}
    # best of 32 against 32 plain draws of a model that draws odd digits half of the time
    assert mean["dts_star"] > mean["plain"]
    assert all(run["nfe"] <= 800 for run in account.values())


def test_samplers_are_read_from_words():
    words = ["dts", "law=published", "branch=(1,5)", "parallel=8", "widening=2,.8"]
    assert parse_sampler(words) == TreeSampling(
        law="published", branch=(1, 5), parallel=8, widening=Widening(2, 0.8)
    )


@pytest.mark.parametrize(
    ("words", "ranked"),
    [
        (["svdd", "proposals=2", "levels=(1,2)"], False),
        (["beam", "proposals=2"], True),
        (["zero-order", "neighbours=2", "pivots=1"], True),
    ],
)
def test_searches_run_from_the_command(own, words, ranked):
    asked = [*SMALL, "--reward", "jpeg", "--sampler", *words, "--out", "out"]
    assert cli.main(asked) == 0
    account = json.loads(Path("out/result.json").read_text())
    rewards = account["draws"]["rewards"]
    assert account["spent"]["rows"][0] == 64
    assert len(rewards) == account["distinct"] > 4
    assert (rewards == sorted(rewards, reverse=True)) or not ranked


def test_rewards_are_read_from_words(own):
    assert parse_reward("jpeg:50", "cpu") == Jpeg(50)
    total = parse_reward("0.7*classifier:4,9 + -1e-1*my_rewards:wide+jpeg", "cpu")
    assert isinstance(total, Sum)
    assert [weight for weight, _ in total.terms] == [0.7, -0.1, 1.0]
    assert isinstance(total.terms[0][1], Classifier)
    assert parse_reward("pair:4,9", "cpu").name == "2*min(log p(4), log p(9))"


def test_learned_rewards_are_one_name_away(own):
    assert parse_reward("clip", "cpu") == ClipScore()
    assert parse_reward("clip:openai/clip-vit-base-patch32", "cuda") == ClipScore(
        "openai/clip-vit-base-patch32", device="cuda"
    )
    assert parse_reward("pickscore", "cpu") == PickScore()
    assert parse_reward("aesthetic", "cpu") == Aesthetic()
    with tiny_rewards.imscore():
        assert parse_reward("imagereward", "cpu") == Imscore("imagereward")
        total = parse_reward("0.1*hpsv2 + cyclereward", "cpu")
    assert total.name == "0.1*HPSv2.1 + 1*CycleReward"
    judge = parse_reward("judge:my_rewards:asked", "cpu")
    assert isinstance(judge, Judge)
    assert judge.name == "judge asked"


def test_a_learned_reward_and_a_judge_steer_from_the_shell(own):
    # grey digits without a prompt: rewards that do not read it
    folder, head = tiny_rewards.clip(own / "clip"), tiny_rewards.head(own / "head")
    Path("my_rewards.py").write_text(
        f"{OWN}\nfrom steering.rewards import Aesthetic\nbeauty = Aesthetic({folder!r}, {head!r})\n"
    )
    asked = ["--reward", "my_rewards:beauty", "--also", "judge:my_rewards:asked", "--draws", "2"]
    assert cli.main([*SMALL, *asked, "--out", "out"]) == 0
    draws = json.loads(Path("out/result.json").read_text())["draws"]
    assert all(math.isfinite(reward) for reward in draws["rewards"])
    assert draws["also: judge asked"] == [7.0] * len(draws["rewards"])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "COMMAND"),
        (["draw"], "draw"),
        (["sample", "--model", "zoo:mnist"], "--reward"),
        (["demo", "--nfe", "10"], "--nfe 10"),
        (["demo", "--nfe", "many"], "--nfe"),
        ([*SMALL, "--reward", "beauty"], "beauty"),
        ([*SMALL, "--reward", "classifier:12"], "12"),
        ([*SMALL, "--reward", "classifier:"], "classifier"),
        ([*SMALL, "--reward", "classifier:a"], "classifier:a"),
        ([*SMALL, "--reward", "pair:4"], "pair"),
        ([*SMALL, "--reward", "jpeg:200"], "quality"),
        ([*SMALL, "--reward", "x*jpeg"], "x*jpeg"),
        ([*SMALL, "--reward", "no_such_module:f"], "no_such_module"),
        ([*SMALL, "--reward", "my_rewards:f"], "has no function f"),
        ([*SMALL, "--reward", "my_rewards:number"], "has no function number"),
        ([*SMALL, "--reward", "jpeg", "--also", "beauty"], "beauty"),
        ([*SMALL, "--reward", "clip:./no/clip"], "./no/clip"),
        ([*SMALL, "--reward", "judge:"], "judge:MODULE:FUNCTION"),
        ([*SMALL, "--reward", "judge:my_rewards:f"], "has no function f"),
        ([*SMALL, "--reward", "judge:my_rewards"], "has no function"),
        ([*SMALL, "--reward", "imagereward"], "diffusion-steering[imscore]"),
        ([*SMALL, "--reward", "jpeg", "--sampler", "mcts"], "mcts"),
        ([*SMALL, "--reward", "jpeg", "--sampler", "dts", "depth=3"], "depth=3"),
        ([*SMALL, "--reward", "jpeg", "--sampler", "dts", "parallel"], "KEY=VALUE"),
        ([*SMALL, "--reward", "jpeg", "--sampler", "dts", "law=exact"], "law"),
        ([*SMALL, "--reward", "jpeg", "--sampler", "dts", "widening=3"], "widening"),
        ([*SMALL, "--reward", "jpeg", "--prompt", "a cat"], "--prompt"),
        ([*SMALL, "--reward", "jpeg", "--prompt", "3"], "unconditional"),
        ([*SMALL, "--reward", "jpeg", "--device", "abacus"], "--device abacus"),
        ([*SMALL, "--reward", "jpeg", "--eta", "0", "--sampler", "dts", "branch=(2,)"], "branch"),
        ([*SMALL, "--reward", "jpeg", "--lam", "1", "--kl", "1"], "kl"),
        ([*SMALL, "--reward", "jpeg", "--nfe", "1"], "nfe"),
        (["sample", "--model", "zoo:mnist", "--reward", "jpeg"], "--nfe"),
        (["sample", "--model", "zoo:sd", "--reward", "jpeg", "--nfe", "9"], "sd"),
        (["sample", "--model", "./no/folder", "--reward", "jpeg", "--nfe", "9"], "no/folder"),
    ],
)
def test_a_mistake_gets_one_line(own, capsys, arguments, names):
    assert names in fails(capsys, *arguments)
    assert not Path("runs").exists()


def test_a_reward_that_cannot_be_loaded_is_told_before_a_pipeline_is(own, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (own / "empty").mkdir()
    words = ["sample", "--model", "./no/folder", "--reward", "clip:./empty", "--nfe", "9"]
    assert "cannot be loaded from ./empty" in fails(capsys, *words)
    assert "no module 'clipscore' here" in fails(capsys, *SMALL, "--reward", "clipscore:x")


def test_a_pipeline_folder_is_steered_in_silence(tmp_path):
    zoo.load("mnist").save_pretrained(tmp_path / "pipe")
    asked = ["--reward", "jpeg", "--steps", "4", "--nfe", "16", "--sampler", "importance"]
    ran = subprocess.run(
        [sys.executable, "-m", "samplers.cli", "sample", "--model", "pipe", *asked, "--quiet"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    assert ran.stderr == ""
    assert (tmp_path / "runs/steer/grid.png").exists()
    assert not (tmp_path / "runs/steer/tree.png").exists()


def test_a_text_to_image_folder_is_driven_with_arguments_of_its_own(own, capsys):
    from diffusers import AutoencoderTiny

    from tests.tiny_pipelines import stable_diffusion

    stable_diffusion().save_pretrained("pipe")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained("small")
    Path("prompts.txt").write_text("a red fox\n\ntwo blue jays\n")
    asked = ["sample", "--model", "pipe", "--prompts", "prompts.txt", "--steps", "3", "--nfe", "60"]
    asked += [
        "--reward",
        "my_rewards:bright",
        "--sampler",
        "smc",
        "particles=4",
        "--preview",
        "small",
    ]
    assert cli.main([*asked, "--call", "guidance_rescale=0.5"]) == 0
    told = capsys.readouterr().out
    assert "2 conditions on cpu: driven" in told
    assert "native adapters take no guidance_rescale" in told
    account = json.loads(Path("runs/steer/result.json").read_text())
    assert set(account["draws"]["rows"]) == {0, 1}
    assert "--call strength: give KEY=VALUE" in fails(capsys, *asked, "--call", "strength")
    assert "there is no file x.png" in fails(capsys, *asked, "--call", "image=@x.png")
    assert "does not take" in fails(
        capsys, *asked, "--quiet", "--out", "o", "--call", "strength=1.0"
    )
    assert "--offload: built-in" in fails(capsys, *SMALL, "--reward", "jpeg", "--offload")
    words = [*asked[:3], "--prompts", "none.txt", *asked[5:]]
    assert "--prompts none.txt: there is no such file" in fails(capsys, *words)


def test_help_names_every_sampler_and_its_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("ancestral", "best-of-n", "importance", "smc", "dts", "dts-star", "law=path"):
        assert word in text


SWEEP = """
model = "zoo:mnist"
steps = 4
nfe = [16, 32]
seeds = 2
draws = 20
also = ["jpeg"]
extractor = "mnist-classifier"
reference = 60
objective = "mmd"
tuning_seeds = 1
device = "cpu"

[task]
even = "classifier:0,2,4,6,8"

[sampler]
importance = "importance"
SMC = ["smc particles=2", "smc levels=(2,)"]
"""


@pytest.mark.slow
def test_a_sweep_runs_goes_on_and_is_drawn(own, capsys):
    Path("sweep.toml").write_text(SWEEP)
    assert cli.main(["sweep", "sweep.toml", "--out", "out", "--nfe", "16", "--minutes", "0"]) == 0
    assert "time is up" in capsys.readouterr().out
    assert cli.main(["sweep", "sweep.toml", "--out", "out", "--nfe", "16"]) == 0
    printed = capsys.readouterr().out
    assert "| SMC |" in printed
    assert "done" in printed
    assert cli.main(["sweep", "sweep.toml", "--out", "out", "--quiet"]) == 0
    assert cli.main(["sweep", "sweep.toml", "--out", "out"]) == 0
    assert "seed" not in capsys.readouterr().out.split("**even**")[0]  # nothing is done twice
    assert cli.main(["plot", "out"]) == 0
    for metric in ("frechet", "mmd", "reward", "also-jpeg-kb"):
        for against in ("nfe", "seconds"):
            assert Image.open(f"out/{metric}-{against}.png").size[0] > 400
    assert Path("out/table.csv").read_text().count("\n") == 1 + 2 * 2 * 2
    for name in ("table.md", "table.parquet"):
        assert Path("out", name).exists()
    assert cli.main(["plot", "out", "--metric", "ess", "--format", "svg"]) == 0
    assert Path("out/ess-nfe.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["sweep"], "--task"),
        (["sweep", "none.toml"], "none.toml"),
        (["sweep", "bad.toml"], "colour"),
        (["sweep", "broken.toml"], "broken.toml"),
        (["sweep", "table.toml"], "nfe is a table"),
        (["sweep", "list.toml"], "seeds is a list"),
        (["sweep", "text.toml"], "--seeds"),
        (["sweep", "sweep.toml", "--task", "odd"], "--task odd"),
        (["sweep", "sweep.toml", "--sampler", "x=mcts"], "mcts"),
        (["sweep", "sweep.toml", "--shard", "1"], "--shard 1"),
        (["sweep", "sweep.toml", "--shard", "2/2"], "shard"),
        (["sweep", "sweep.toml", "--extractor", "eyes"], "eyes"),
        (["sweep", "sweep.toml", "--objective", "fid"], "objective"),
        (["plot", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_in_a_sweep_gets_one_line(own, capsys, arguments, names):
    Path("sweep.toml").write_text(SWEEP)
    Path("bad.toml").write_text("colour = 3")
    Path("broken.toml").write_text("nfe = [")
    Path("table.toml").write_text("[nfe]\na = 3")
    Path("list.toml").write_text("seeds = [1, 2]")
    Path("text.toml").write_text('seeds = "few"')
    assert names in fails(capsys, *arguments)
    assert not Path("runs").exists()


@pytest.mark.parametrize("goal", ["draws", "best"])
def test_advice_is_a_command_that_runs(own, capsys, goal):
    import shlex

    asked = ["--model", "zoo:mnist", "--steps", "8", "--reward", "0.5*jpeg", "--device", "cpu"]
    assert cli.main(["advise", *asked, "--nfe", "400", "--goal", goal, "--quiet"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("siblings agree") for line in printed)
    command = shlex.split(printed[-1])
    assert command[:2] == ["steer", "sample"]
    assert cli.main([*command[1:], "--out", "out", "--quiet"]) == 0
    account = json.loads(Path("out/result.json").read_text())
    assert cli.main(["advise", *asked, "--nfe", "400", "--json", "--goal", goal]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["command"] == command
    assert account["nfe"] <= figures["nfe"] == 400 - figures["pilot_rows"]
    assert len(figures["agree"]) == len(figures["steps"])


def test_the_words_of_a_sampler_make_it_again():
    for sampler in (
        TreeSampling(branch=(1, 5), widening=Widening(2, 0.8), law="published"),
        TreeSearch(value="clean"), SMC(16, levels=(2, 3)), BestOfN(), Importance(7),
        SVDD(5, 3, levels=(2,), selection="argmax"), Beam(3), ZeroOrder(angle=0.25, pivots=2),
    ):  # fmt: skip
        assert parse_sampler(sampler_words(sampler)) == sampler
