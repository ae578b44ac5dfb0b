"""What a reader of the pages meets: on phones and large screens, light and dark, by keyboard and screen reader."""

import functools
import math

import numpy as np
import pytest

from avfusion import DeepAVFusion, EncoderConfig, save_encoder
from avfusion.cli import main
from avfusion.data import read
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.viz.page import UNREADABLE, Card, Thing, table_cards, write_page
from avfusion.viz.run_page import best_and_worst, clip_cards

SIZES = [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]
SECONDS = 2.0
SMALL = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 32), audio_size=(32, 64), fusion_tokens=2,
                      image_agg_tokens=2, audio_agg_tokens=2)  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of each command that writes pages, and of a data set of which nothing can be read."""
    root = tmp_path_factory.mktemp("pages")
    synthesize(root / "set", Settings("audioset", clips=3, size=96, seconds=SECONDS, seed=1))
    clips = sorted(map(str, (root / "set").rglob("*.mp4")))
    for line in (
        ["browse", "audioset", str(root / "set"), "--clips", "2", "--out", str(root / "browse.html")],
        ["report", clips[0], "--out", str(root)],
        ["embed", *clips, "--out", str(root / "features")],
        ["search", str(root / "features"), "--clip", clips[0], "--out", str(root / "search.html")],
    ):
        assert main(line) == 0
    save_encoder(DeepAVFusion(SMALL), root / "encoder.safetensors")
    synthesize(root / "boxes", Settings("flickr-soundnet", clips=8, classes=2, size=64, seconds=1.5, fps=4))
    line = f"localize train tiny --encoder {root}/encoder.safetensors --data {root}/boxes --synth-clips 0 --epochs 2"
    rest = f"--batch-size 4 --workers 0 --tracker none --eval-epochs 1 --log-steps 1 --out {root}/run"
    assert main(f"{line} {rest}".split()) == 0
    write_page(root / "nothing.html", [], title="nothing", empty=UNREADABLE)
    report = next(path for path in root.glob("*.html") if path.stem not in ("browse", "search", "nothing"))
    return {"browse": root / "browse.html", "report": report, "search": root / "search.html",
            "nothing": root / "nothing.html", "run": root / "run" / "run.html"}  # fmt: skip


@functools.cache
def axe():
    return pytest.importorskip("axe_playwright_python.sync_playwright").Axe()


@pytest.mark.parametrize("name", ["browse", "report", "search", "nothing", "run"])
@pytest.mark.parametrize(("width", "theme"), SIZES)
def test_every_page_fits_and_axe_finds_nothing(pages, visit, name, width, theme):
    page = visit(pages[name], width, theme, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe().run(page).response["violations"]
    assert not [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found]


def test_a_large_screen_shows_more_beside_each_other(pages, visit):
    page = visit(pages["search"], 3840, name="search")
    tops = page.locator("article").evaluate_all("all => all.map((one) => one.getBoundingClientRect().top)")
    assert len(tops) == 4
    assert len(set(tops)) == 1


def test_a_sound_plays_and_the_frames_follow(pages, visit):
    page = visit(pages["browse"])
    slider = page.locator("input[type=range]").first
    slider.evaluate("element => { element.value = 0; element.dispatchEvent(new Event('input')) }")
    page.locator("audio").first.evaluate("audio => audio.play()")
    page.until("document.querySelector('audio').currentTime > 0.4")
    assert int(slider.evaluate("element => element.value")) > 0
    page.locator("audio").nth(1).evaluate("audio => audio.play()")  # a second one stops the first
    page.until("document.querySelector('audio').paused")


def test_a_click_on_a_spectrogram_goes_there(pages, visit):
    page = visit(pages["browse"])
    strip = page.locator(".strip").first
    box = strip.bounding_box()
    strip.click(position={"x": 0.75 * box["width"], "y": 10})
    page.until(f"document.querySelector('audio').currentTime >= {0.7 * SECONDS}")


def test_the_keyboard_reaches_frames_and_switches(pages, visit):
    page = visit(pages["browse"])
    picture = "document.querySelector('canvas').toDataURL()"
    page.locator("input[type=range]").first.focus()
    before, label = page.evaluate(picture), page.locator("canvas").first.get_attribute("aria-label")
    page.keyboard.press("End")
    assert page.evaluate(picture) != before
    assert page.locator("canvas").first.get_attribute("aria-label") != label
    before = page.evaluate(picture)
    page.locator("#boxes").focus()
    page.keyboard.press("Space")
    assert page.evaluate(picture) != before


def test_a_policy_forbids_what_the_page_does_not_need(pages, chromium):
    page = chromium.new_page()
    refused = []
    page.on("console", lambda said: refused.append(said.text))
    page.goto(pages["browse"].as_uri())
    page.evaluate("""() => {
        const add = (tag, properties) => document.body.append(Object.assign(document.createElement(tag), properties));
        add('script', { textContent: 'window.broken = 1' });
        add('img', { src: 'https://example.org/a.png' });
        document.body.insertAdjacentHTML('beforeend', '<p style="color: red" onclick="window.broken = 1">text</p>');
    }""")
    page.locator("p", has_text="text").last.click()
    page.wait_for_timeout(200)
    assert page.evaluate("window.broken") is None
    assert sum("Content Security Policy" in text for text in refused) >= 3
    page.close()


def test_names_cannot_break_out_of_the_page(tmp_path, visit):
    evil = "</script><img src=x onerror='document.title=1'><!--"
    card = Card(evil, evil, np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1), np.zeros(0, np.float32), (Thing(evil),))
    write_page(tmp_path / "page.html", [card], title=evil, lead=evil, empty=evil)
    page = visit(tmp_path / "page.html")
    assert page.title() == evil
    assert page.locator("img").count() == 0
    assert page.locator(".name").inner_text() == evil
    write_page(tmp_path / "page.html", [], title=evil, empty=evil)
    assert visit(tmp_path / "page.html").locator("main .empty").last.inner_text() == evil


def test_no_clip_is_among_the_best_and_the_worst():
    def chosen(*scores):
        found = best_and_worst([{"score": score} for score in scores], 2)
        return {name: [sample["score"] for sample in samples] for name, samples in found.items()}

    assert chosen(1.0, 5.0, math.nan, 2.0, 4.0, 3.0) == {"best": [5, 4], "worst": [1, 2]}
    assert chosen(1.0, 2.0, 3.0) == {"best": [3, 2], "worst": [1]}
    assert chosen(1.0) == {"best": [1]}
    assert chosen(math.nan) == {}


def test_a_clip_that_is_gone_is_left_out():
    class Loader:
        def some(self, rows):
            raise ValueError("none of the clips can be read")

    assert list(clip_cards(Loader(), {"best": [{"row": 0, "clip": "a", "score": 1.0}]})) == []


def test_groups_of_cards_have_headings(tmp_path, visit):
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    cards = [Card(f"{group} {n}", "", pixels, np.zeros(1), np.zeros(0, np.float32), group=group)
             for group in ("best", "worst") for n in (1, 2)]  # fmt: skip
    write_page(tmp_path / "page.html", cards, title="run", empty="")
    page = visit(tmp_path / "page.html")
    assert page.locator("h2").all_inner_texts() == ["best", "worst"]
    assert page.locator("h2:text('worst') + .cards article").count() == 2


def test_every_clip_is_on_the_page(pages, visit):
    names = [card.title for card in table_cards(read("audioset", pages["browse"].parent / "set"), 2)]
    assert visit(pages["browse"]).locator(".name").all_inner_texts() == names
