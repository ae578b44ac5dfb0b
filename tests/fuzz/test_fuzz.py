"""What reads files of strangers, and the kernels, on the corpus; and, for as long as is given, on what it changes into.

pytest -m fuzz --minutes=10 --summary=fuzz.json
"""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from targets import CORPUS, TARGETS

FILES = {name: sorted(path for path in (CORPUS / name).iterdir()) for name in TARGETS}


@pytest.mark.parametrize("path", [path for paths in FILES.values() for path in paths],
                         ids=lambda path: f"{path.parent.name}/{path.name}")  # fmt: skip
def test_corpus(path, one_thread):
    TARGETS[path.parent.name](path.read_bytes())


def test_the_corpus_is_small_and_has_every_target():
    assert all(FILES.values())
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 2 * 2**20


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TARGETS)
def test_fuzz(name, tmp_path, request, record_property):
    if find_spec("atheris") is None:
        pytest.skip("there is no Atheris")
    minutes, seed = request.config.getoption("--minutes"), request.config.getoption("--seed")
    if not minutes:
        pytest.skip("give --minutes=N")
    seconds = max(round(minutes * 60 / len(TARGETS)), 1)
    (tmp_path / "new").mkdir()
    line = [sys.executable, Path(__file__).with_name("fuzz.py"), name, tmp_path / "new", CORPUS / name,
            f"-max_total_time={seconds}", f"-artifact_prefix={tmp_path}/", f"-seed={seed or 1}"]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=seconds + 300)
    told = done.stderr
    ran, covered = re.search(r"Done (\d+) runs", told), re.findall(r"cov: (\d+)", told)
    found = [path for path in tmp_path.iterdir() if path.is_file()]
    record_property("row", {
        "target": name, "seconds": seconds, "inputs": int(ran[1]) if ran else None,
        "lines and branches reached": int(covered[-1]) if covered else None,
        "findings": ", ".join(path.name[:20] for path in found), "seed": seed or 1,
    })  # fmt: skip
    trace = told[told.rfind("=== Uncaught Python exception") :][:3000]
    assert done.returncode == 0, f"{found}\n{trace or told[-3000:]}"
