"""The notebook of the site runs from top to bottom, as it is."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long


# A kernel is started, and twelve clips are made and embedded.
def test_first_steps():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs" / "first-steps.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=90, kernel_name="python3").execute(cwd=ROOT / "docs")
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "DenseFusion" in said
    assert "times as fast" in said
