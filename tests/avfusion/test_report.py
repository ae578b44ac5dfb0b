"""Reports: what is on the page, that a real browser shows it, and what is refused."""

import re

import numpy as np
import pytest
import torch

from avfusion import DeepAVFusion, EncoderConfig, load_encoder, save_encoder
from avfusion.cli import main
from avfusion.features import Features, fingerprint
from avfusion.report import Reporter
from avfusion.synth.command import synthesize
from avfusion.synth.scene import Settings

from .test_browse import browse, decode, embedded

ENCODER = EncoderConfig(
    dim=32, depth=1, num_heads=2, image_size=(32, 32), audio_size=(32, 64), fusion_tokens=2, image_agg_tokens=2,
    audio_agg_tokens=2,
)  # fmt: skip
TASKS = {"finetune": "vggsound", "localize": "flickr-soundnet", "segment": "avsbench", "separate": "vggsound-music"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder, a collection of clips, and a run of each task."""
    root, threads = tmp_path_factory.mktemp("report"), torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    save_encoder(DeepAVFusion(ENCODER), root / "encoder.safetensors")
    for layout in TASKS.values():
        synthesize(root / layout, Settings(layout=layout, clips=8, classes=2, size=64, seconds=1.5, fps=4))
    for name, layout in TASKS.items():
        line = (
            f"{name} train tiny --encoder {root}/encoder.safetensors --data {root}/{layout} --synth-clips 0 --epochs 1"
        )
        rest = f"--batch-size 4 --workers 0 --tracker none --eval-clips 0 --out {root}/run-{name}"
        assert main(f"{line} {rest}".split()) == 0
    clips = f"{root}/vggsound/clips"
    assert main(f"embed {clips} --checkpoint {root}/encoder.safetensors --out {root}/all.safetensors".split()) == 0
    torch.set_num_threads(threads)
    return root


def test_a_page_shows_everything_and_a_browser_agrees(made, tmp_path):
    clip = next((made / "vggsound" / "clips").rglob("*.mp4"))
    runs = " ".join(f"--{name} {made}/run-{name}" for name in TASKS)
    line = f"report {clip} {runs} --encoder {made}/encoder.safetensors --collection {made}/all.safetensors"
    assert main([*line.split(), "--out", str(tmp_path)]) == 0
    page = tmp_path / f"{clip.stem}.html"
    cards = embedded(page)
    titles = [card["title"] for card in cards]
    assert titles[:4] == [clip.name, "where the sound comes from", "what sounds", "the sound of the picture"]
    assert len(titles) == 7
    assert all(title.startswith("like it: ") and clip.name not in title for title in titles[4:])
    assert "finetune: " in cards[0]["caption"]
    assert cards[0]["caption"].count("%") == 2
    alike = [float(re.search(r"similarity (\S+)", card["caption"])[1]) for card in cards[4:]]
    assert alike == sorted(alike, reverse=True)
    assert not np.array_equal(decode(cards[1]["frames"]), decode(cards[2]["frames"]))
    assert [sound["name"] for sound in cards[3]["sounds"]] == ["sound", "of the picture", "the rest"]
    whole, part, rest = (decode(sound["audio"]) for sound in cards[3]["sounds"])
    assert np.abs(whole - part - rest).max() <= 2
    assert "://" not in page.read_text()

    dom = browse(page, tmp_path, "--dump-dom")
    assert 'data-ready="7"' in dom
    assert "data-error" not in dom


def test_a_bad_clip_costs_no_other_page(made, tmp_path, capsys):
    clip = next((made / "vggsound" / "clips").rglob("*.mp4"))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    again = tmp_path / clip.name
    again.write_bytes(clip.read_bytes())
    line = ["report", str(tmp_path / "bad.mp4"), str(clip), str(again), "--out", str(tmp_path / "pages")]
    assert main([*line, "--localize", str(made / "run-localize")]) == 1
    assert "bad.mp4" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "pages").glob("*.html")}
    assert names == {f"{clip.stem}.html", f"{clip.stem}-2.html"}


def test_what_does_not_fit_is_named(made, tmp_path):
    with pytest.raises(ValueError, match="a run of localize, expected one of segment"):
        Reporter.load({"segment": made / "run-localize"})
    with pytest.raises(ValueError, match="neighbours need both"):
        Reporter.load({}, str(made / "encoder.safetensors"))
    old = Features.load(made / "all.safetensors")
    assert old.weights == fingerprint(load_encoder(made / "encoder.safetensors").bfloat16())
    old.weights = None  # as of a file that does not tell
    old.save(tmp_path / "old.safetensors")
    assert Reporter.load({}, str(made / "encoder.safetensors"), tmp_path / "old.safetensors").collection is not None
    for config in (EncoderConfig(dim=64, depth=1, num_heads=2), ENCODER):  # of another width, or trained otherwise
        save_encoder(DeepAVFusion(config), tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"all\.safetensors: features of another encoder than .*other"):
            Reporter.load({}, str(tmp_path / "other.safetensors"), made / "all.safetensors")
