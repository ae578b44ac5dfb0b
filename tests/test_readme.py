"""The figures in the README are those of a committed results file."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_of_the_readme_stand_in_a_results_file_with_the_command_that_made_them():
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"<!-- results: (\S+) -->\n(.*?)<!-- /results -->", readme, re.DOTALL)
    path = ROOT / section[1]
    results = path.read_text()
    rows = [line for line in section[2].splitlines() if line.startswith("|")]
    assert len(rows) > 6
    assert [row for row in rows if row not in results.splitlines()] == []
    assert "pytest bench/ --benchmark" in section[2]
    assert "Made by `pytest bench/ --benchmark`" in results
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (ROOT / picture).exists()
