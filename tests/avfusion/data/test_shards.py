"""Shards: what is packed, that it reads back as the clips did, and what happens where something is damaged."""

import functools
import http.server
import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset
from made_clips import cut, noise, number, picture, write_clip
from PIL import Image

from avfusion import ClipError, cli, data, read_clip
from avfusion.data import packing
from avfusion.data import shards as shards_module
from avfusion.files import sha256
from avfusion.media.transforms import image_transform

RATE = 16000
SMALL = {"clips_per_shard": 5, "frame_rate": 5}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A table of twelve clips of 2 s, each with its own pictures and loudness; the last has no sound and fails."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(12):
        write_clip(
            root / f"{i:02d}.mp4", seconds=2, fps=10, rate=RATE, layout="mono", audio=None if i == 11 else "aac",
            sound=lambda *args, i=i: noise(*args) * (i + 1) / 12, picture=lambda k, i=i: picture(i * 20 + k),
        )  # fmt: skip
    return data.read("folder", root)


@pytest.fixture(scope="session")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    errors = data.pack(folder, out, **SMALL, max_failed=0.1)
    assert [error.path for error in errors] == [folder.name(11)]
    return out


@pytest.fixture
def copy(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what is packed ---------------------------------------------------------------------------------------------------


def test_any_webdataset_reader_reads_the_tars(folder, packed):
    assert names(packed) == sorted([f"0000{i}.{kind}" for i in range(3) for kind in ("json", "tar")]
                                   + [".lock", "failed.jsonl", "index.json"])  # fmt: skip
    tars = [str(path) for path in sorted(packed.glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(samples) == 11
    assert [s["__key__"] for s in samples] != sorted(s["__key__"] for s in samples)  # shuffled
    for sample in samples:
        facts = json.loads(sample["json"])
        assert folder.rows[int(sample["__key__"])].id == facts["id"]
        assert sample["flac"][:4] == b"fLaC"
        assert [name for name in sample if name.endswith(".jpg")] == [f"{i:05d}.jpg" for i in range(10)]
        assert facts["times"] == pytest.approx([0.1 + 0.2 * i for i in range(10)], abs=0.06)


def test_packed_clips_read_as_the_files_do(folder, packed):
    shards = data.Shards(packed)
    assert shards.verify() == []
    by_id = {row.id: i for i, row in enumerate(folder.rows)}
    for index, row in enumerate(shards.rows):
        original = folder.rows[by_id[row.id]]
        ours, theirs = shards.read(index, duration=1.0), read_clip(original.path, duration=1.0)
        assert ours.start == pytest.approx(theirs.start, abs=0.02)
        expected = read_clip(original.path, start=ours.start, duration=1.0)
        torch.testing.assert_close(ours.waveform, expected.waveform, rtol=0, atol=1e-4)
        assert number(ours.frame) == by_id[row.id] * 20 + round(ours.frame_time * 10)
        assert abs(ours.frame_time - (ours.start + 0.5)) <= 0.11
        assert shards.read(index, start=1.5, duration=1.0).waveform.shape == (1, RATE)  # reflected


def test_random_windows_and_frames_of_packed_clips(packed):
    shards = data.Shards(packed)
    index = next(i for i, row in enumerate(shards.rows) if row.id == "03.mp4")
    whole = shards.read(index, start=0.0, duration=2.0).waveform
    clips = [shards.read(index, start="random", frame="random", duration=0.5) for _ in range(40)]
    for clip in clips:
        at = round(clip.start * RATE)
        torch.testing.assert_close(clip.waveform, whole[:, at : at + RATE // 2], rtol=0, atol=1e-4)
        assert clip.start - 0.1 <= clip.frame_time <= clip.start + 0.6
    assert len({number(clip.frame) for clip in clips}) > 6


def test_labels_survive_and_large_frames_shrink(tmp_path):
    write_clip(tmp_path / "x.mp4", seconds=1, fps=10, rate=RATE)
    row = data.Row("x", tmp_path / "x.mp4", 7, 1, (), "train", extra={"boxes": ((0, 0, 1, 1),)})
    many = data.Row("y", tmp_path / "x.mp4", None, None, (0, 2))
    table = data.Table("test", tmp_path, (row, many), ("a", "b", "c"))
    data.pack(table, tmp_path / "out", size=24, sound="wav")
    shards = data.Shards(tmp_path / "out")
    by_id = {row.id: row for row in shards.rows}
    assert shards.classes == ("a", "b", "c")
    assert (by_id["x"].start, by_id["x"].label, by_id["x"].split) == (7, 1, "train")
    assert by_id["x"].extra == {"boxes": [[0, 0, 1, 1]]}
    assert (by_id["y"].label, by_id["y"].labels) == (None, (0, 2))
    assert shards.read(0).frame.size == (32, 24)
    (sample,) = (
        s
        for s in webdataset.WebDataset(str(tmp_path / "out/00000.tar"), shardshuffle=False)
        if s["__key__"] == "00000000"
    )
    assert json.loads(sample["json"])["names"] == ["b"]
    assert sample["wav"][:4] == b"RIFF"


def test_sound_and_pictures_that_are_files_of_their_own(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "audio").mkdir()
    Image.fromarray(picture(77)).save(tmp_path / "frames/1.jpg", quality=95)
    soundfile.write(tmp_path / "audio/1.wav", noise(44100, 4), 44100, subtype="FLOAT")
    table = data.read("flickr-soundnet", tmp_path)
    data.pack(table, tmp_path / "out")
    ours, theirs = data.Shards(tmp_path / "out").read(0), table.read(0)
    assert number(ours.frame) == 77
    torch.testing.assert_close(ours.waveform, theirs.waveform, rtol=0, atol=1e-3)


def test_interrupted_packing_goes_on_with_the_next_shard(folder, packed, tmp_path, monkeypatch):
    write, written = packing._write, []

    def killed(tar, *args):
        if len(written) == 2:
            (tar.parent / f".{tar.name}.part").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(tar)
        return write(tar, *args)

    monkeypatch.setattr(packing, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        data.pack(folder, tmp_path, **SMALL, max_failed=0.1)
    with pytest.raises(data.LayoutError, match=r"index\.json: no such file"):
        data.Shards(tmp_path)
    before = {tar: tar.stat().st_mtime_ns for tar in written}

    monkeypatch.setattr(packing, "_write", write)
    data.pack(folder, tmp_path, **SMALL, max_failed=0.1, num_workers=2)
    assert {tar: tar.stat().st_mtime_ns for tar in written} == before
    assert names(tmp_path) == names(packed)
    for name in names(packed):
        assert (tmp_path / name).read_bytes() == (packed / name).read_bytes(), name


def test_other_settings_or_clips_are_refused(folder, copy):
    with pytest.raises(ValueError, match=r"00000\.json: a shard made with another frame_rate: choose another folder"):
        data.pack(folder, copy, clips_per_shard=5, frame_rate=2)
    with pytest.raises(ValueError, match="made with another source"):
        data.pack(folder.where(lambda row: row.id != "00.mp4"), copy, **SMALL)


def test_too_many_failures_end_the_packing(folder, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"1 of \d+ clips have failed, more than max_failed=5%; the last is .*11.mp4"
    ):
        data.pack(folder, tmp_path, **SMALL)
    assert json.loads((tmp_path / "failed.jsonl").read_text())["path"] == folder.name(11)


@pytest.mark.parametrize(
    "options", [{"sound": "mp3"}, {"size": 0}, {"frame_rate": 0}, {"clips_per_shard": 0}, {"quality": 0}]
)
def test_bad_arguments(folder, tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        data.pack(folder, tmp_path, **options)


def test_pairs_are_not_packed(folder, tmp_path):
    pair = data.Row("a+b", folder.rows[0].path, extra={"path_2": folder.rows[1].path})
    with pytest.raises(ValueError, match="pairs of clips"):
        data.pack(data.Table("vggsound-music", folder.root, (pair,)), tmp_path)


# --- reading ----------------------------------------------------------------------------------------------------------


def loader(shards, **options):
    options = {"batch_size": 2, "train": True, "duration": 0.5} | options
    own = {"duration": options.pop("duration")} if "duration" in options else {}
    transform = image_transform((8, 8), train=options["train"])
    return data.ClipLoader(data.clips(shards, train=options["train"], transform=transform, **own), **options)


def test_epochs_over_ranks_and_resuming(packed):
    shards = data.Shards(packed)
    for _ in range(2):
        ranks = [loader(shards, rank=rank, world_size=2, num_workers=rank) for rank in range(2)]
        seen = Counter(i for rank in ranks for batch in rank for i in batch.index.tolist())
        assert (len(seen), set(seen.values())) == (8, {1})  # two global batches of the eleven clips
    whole = loader(shards)
    expected = [batch.waveform for _ in range(2) for batch in whole]
    first = loader(shards)
    for _, _ in zip(range(3), first, strict=False):
        pass
    second = loader(data.Shards(packed), num_workers=2)
    second.load_state_dict(first.state_dict())
    resumed = [batch.waveform for _ in range(2) for batch in second]
    assert all(map(torch.equal, resumed, expected[first.consumed // 2 :]))
    assert len(resumed) == 10 - first.consumed // 2


def test_damaged_shards_cost_only_the_clips_that_are_hit(copy, tmp_path):
    shards = data.Shards(copy)
    at = int(shards.files[shards.first[3] + 10][0])  # the sound of the fourth clip
    content = bytearray((copy / "00000.tar").read_bytes())
    content[at + 1000] ^= 1
    (copy / "00000.tar").write_bytes(content)
    cut(copy / "00002.tar", 0.0)
    assert shards.verify() == ["00000.tar", "00002.tar"]
    with pytest.raises(ClipError, match="audio stream: the shard is damaged here") as caught:
        shards.read(3)
    assert caught.value.path == f"{copy}/00000.tar: {shards.rows[3].id}"
    report = tmp_path / "failed.jsonl"
    for batch in loader(shards, batch_size=11, max_failed=1, report=report):
        assert len(batch.index) == 11
    gone = [3, *range(sum(shards.sizes[:2]), 11)]
    assert sorted(json.loads(line)["path"] for line in report.read_text().splitlines()) == sorted(
        map(shards.name, gone)
    )
    (copy / "00001.tar").unlink()
    with pytest.raises(ClipError, match="cannot be read"):
        shards.read(6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index.json", lambda text: text[:-9], "index.json: "),
        ("index.json", lambda text: text.replace("shards-1", "shards-9"), "its format is 'avfusion-shards-9'"),
        (
            "index.json",
            lambda text: text.replace('"00001"', '"../../1"'),
            r"the shard's name '../../1' is not a number",
        ),
        ("00001.json", lambda text: "", r"00001\.json is not the one that index\.json names"),
    ],
)
def test_damaged_index_is_refused(copy, name, change, message):
    (copy / name).write_text(change((copy / name).read_text()))
    with pytest.raises(data.LayoutError, match=message):
        data.Shards(copy)


def test_bug_a_missing_or_short_shard_was_found_in_the_middle_of_training(copy):
    """They are found when the set is opened, all of them."""
    (copy / "00000.tar").unlink()
    size = (copy / "00001.tar").stat().st_size
    cut(copy / "00001.tar", 0.5)
    (copy / "00002.json").unlink()
    half = (copy / "00001.tar").stat().st_size
    with pytest.raises(data.LayoutError) as told:
        data.Shards(copy)
    assert str(told.value) == (
        f"{copy}: not all of its 3 shards are whole: 00000.tar is missing; 00001.tar has {half:,} of {size:,} bytes; "
        "00002.json is missing. Copy them again, or delete these and pack the set again"
    )


def test_what_is_deleted_is_packed_again(copy, folder, packed):
    (copy / "00000.tar").unlink()
    (copy / "00002.json").write_text("{")
    data.pack(folder, copy, **SMALL, max_failed=0.1)
    data.Shards(copy)
    assert all((copy / name).read_bytes() == (packed / name).read_bytes() for name in names(packed))


def change(copy, name, do):
    """Change the index of a shard, and what the index of the set says of it."""
    content = json.loads((copy / name).read_text())
    do(content)
    (copy / name).write_text(json.dumps(content))
    index = json.loads((copy / "index.json").read_text())
    for entry in index["shards"]:
        entry["index_sha256"] = sha256(copy / f"{entry['name']}.json")
    (copy / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda shard: shard.pop("samples"), "KeyError: 'samples'"),
        (lambda shard: shard["samples"][0].pop("files"), "KeyError: 'files'"),
        (lambda shard: shard["samples"][0].update(times=[0.5]), "frames, their times and the sound do not belong"),
        (lambda shard: shard["samples"][0].update(label=12), "a label that is none of the 0 classes"),
        (lambda shard: shard["samples"][0].update(id=3), "an id or extra facts that are none"),
        (lambda shard: shard["samples"][0]["files"][0].__setitem__(0, 10**9), "a file outside of the shard"),
        (lambda shard: shard["samples"][0]["files"][0].__setitem__(0, 10**30), "OverflowError: "),
        (lambda shard: shard["samples"][0]["times"].__setitem__(0, float("nan")), "or a time that is none"),
    ],
)
def test_an_index_that_pack_does_not_write_is_refused(copy, do, message):
    change(copy, "00001.json", do)
    with pytest.raises(data.LayoutError, match=rf"00001\.json: not the index of a shard \(.*{message}"):
        data.Shards(copy)


def test_more_members_than_a_shard_may_have_are_refused(copy, monkeypatch):
    monkeypatch.setattr(shards_module, "MEMBERS", 20)
    with pytest.raises(data.LayoutError, match="more than the 20 files that a shard may have"):
        data.Shards(copy)


@pytest.fixture
def served(copy):
    """An http server of the shards: its address, and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            if self.path == "/moved/index.json":
                self.send_response(302)
                self.send_header("Location", "ftp://localhost/index.json")
                self.end_headers()
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(copy))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_shards_are_fetched_when_they_are_needed_and_kept(served, packed, tmp_path):
    address, asked = served
    remote = data.Shards(address, cache=tmp_path / "cache", allow_http=True)
    assert not [path for path in asked if path.endswith(".tar")]
    here = data.Shards(packed)
    assert remote.sha256 == here.sha256
    ours, theirs = (loader(shards, num_workers=2 if shards is remote else 0) for shards in (remote, here))
    for a, b in zip(ours, theirs, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)
    assert sorted(path for path in asked if path.endswith(".tar")) == [f"/0000{i}.tar" for i in range(3)]
    again = data.Shards(address, cache=tmp_path / "cache", allow_http=True)
    asked.clear()
    again.read(0)
    assert asked == []


def test_two_sets_share_a_cache(served, folder, tmp_path):
    """The second was once given the shards of the first, whose names are the same."""
    address, _ = served
    first = data.Shards(address, cache=tmp_path / "cache", allow_http=True)
    first.read(0)
    index = json.loads((first.folder / "index.json").read_text())
    data.pack(folder.where(lambda row: row.id < "05.mp4"), tmp_path / "other", **SMALL)
    content = tmp_path / "copy"
    for file in content.iterdir():
        file.unlink()
    shutil.copytree(tmp_path / "other", content, dirs_exist_ok=True)
    second = data.Shards(address, cache=tmp_path / "cache", allow_http=True)
    assert {row.id for row in second.rows} == {f"{i:02d}.mp4" for i in range(5)}
    assert number(second.read(0).frame) // 20 == int(second.rows[0].id[:2])
    assert json.loads((first.folder / "index.json").read_text()) == index
    assert second.verify() == []


def test_a_split_of_shards(tmp_path):
    write_clip(tmp_path / "x.mp4", seconds=1, fps=10, rate=RATE)
    rows = [data.Row(f"{i}", tmp_path / "x.mp4", label=0, split="test" if i % 3 else "train") for i in range(9)]
    data.pack(data.Table("test", tmp_path, tuple(rows), ("a",)), tmp_path / "out", clips_per_shard=2)
    whole, train, test = (data.Shards(tmp_path / "out", split) for split in (None, "train", "test"))
    assert (len(whole), {row.id for row in train.rows}) == (9, {"0", "3", "6"})
    assert len({whole.sha256, train.sha256, test.sha256}) == 3
    assert sum(train.sizes) == 3
    assert train.verify() == []
    for shards in (train, test):
        for i, row in enumerate(shards.rows):
            same = next(j for j, other in enumerate(whole.rows) if other.id == row.id)
            assert torch.equal(shards.read(i).waveform, whole.read(same).waveform)
    seen = [i for batch in loader(test, batch_size=3) for i in batch.index.tolist()]
    assert sorted(seen) == list(range(6))
    with pytest.raises(ValueError, match="split='val': expected one of test, train, all"):
        data.Shards(tmp_path / "out", "val")
    data.pack(data.Table("test", tmp_path, tuple(rows[:1]), ("a",)), tmp_path / "one")
    assert data.Shards(tmp_path / "one", "train").sha256 == data.Shards(tmp_path / "one").sha256  # the same clips


def test_shard_that_is_not_the_one_of_the_index_is_refused(served, copy, tmp_path):
    remote = data.Shards(served[0], cache=tmp_path / "cache", allow_http=True)
    cut(copy / "00000.tar", 0.9)
    with pytest.raises(data.LayoutError, match=r"00000\.tar: not the file that index\.json names"):
        remote.read(0)
    (copy / "00000.tar").unlink()
    with pytest.raises(RuntimeError, match=r"00000\.tar: HTTP Error 404"):
        remote.read(0)


def test_other_addresses_are_refused(served, tmp_path):
    for address in ("pipe:touch /tmp/owned", "http://localhost/x", "file:///tmp", "s3://bucket/x", "ftp://localhost/"):
        with pytest.raises(ValueError, match="expected a folder or an address that begins with https:"):
            data.Shards(address, cache=tmp_path)
    with pytest.raises(ValueError, match="cache= must name a folder"):
        data.Shards("https://localhost/x")
    with pytest.raises(data.LayoutError, match=r"redirects to ftp://localhost/index\.json, expected https or http"):
        data.Shards(served[0] + "/moved", cache=tmp_path, allow_http=True)


# --- command line -----------------------------------------------------------------------------------------------------


def test_command(folder, tmp_path, capsys):
    arguments = ["shard", "folder", str(folder.root), str(tmp_path / "out"), "--workers", "0"]
    assert cli.main(arguments) == 1
    assert "1 of 12 clips have failed" in capsys.readouterr().err
    assert cli.main(arguments) == 1  # what is packed already counts too
    assert "1 of 12 clips have failed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()
    assert cli.main([*arguments, "--max-failed", "0.1"]) == 3
    shown = capsys.readouterr()
    assert "folder: 12 of 12 clips found" in shown.out
    assert "out: 11 clips" in shown.out
    assert "1 clips failed, see" in shown.err
    assert len(data.Shards(tmp_path / "out")) == 11


def test_command_line_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["shard", "vgg", str(tmp_path), str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "did you mean vggss?" in capsys.readouterr().err
    assert cli.main(["shard", "folder", str(tmp_path), str(tmp_path / "out"), "--split", "x"]) == 1
    assert "split='x': expected all" in capsys.readouterr().err
