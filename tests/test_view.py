"""Pictures: what is drawn, where, and in which colour."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from PIL import Image

from samplers.ledger import History
from samplers.view import curve, image_grid, tree_picture
from samplers.view.ink import number, viridis
from samplers.view.tree import _layout, _shown
from search.tree import Tree

NAN = math.nan


def tree_of(parent, step, reward, visits, trees=1, row=None):
    """A tree from lists; values are the best reward below."""
    m = len(parent)
    value = torch.tensor(reward, dtype=torch.float64)
    for n in reversed(range(m)):
        below = value[[k for k in range(m) if parent[k] == n]]
        if below.isfinite().any():
            value[n] = below[below.isfinite()].max()
    return Tree(
        parent=torch.tensor(parent),
        step=torch.tensor(step),
        handle=torch.arange(m) + 100,
        row=torch.tensor(row or [0] * m),
        value=value,
        visits=torch.tensor(visits),
        reward=torch.tensor(reward, dtype=torch.float64),
        failed=torch.zeros(m, dtype=torch.bool),
        log_ratio=torch.zeros(m, dtype=torch.float64),
        log_w=torch.zeros(m, dtype=torch.float64),
        ended=torch.ones(trees, dtype=torch.int64),
        lam=1.0,
    )


@pytest.fixture
def small():
    # root 0; starting noises 1 (6 visits) and 2 (9); leaves 3-6 below 1, 7 and a failed 8 below 2
    return tree_of(
        parent=[-1, 0, 0, 1, 1, 1, 1, 2, 2],
        step=[-1, 0, 0, 10, 10, 10, 10, 10, 10],
        reward=[NAN, NAN, NAN, -4.0, -3.0, -2.0, -1.0, -8.0, NAN],
        visits=[15, 6, 9, 1, 1, 1, 3, 9, 0],
    )


def colours(image: Image.Image) -> set:
    return {colour for _, colour in image.getcolors(image.width * image.height)}


def test_a_tree_shows_the_best_leaves_of_the_most_visited_noises(small):
    # noise 2 comes first although its leaf is the worst; then the best of noise 1
    assert _shown(small, 0, 1) == [0, 2, 7]
    assert _shown(small, 0, 3) == [0, 1, 2, 5, 6, 7]
    assert _shown(small, 0, 99) == [0, 1, 2, 3, 4, 5, 6, 7]  # a failed leaf is never shown


def test_a_layout_keeps_leaves_apart_and_parents_amid_their_children(small):
    children = {0: [1, 2], 1: [3, 4, 5, 6], 2: [7], 3: [], 4: [], 5: [], 6: [], 7: []}
    place = _layout(0, children)
    assert [place[n] for n in (3, 4, 5, 6, 7)] == [0, 1, 2, 3, 4]
    assert place[1] == 1.5
    assert place[2] == 4
    assert place[0] == 2.75


def test_a_tree_shows_thumbnails_of_the_nodes_and_values_as_colours(small):
    asked = []

    def thumbnails(handles):
        asked.extend(handles.tolist())
        return torch.full((len(handles), 1, 4, 4), 0.5)

    image = tree_picture(small, thumbnails, leaves=99)
    assert asked == [101, 102, 103, 104, 105, 106, 107]  # all but the dummy root
    found = colours(image)
    assert (128, 128, 128) in found  # the thumbnails
    for value in (-8.0, -1.0):  # the frames of the worst and the best
        assert viridis((value + 8) / 7) in found


def test_a_node_whose_state_was_let_go_is_a_dot(small):
    def red(handles):
        return torch.tensor([1.0, 0, 0])[:, None, None].expand(len(handles), 3, 4, 4)

    def red_but_101(handles):
        if (handles == 101).any():
            raise KeyError(101)
        return red(handles)

    def pixels(image):
        return sum(n for n, c in image.getcolors(image.width * image.height) if c == (255, 0, 0))

    whole = tree_picture(small, red, leaves=99)
    # one of seven thumbnails of one size is missing; ringing at edges changes a few pixels
    drawn = pixels(tree_picture(small, red_but_101, leaves=99))
    assert drawn == pytest.approx(pixels(whole) * 6 / 7, rel=0.02)


def test_a_trees_edges_are_wider_where_it_was_visited_more():
    def ink(visits):
        tree = tree_of([-1, 0, 0], [-1, 10, 10], [NAN, -1.0, -2.0], visits)
        image = tree_picture(tree)
        # a strip between the root and the leaves, above the legend
        strip = image.crop((60, 70, 90, image.height - 70)).convert("L")
        return sum(strip.histogram()[:250])

    assert ink([100, 100, 100]) > 2 * ink([10000, 1, 1])


def test_a_tree_is_drawn_per_condition():
    tree = tree_of(
        parent=[-1, 0, -1, 2],
        step=[-1, 10, -1, 10],
        reward=[NAN, -1.0, NAN, NAN],
        visits=[1, 1, 0, 0],
        trees=2,
        row=[0, 0, 1, 1],
    )
    assert tree_picture(tree, condition=0).size[0] > 100
    with pytest.raises(ValueError, match="condition 1 has no finished leaf"):
        tree_picture(tree, condition=1)
    with pytest.raises(ValueError, match="trees 0 to 1"):
        tree_picture(tree, condition=2)
    with pytest.raises(ValueError, match="leaves=0"):
        tree_picture(tree, leaves=0)


def test_a_grid_puts_every_image_in_its_cell():
    shades = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 1, 8, 8)
    image = image_grid(shades, columns=3, size=20)
    assert image.size == (3 * 26 + 6, 2 * 26 + 6)
    for k in range(6):
        centre = (6 + (k % 3) * 26 + 10, 6 + (k // 3) * 26 + 10)
        assert image.getpixel(centre) == (round(k * 255 / 5),) * 3


def test_a_grid_takes_pil_colour_captions_and_any_letters():
    images = [Image.new("RGB", (70, 40), "red"), Image.new("L", (40, 70), 0)]
    image = image_grid(images, ["λ=1 <b>\n" * 40, "b"], title="чужой title", columns=2)
    assert (255, 0, 0) in colours(image)
    assert image.height > 70 + 20
    with pytest.raises(ValueError, match="1 captions for 2"):
        image_grid(images, ["one"])
    with pytest.raises(ValueError, match="empty"):
        image_grid([])


def test_a_curve_rises_with_the_best_and_ignores_failures():
    history = History(nfe=[10, 20, 30, 40], reward=[0.0, NAN, 1.0, 0.5])
    image = curve({"ours": history})
    blue = (0, 114, 178)
    rows = {
        x: min(y for y in range(40, image.height) if near(image.getpixel((x, y)), blue))
        for x in (300, 600)
    }
    assert rows[600] < rows[300] - 50  # the best rises from 0 to 1 at three quarters of the way
    with pytest.raises(ValueError, match="no finite reward"):
        curve(History(nfe=[1], reward=[NAN]))


def near(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) < 60


@pytest.mark.parametrize("rewards", [[1.0], [2.0, 2.0], [1e30, -1e30], [1e-12, 2e-12], [-0.0, 0.0]])
def test_a_curve_stands_any_scale(rewards):
    assert curve(History(nfe=[5 * (k + 1) for k in range(len(rewards))], reward=rewards)).size


def test_viridis_grows_lighter_all_the_way():
    light = [
        0.2126 * r + 0.7152 * g + 0.0722 * b
        for r, g, b in map(viridis, torch.linspace(0, 1, 99).tolist())
    ]
    assert all(b > a for a, b in pairwise(light))
    assert viridis(NAN) == (190, 190, 196)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-1.23456, "-1.23"),
        (0.0, "0"),
        (-0.0, "0"),
        (1e-9, "1e-09"),
        (12345.0, "1.23e+04"),
        (NAN, "failed"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_clips_are_written_as_animations_and_shown_by_their_middle_frames(tmp_path):
    from samplers import TreeSearch, sample
    from samplers.view.files import write_files
    from tests.brownian import brownian

    frames = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1)
    model = dataclasses.replace(
        brownian(),
        decode=lambda x: frames.expand(len(x), 5, 3, 8, 8) * x[:, 0].sigmoid().view(-1, 1, 1, 1, 1),
    )
    run = sample(model, lambda clips, _: clips.mean((1, 2, 3, 4)), TreeSearch(branch="even"),
                 nfe=300, draws=3, progress=False)  # fmt: skip
    assert len(run.clips) == run.distinct
    assert all(len(clip) == 5 for clip in run.clips)
    assert run.images[0].tobytes() == run.clips[0][2].tobytes()
    write_files(run, tmp_path, {})
    with Image.open(tmp_path / "images" / "0000.webp") as clip:
        assert clip.n_frames == 5
        clip.seek(4)
        assert clip.convert("RGB").tobytes() == run.clips[0][4].tobytes()
    assert (tmp_path / "tree.png").exists()
