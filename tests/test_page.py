"""The tree page: what is in it, and that nothing in it can come alive."""

import base64
import io
import json
import re

import pytest
import torch
from PIL import Image

from samplers import BestOfN, TreeSearch, sample
from samplers.view import page, strip, tree_page
from steering import from_pipeline, zoo
from steering.rewards import Jpeg
from tests.pages import HOSTILE, grown_tree, noise

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def data_of(html: str) -> dict:
    (text,) = DATA.findall(html)
    return json.loads(text)


def test_hostile_texts_are_data_and_nothing_else():
    assert len(HOSTILE) >= 30
    tree = grown_tree([8] * len(HOSTILE))
    quiet = tree_page(tree, prompts=["a"] * len(HOSTILE), title="b")
    for title in HOSTILE:
        html = tree_page(tree, prompts=HOSTILE, title=title)
        # the markup is that of a page with harmless texts: all else is inside the one data block
        assert DATA.sub("", html) == DATA.sub("", quiet)
        (text,) = DATA.findall(html)
        assert text.isascii()  # so it holds no U+2028 either
        assert not set("<>&\n") & set(text)
        data = json.loads(text)
        assert data["title"] == title
        assert [one["prompt"] for one in data["trees"]] == HOSTILE


def test_the_page_cannot_load_or_send_anything():
    html = tree_page(grown_tree([50]), noise)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "script-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # the policy stands before anything that it is to hold back
    assert html.index("Content-Security-Policy") < min(map(html.index, ("<script", "<style")))
    assert not re.search(r"https?:|//[a-z]+\.|\burl\(|@import", html)
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert word not in html


def test_the_columns_are_the_trees():
    tree = grown_tree([30, 12], failed=2)
    html = tree_page(tree, prompts=[None, 7])
    one, two = data_of(html)["trees"]
    assert (one["prompt"], two["prompt"]) == ("", "7")
    first = int((tree.row == 0).sum())
    for raw, rows in ((one, slice(0, first)), (two, slice(first, None))):
        for name in ("step", "handle", "visits"):
            assert raw[name] == getattr(tree, name)[rows].tolist()
        for name in ("value", "reward", "log_w", "log_ratio"):
            given = [torch.nan if x is None else x for x in raw[name]]
            column = getattr(tree, name)[rows]
            column = column.where(column.isfinite(), torch.nan)
            torch.testing.assert_close(
                torch.tensor(given, dtype=torch.float64), column, rtol=1e-5, atol=0, equal_nan=True
            )
        assert raw["failed"] == tree.failed[rows].nonzero()[:, 0].tolist()
        assert len(raw["failed"]) == 2
    assert one["parent"] == tree.parent[:first].tolist()
    assert two["parent"] == [-1, *(tree.parent[first + 1 :] - first).tolist()]


def test_trees_whose_nodes_alternate_are_told_apart():
    tree = grown_tree([9, 9])
    m = len(tree.parent)
    order = torch.arange(m).reshape(2, -1).T.flatten()  # 0, m/2, 1, m/2 + 1, ...
    where = torch.empty(m + 1, dtype=torch.int64)
    where[order], where[-1] = torch.arange(m), -1
    columns = ("step", "handle", "row", "value", "visits", "reward", "failed", "log_ratio", "log_w")
    mixed = type(tree)(
        parent=where[tree.parent[order]],
        **{name: getattr(tree, name)[order] for name in columns},
        ended=tree.ended,
        lam=tree.lam,
    )
    assert data_of(tree_page(mixed)) == data_of(tree_page(tree))


def test_conditions_without_prompts_are_numbered_and_a_wrong_number_is_refused():
    tree = grown_tree([5, 5])
    assert [t["prompt"] for t in data_of(tree_page(tree))["trees"]] == [
        "condition 0",
        "condition 1",
    ]
    assert data_of(tree_page(grown_tree([5])))["trees"][0]["prompt"] == ""
    with pytest.raises(ValueError, match="3 prompts for 2 trees"):
        tree_page(tree, prompts=["a", "b", "c"])


def test_thumbnails_are_of_the_most_important_nodes_small_and_each_kept_once():
    tree = grown_tree([3000])
    asked = []

    def two_colours(handles):
        asked.extend(handles.tolist())
        return (handles % 2)[:, None, None, None].expand(-1, 3, 200, 300).float()

    data = data_of(tree_page(tree, two_colours))
    pictures = dict(data["trees"][0]["pictures"])
    assert len(asked) == len(pictures) == page._MOST
    assert len(data["images"]) == 2
    images = [
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in data["images"]
    ]
    assert all(image.size == (96, 64) for image in images)
    for n, k in pictures.items():
        assert images[k].getpixel((50, 30)) == ((n + 100) % 2 * 255,) * 3
    # the way to the best leaf comes first, and the most visited are there
    best = int(tree.reward.nan_to_num(nan=-torch.inf).argmax())
    way, n = [], best
    while tree.parent[n] >= 0:
        way.append(n)
        n = int(tree.parent[n])
    assert [n for n, _ in data["trees"][0]["pictures"]][: len(way)] == way
    top = tree.visits.argsort(descending=True)[1:20].tolist()
    assert set(top) <= set(pictures)


def test_texts_are_kept_once_cut_and_inert():
    tree = grown_tree([40])
    html = tree_page(tree, lambda handles: [HOSTILE[int(h) % len(HOSTILE)] for h in handles])
    quiet = tree_page(tree, lambda handles: ["a"] * len(handles))
    assert DATA.sub("", html) == DATA.sub("", quiet)
    data = data_of(html)
    assert data["images"] == data["trees"][0]["pictures"] == []
    assert len(data["texts"]) == len(set(data["texts"]))
    for node, text in data["trees"][0]["readings"]:
        expected = HOSTILE[data["trees"][0]["handle"][node] % len(HOSTILE)]
        assert data["texts"][text] == expected[:500]
    assert data_of(quiet)["texts"] == ["a"]


def test_thumbnails_stay_below_their_limit():
    def large(handles):
        return torch.rand(len(handles), 3, 96, 96)

    tree = grown_tree([2000] * 3)
    data = data_of(tree_page(tree, large))
    total = sum(map(len, data["images"]))
    assert 0.98 * page._BYTES < total <= page._BYTES
    shown = [len(t["pictures"]) for t in data["trees"]]
    assert max(shown) - min(shown) <= 1  # the limit bites all trees alike
    size = len(tree_page(tree))
    assert size < 120 * len(tree.parent) + 60_000


def test_a_node_whose_state_was_let_go_has_no_thumbnail():
    calls = []

    def red_but_step_20(handles):
        calls.append(len(handles))
        if (tree.step[handles - 100] == 20).any():
            raise KeyError("let go")
        return torch.ones(len(handles), 1, 4, 4)

    tree = grown_tree([400])
    raw = data_of(tree_page(tree, red_but_step_20))["trees"][0]
    shown = {tree.step[n].item() for n, _ in raw["pictures"]}
    assert shown == {0, 40, 50}
    assert len(calls) < 256  # found by halving, not one by one


def test_a_strip_has_the_states_on_the_way_to_a_draw():
    model = from_pipeline(zoo.load("mnist"), steps=4)
    sampler = TreeSearch(branch=(1, 2))
    result = sample(model, Jpeg(), sampler, nfe=64, progress=False)
    for index in (0, result.distinct - 1):
        image = strip(result, index)
        assert image.width == 3 * 78 + 6  # steps 1, 2 and 4, each in a cell of 72
        last = image.crop((2 * 78 + 6, 6, 3 * 78, 78)).convert("L")
        item = result.images[index].resize((72, 72), Image.Resampling.NEAREST)
        assert last.tobytes() == item.tobytes()
    with pytest.raises(ValueError, match=f"items 0 to {result.distinct - 1}"):
        strip(result, result.distinct)
    flat = sample(model, Jpeg(), BestOfN(), nfe=8, progress=False)
    with pytest.raises(ValueError, match="has no tree"):
        strip(flat, 0)
