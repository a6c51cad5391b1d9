"""The README's Python runs as it stands, from top to bottom in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # our own text
    result = names["result"]
    assert result.nfe <= 1_000
    assert len(result.images) == result.distinct <= 4
    assert (tmp_path / "run" / "journal.jsonl").exists()


def test_the_readmes_links_lead_somewhere():
    for targets in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README):
        target = "".join(targets)
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
