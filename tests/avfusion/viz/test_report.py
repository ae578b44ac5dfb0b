"""Reports: what is on the page, that a real browser shows it, and what is refused."""

import re

import numpy as np
import pytest
import torch

from avfusion import DeepAVFusion, EncoderConfig, load_encoder, save_encoder
from avfusion.cli import main
from avfusion.embedding.embed import Embedder
from avfusion.embedding.features import Features, fingerprint
from avfusion.embedding.search import Collection, ask_clip
from avfusion.media.reader import read_whole
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.viz import report as viz_report
from avfusion.viz.report import Reporter, text

from .test_page import decode, embedded

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


def test_a_page_shows_everything_and_a_browser_agrees(made, tmp_path, visit):
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

    assert visit(page).locator("article").count() == 7


def test_a_bad_clip_costs_no_other_page(made, tmp_path, capsys):
    clip = next((made / "vggsound" / "clips").rglob("*.mp4"))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    again = tmp_path / clip.name
    again.write_bytes(clip.read_bytes())
    line = ["report", str(tmp_path / "bad.mp4"), str(clip), str(again), "--out", str(tmp_path / "pages")]
    assert main([*line, "--localize", str(made / "run-localize")]) == 3
    assert "bad.mp4" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "pages").glob("*.html")}
    assert names == {f"{clip.stem}.html", f"{clip.stem}-2.html"}


def test_what_does_not_fit_is_named(made, tmp_path, capsys):
    clip = str(next((made / "vggsound" / "clips").rglob("*.mp4")))

    def report(*options):
        return main(["report", clip, "--out", str(tmp_path / "pages"), *map(str, options)])

    assert report("--segment", made / "run-localize") == 1
    assert "a run of localize, expected one of segment" in capsys.readouterr().err
    for options in (["--encoder", made / "encoder.safetensors"], ["--neighbours", 2]):
        with pytest.raises(SystemExit) as ended:
            report(*options)
        assert ended.value.code == 2
        assert "--collection" in capsys.readouterr().err
    encoder, old = load_encoder(made / "encoder.safetensors"), Features.load(made / "all.safetensors")
    assert old.weights == fingerprint(load_encoder(made / "encoder.safetensors").bfloat16())
    old.weights = None  # as of a file that does not tell
    old.save(tmp_path / "old.safetensors")
    embedder = Embedder(encoder)
    assert len(Collection(tmp_path / "old.safetensors", embedder).nearest(ask_clip(embedder, clip)[0])) == 8
    for config in (EncoderConfig(dim=64, depth=1, num_heads=2), ENCODER):  # of another width, or trained otherwise
        save_encoder(DeepAVFusion(config), tmp_path / "other.safetensors")
        assert report("--encoder", tmp_path / "other.safetensors", "--collection", made / "all.safetensors") == 1
        assert re.search(r"all\.safetensors: features of another encoder than .*other", capsys.readouterr().err)


def test_a_report_plays_the_middle_of_a_long_clip(made, tmp_path, monkeypatch):
    clip = next((made / "vggsound" / "clips").rglob("*.mp4"))
    monkeypatch.setattr(viz_report, "LONGEST", 1.0)
    (card,) = Reporter().cards(clip)
    assert len(card.waveform) == 16000
    _, sound = read_whole(clip, frame_rate=4)
    assert len(card.frames) == 8
    np.testing.assert_allclose(card.waveform, sound[0, 4000:20000], atol=1e-6)  # of 1.5 s, but for resampling


def test_commas_in_names_of_classes_do_not_split_them():
    assert text({"Speech, child": 0.4, "Music": 0.25}) == "Speech, child 40 %; Music 25 %"
