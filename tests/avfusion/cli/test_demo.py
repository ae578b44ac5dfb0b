"""`avfusion demo` does what it shows, on a machine that has nothing but the package."""

import re

import pytest

from avfusion.cli import main


# Four commands, three models and pages.
def test_demo(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    out = tmp_path / "my demo"  # folders may have spaces
    assert main(["demo", "--out", str(out), "--open"]) == 0
    told = capsys.readouterr().out
    assert re.findall(r"^\$ avfusion (\w+)", told, re.M) == ["synth", "embed", "search", "report"]
    (page,) = opened
    assert page.startswith("file://")
    assert page == (out / "mixed.html").as_uri()
    text = (out / "mixed.html").read_text()
    for title in ("where the sound comes from", "the sound of the picture", "like it: "):
        assert title in text
    assert str(out / "mixed.html") in told
    assert (out / "clips" / "preview.html").exists()
    assert (out / "search.html").read_text().count('class="card"') == 4
    assert len(list((out / "attention").glob("*.png"))) == 8


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path / "file" / "demo")])
    assert ended.value.code == 2
    assert "--out: cannot make the output directory" in capsys.readouterr().err
