"""The figures in the README and on the page about performance are those of a committed results file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_tables_stand_in_a_results_file_with_the_command_that_made_them(page):
    text = (ROOT / page).read_text()
    section = re.search(r"<!-- results: (\S+) -->\n(.*?)<!-- /results -->", text, re.DOTALL)
    path = ROOT / section[1]
    results = path.read_text()
    rows = [line for line in section[2].splitlines() if line.startswith("|")]
    assert len(rows) > 6
    assert [row for row in rows if row not in results.splitlines()] == []
    assert "pytest bench/ --benchmark" in section[2]
    assert "Made by `pytest bench/ --benchmark`" in results
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
