"""The site builds without a broken link, and asks for nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # An address that no one answers in the place of every proxy: what is fetched fails.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


# The whole site: it takes what it takes.
def test_it_builds_and_asks_for_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?://[^"]*)"', text)
        assert not [address for address in fetched if "canonical" not in address], page


def test_every_results_file_has_its_place(site):
    listed = (site / "performance" / "index.html").read_text(encoding="utf-8")
    for path in (ROOT / "bench" / "results").iterdir():
        if path.suffix != ".png":
            assert path.name in listed


def test_every_public_name_is_in_the_reference(site):
    import avfkernels
    import avfusion

    text = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("index.html"))
    for name in (*avfkernels.__all__, *avfusion.__all__):
        assert re.search(rf'id="[\w.]*\b{name}"', text), name


def test_drawings_are_of_the_code(site):
    text = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    assert "196 image tokens" in text
    assert text.count("<svg viewBox") >= 2
