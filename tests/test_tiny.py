"""The tiny pipelines run as they are, repeat themselves, and listen to prompt, picture and time."""

import inspect

import pytest
import torch

from tests.tiny import families

FAMILIES = families()
TEXT = ["cat", "two dogs"]
CLASSES = [[1], [2]]
# of pictures in 0..1; a first state moved by a millionth of itself, some ten roundings, moves none
# of these pictures by more than 1e-4 in four steps
HEARD = 1e-3


def paint(tiny, pipe, prompt=0, seed=0, **changed):
    """Two steps; some pipelines draw from the global generator too."""
    call = {**tiny.call, **changed}
    if tiny.prompt == "text":
        call["prompt"] = TEXT[prompt]
    elif tiny.prompt == "class":
        call["class_labels"] = CLASSES[prompt]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = pipe(
            **call,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed),
        )
    made = made[0]
    return made if torch.is_tensor(made) else torch.stack(made)


def apart(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("tiny", FAMILIES, ids=[tiny.name for tiny in FAMILIES])
def test_family(tiny):
    pipe = tiny.build()
    assert type(pipe).__name__ == tiny.name.split()[0]
    made = paint(tiny, pipe)
    assert made.dim() == {"image": 4, "clip": 5}[tiny.kind]
    assert made.shape[-3] == 3
    assert torch.isfinite(made).all()
    assert made.std() > 0.05  # of a picture in 0..1
    # again on the same pipe, and on a new one built from another global state
    assert torch.equal(paint(tiny, pipe), made)
    torch.rand(3)
    assert torch.equal(paint(tiny, tiny.build()), made)
    assert apart(paint(tiny, pipe, seed=1), made) > HEARD
    if tiny.prompt:
        assert apart(paint(tiny, pipe, prompt=1), made) > HEARD


SHOWN = [
    (tiny, name)
    for tiny in FAMILIES
    for name in ("image", "control_image", "mask_image", "control_mask")
    if name in tiny.call
]


@pytest.mark.parametrize(
    ("tiny", "name"), SHOWN, ids=[f"{tiny.name} {name}" for tiny, name in SHOWN]
)
def test_pictures_matter(tiny, name):
    pipe = tiny.build()
    turned = tiny.call[name].flip(-1)
    assert apart(paint(tiny, pipe, **{name: turned}), paint(tiny, pipe)) > HEARD


def network(pipe):
    return next(
        getattr(pipe, name) for name in ("transformer", "unet") if getattr(pipe, name, None)
    )


@pytest.mark.parametrize("tiny", FAMILIES, ids=[tiny.name for tiny in FAMILIES])
def test_network_knows_state_and_time(tiny):
    # a call of the pipeline's is made again, with another state and then another time
    pipe = tiny.build()
    model = network(pipe)
    forward = model.forward
    names = list(inspect.signature(forward).parameters)
    state = next(name for name in names if name in ("hidden_states", "sample", "x"))
    time = next(name for name in names if name in ("timestep", "timesteps", "t"))
    seen = {}

    def listen(*arguments, **options):
        call = dict(zip(names, arguments, strict=False)) | options
        if torch.as_tensor(call[time]).any():  # flows begin, others end, at time 0: no half of it
            seen.update(call)
        return forward(*arguments, **options)

    model.forward = listen
    paint(tiny, pipe)
    del model.forward

    def guess(**changed):
        with torch.no_grad():
            out = model(**{**seen, **changed})
        out = out[0]
        return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out

    def other(value, scale):
        if isinstance(value, (list, tuple)):
            return [scale * part for part in value]
        return (scale * value).to(value.dtype)

    base = guess()
    assert torch.equal(guess(), base)
    for name, scale in ((state, -1), (time, 0.5)):
        assert apart(guess(**{name: other(seen[name], scale)}), base) > HEARD * base.abs().max()


def test_building_leaves_the_global_generator_alone():
    tiny = FAMILIES[0]
    before = torch.get_rng_state()
    tiny.build()
    assert torch.equal(torch.get_rng_state(), before)


def test_names_are_unique_and_many():
    names = [tiny.name for tiny in FAMILIES]
    assert len(set(names)) == len(names)
    assert len({name.split()[0] for name in names}) >= 40
