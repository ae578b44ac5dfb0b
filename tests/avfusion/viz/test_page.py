"""The page with clips: what is embedded in it, and that it is shown."""

import base64
import io
import json
import re
import shutil
import wave

import numpy as np
import pytest
from made_clips import cut, noise, number, write_clip
from PIL import Image

from avfusion.cli import main
from avfusion.data import read
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.viz.page import COLOURS, Card, Thing, stacked, table_cards, write_page


def embedded(page):
    """The data of every card on a page."""
    found = re.findall(r'<script type="application/json" class="card">(.*?)</script>', page.read_text())
    return [json.loads(text) for text in found]


def decode(uri):
    kind, data = re.fullmatch(r"data:([a-z/]+);base64,(.+)", uri).groups()
    data = io.BytesIO(base64.b64decode(data))
    if kind == "audio/wav":
        with wave.open(data) as file:
            return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)
    return np.asarray(Image.open(data)).astype(int)


def tile(sheet, card, index):
    height, width = sheet.shape[0] // -(-len(card["times"]) // card["columns"]), sheet.shape[1] // card["columns"]
    row, column = divmod(index, card["columns"])
    return sheet[row * height :, column * width :][:height, :width]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    root = tmp_path_factory.mktemp("browse") / "set"
    synthesize(root, Settings("audioset", clips=4, size=96, seconds=2.0, seed=1))
    return root


def test_page_holds_the_clips_and_their_truth(synthetic, tmp_path):
    cards = list(table_cards(read("audioset", synthetic), 3))
    write_page(tmp_path / "page.html", cards, title="three", empty="")
    found = embedded(tmp_path / "page.html")
    assert len(found) == 3
    for data, card in zip(found, cards, strict=True):
        folder = synthetic / "truth" / data["title"][:11]
        truth = json.loads((folder / "truth.json").read_bytes())
        masks = np.load(folder / "masks.npz")["masks"]
        names = {item["label"]: item["class"] for item in truth["objects"]}
        assert data["caption"] == " · ".join([*(names[label] for label in truth["labels"]), truth["split"]])
        assert set(data["times"]) <= set(truth["times"])
        assert len(data["things"]) == len(truth["objects"])
        frames, overlay = decode(data["frames"]), decode(data["masks"])
        for t in (0, 7, 15):
            assert np.abs(tile(frames, data, t) - card.frames[t]).mean() < 6
            shown, at = tile(overlay, data, t), truth["times"].index(data["times"][t])
            np.testing.assert_array_equal(shown[..., 3] > 0, masks[at] > 0)
            for thing, item in zip(data["things"], truth["objects"], strict=True):
                if item["onscreen"]:
                    rgb = list(bytes.fromhex(thing["colour"][1:]))
                    assert (shown[masks[at] == item["mask"]][:, :3] == rgb).all()
                    assert np.array(thing["boxes"][t]) * 96 == pytest.approx(item["boxes"][at])
                else:
                    assert thing["boxes"] is None
        mixture, *sources = (decode(sound["audio"]) for sound in data["sounds"])
        assert len(sources) == sum(item["sounding"] for item in truth["objects"])
        length = min(len(mixture), len(sources[0]))
        assert np.corrcoef(mixture[:length], sum(sources)[:length])[0, 1] > 0.95
        for source, item in zip(sources, (item for item in truth["objects"] if item["sounding"]), strict=True):
            with wave.open(str(folder / "sources" / f"{item['source']}.wav")) as file:
                expected = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            assert np.abs(source - expected).max() <= 1
        assert decode(data["sounds"][1]["spectrogram"]).shape == (128, 128, 3)


def test_a_browser_shows_every_clip_and_needs_nothing_else(synthetic, tmp_path, visit):
    path = tmp_path / "page.html"
    write_page(path, table_cards(read("audioset", synthetic), 4), title="four", empty="")
    page = visit(path)
    assert page.locator("article").count() == page.locator("canvas").count() == 4
    assert page.locator("audio").count() == sum(len(card["sounds"]) for card in embedded(path))
    assert "://" not in path.read_text()


def test_masks_and_boxes_are_painted(tmp_path, visit):
    """A grey clip with one box: the screenshot has the box in its colour, and the mask mixed with grey inside."""
    masks = np.zeros((4, 64, 64), np.uint8)
    masks[:, 16:48, 16:48] = 1
    card = Card("one", "", np.full((4, 64, 64, 3), 128, np.uint8), np.arange(4) / 2, np.zeros(32000, np.float32),
                (Thing("square", [[0.25, 0.25, 0.75, 0.75]] * 4, 1),), masks)  # fmt: skip
    write_page(tmp_path / "page.html", [card], title="one", empty="")
    visit(tmp_path / "page.html").screenshot(path=tmp_path / "shot.png")
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    colour = np.array(list(bytes.fromhex(COLOURS[0][1:])))
    line = np.abs(shot - colour).max(-1) < 8
    inside = np.abs(shot - (0.75 * 128 + 0.25 * colour)).max(-1) < 8
    outside = np.abs(shot - 128).max(-1) < 3
    side = 272  # of the picture on the page
    assert line.sum() > 4 * side / 2  # dashed and thin, on four sides
    assert inside.sum() == pytest.approx((side / 2) ** 2, rel=0.15)
    assert outside.sum() == pytest.approx(0.75 * side**2, rel=0.05)


def test_any_folder_of_videos_has_a_page(tmp_path):
    """What is no clip is told, and the others are shown."""
    good = write_clip(tmp_path / "videos.mkv", seconds=4, sound=noise)
    (tmp_path / "set").mkdir()
    shutil.move(good, tmp_path / "set/a.mkv")
    cut(write_clip(tmp_path / "set/b.mp4", seconds=2), 0.4)
    with pytest.warns(UserWarning, match=r"not on the page: .*b\.mp4"):
        (card,) = table_cards(read("folder", tmp_path / "set"), 5)
    assert (card.title, card.caption) == ("a.mkv", "")
    assert 16 < len(card.frames) <= 32
    numbers = [number(Image.fromarray(frame)) for frame in card.frames]
    assert numbers == pytest.approx(card.times * 25, abs=0.03)
    assert len(card.waveform) == pytest.approx(64000, abs=2000)
    write_page(tmp_path / "page.html", [card], title="any", empty="")
    (data,) = embedded(tmp_path / "page.html")
    assert [sound["name"] for sound in data["sounds"]] == ["sound"]
    assert data["masks"] is None


@pytest.mark.parametrize("layout", ["avsbench", "flickr-soundnet"])
def test_stills_are_cards(layout, tmp_path):
    synthesize(tmp_path, Settings(layout, clips=2, size=64))
    for card in table_cards(read(layout, tmp_path), 2):
        assert len(card.frames) == len(card.times) == len(card.masks) == (5 if layout == "avsbench" else 1)
        assert len(card.waveform) == (80000 if layout == "avsbench" else 64000)
        assert all(len(thing.boxes) == len(card.frames) for thing in card.things if thing.mask)


def test_public_annotations_are_shown_where_there_is_no_truth(tmp_path):
    synthesize(tmp_path, Settings("vggss", clips=2, size=64, seconds=1.0))
    shutil.rmtree(tmp_path / "truth")
    listed = json.loads((tmp_path / "annotations/vggss.json").read_bytes())
    for card, entry in zip(table_cards(read("vggss", tmp_path), 2), listed, strict=True):
        assert card.caption == f"{entry['class']} · test"
        assert [list(thing.boxes[0]) for thing in card.things] == entry["bbox"]
        assert card.masks is None


def test_browse_writes_a_page(synthetic, tmp_path, capsys):
    page = tmp_path / "look.html"
    assert main(["browse", "audioset", str(synthetic), "--clips", "2", "--out", str(page)]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert len(embedded(page)) == 2


def test_browse_tells_what_is_missing(tmp_path, capsys):
    out = ["--out", str(tmp_path / "page.html")]
    for options in (["vggsound", str(tmp_path)], ["folder", str(tmp_path / "no")]):
        assert main(["browse", *options, *out]) == 1
        assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["browse", "nowhere", str(tmp_path), *out])
    assert not (tmp_path / "page.html").exists()


def test_synth_preview(tmp_path, capsys):
    options = ["--clips=2", "--size=64", "--seconds=1", "--workers=1", "--preview"]
    assert main(["synth", str(tmp_path / "out"), *options]) == 0
    assert "preview.html: a look at it" in capsys.readouterr().out
    assert len(embedded(tmp_path / "out/preview.html")) == 2


def test_cards_are_spread_over_the_whole_table(tmp_path):
    write_clip(tmp_path / "00.mp4", seconds=0.5)
    for i in range(1, 23):
        shutil.copy(tmp_path / "00.mp4", tmp_path / f"{i:02d}.mp4")
    titles = [card.title for card in table_cards(read("folder", tmp_path), 12)]
    assert titles == [f"{i * 23 // 12:02d}.mp4" for i in range(12)]


def test_pictures_that_change_their_size_cost_no_page():
    images = [np.zeros((4, 6, 3), "u1"), np.full((6, 4, 3), 255, "u1")]
    assert stacked(images).shape == (2, 4, 6, 3)
    assert stacked(images)[1].min() == 255


def test_switches_that_do_nothing_are_not_shown(tmp_path, visit):
    """Masks and boxes, and a hint to play, only where there are some."""
    plain = Card("plain", "", np.zeros((2, 8, 8, 3), np.uint8), np.arange(2) / 2, np.zeros(0, np.float32))
    thing = Thing("square", [[0.25, 0.25, 0.75, 0.75]] * 2, 1)
    full = Card(
        "full", "", plain.frames, plain.times, np.zeros(16000, np.float32), (thing,), np.ones((2, 8, 8), np.uint8)
    )
    for card, hidden in ((plain, 3), (full, 0)):
        write_page(tmp_path / "page.html", [card], title="any", empty="")
        assert visit(tmp_path / "page.html").locator(".tools > [hidden]").count() == hidden
