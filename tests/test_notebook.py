"""In a notebook's kernel: the curve is drawn while a run goes on, and the stop button keeps it."""

import base64
import io
import time

import pytest
from PIL import Image

client = pytest.importorskip("jupyter_client")

CELL = """
import time
from samplers import BestOfN, sample
from tests.brownian import brownian, first

seen = []

def slow(items, prompts):
    time.sleep(0.002 * len(prompts))
    seen.extend(first(items, prompts).tolist())
    return first(items, prompts)

result = sample(brownian(), slow, BestOfN(), nfe=10**9, batch=16)
"""
CHECK = """
assert result.status == "interrupted", result.status
assert len(result.history.reward) == int(result.found.sum()) > 100
assert float(result.rewards[result.best]) == max(result.history.reward) == max(seen)
"""


def finish(kernel, message: str, seconds: float = 60) -> dict:
    """The reply to a cell, when the kernel has come to its end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reply = kernel.get_shell_msg(timeout=seconds)
        if reply["parent_header"].get("msg_id") == message:
            return reply["content"]
    raise TimeoutError(message)


@pytest.mark.slow
def test_the_curve_is_drawn_as_it_runs_and_the_stop_button_keeps_the_best():
    manager, kernel = client.manager.start_new_kernel(kernel_name="python3")
    try:
        running = kernel.execute(CELL)
        pictures, end = [], time.monotonic() + 90
        while len(pictures) < 3 and time.monotonic() < end:  # drawn once, and anew twice
            message = kernel.get_iopub_msg(timeout=90)
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] in ("display_data", "update_display_data"):
                pictures.append((message["msg_type"], message["content"]))
        manager.interrupt_kernel()
        assert finish(kernel, running)["status"] == "ok"
        checked = finish(kernel, kernel.execute(CHECK))
        assert checked["status"] == "ok", checked
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds = [kind for kind, _ in pictures]
    assert kinds == ["display_data", "update_display_data", "update_display_data"]
    places = {content["transient"]["display_id"] for _, content in pictures}
    assert len(places) == 1  # one picture, not a row of them
    for _, content in pictures:
        png = base64.b64decode(content["data"]["image/png"])
        assert Image.open(io.BytesIO(png)).size == (640, 360)
