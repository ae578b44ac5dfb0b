"""The folder of features: what readers of Parquet see, resuming, refusals, faults."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_clips import noise, write_clip
from safetensors.torch import save_file

from avfusion import DeepAVFusion, EncoderConfig, Features, save_encoder
from avfusion.cli import main
from avfusion.embedding import store as stores
from avfusion.embedding.store import DTYPES, FACTS, Store, StoreError, parts, read_manifest, read_rows, shards
from avfusion.files import write_json

CONFIG = EncoderConfig(dim=32, depth=1, num_heads=2, image_size=(32, 48), audio_size=(32, 64), fusion="dense")
MADE = {"weights": "abc", "stored": "fp32", "checkpoint": "a.pth", "windows": {"at": (), "every": 1.0}}


def write_set(root, count, longest):
    """A checkpoint; clips of 1.5 s of which one has 5.5 s; a damaged one."""
    torch.manual_seed(0)
    save_encoder(DeepAVFusion(CONFIG), root / "encoder.safetensors")
    for number in range(count):
        write_clip(root / f"{number}.mp4", seconds=1.5 + 4 * (number == longest), sound=noise, rate=16000)
    (root / "damaged.mp4").write_bytes((root / "1.mp4").read_bytes()[:3000])
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("made"), 5, longest=0)


def line(made, out, *options):
    return ["embed", str(made), "--checkpoint", str(made / "encoder.safetensors"), "--out", str(out), "--every", "0.5",
            "--shard-rows", "3", "--batch-size", "2", "--dtype", "fp32", *map(str, options)]  # fmt: skip


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "features"
    assert main(line(made, out, "--workers", 0)) == 3
    return out


def assert_same_rows(found, expected, tolerance=2e-5):
    assert found.clips == expected.clips
    assert found.starts == expected.starts
    assert found.ends == expected.ends
    assert found.frame_times == expected.frame_times
    torch.testing.assert_close(found.tensors(), expected.tensors(), rtol=0, atol=tolerance)


# --- what is in it, and who reads it ----------------------------------------------------------------------------------


def test_a_folder_holds_rows_facts_and_a_manifest(made, whole):
    features, manifest = Features.load(whole), read_manifest(whole)
    assert len(features.clips) == 10 + 4 * 2
    assert features.starts[:10] == pytest.approx(np.arange(10) / 2, abs=0.05)
    assert features.ends[0] - features.starts[0] == 1.0
    assert [error.path for error in features.failed] == [str(made / "damaged.mp4")]
    assert features.pooled.shape == (18, 3, 32)
    assert features.x_image is None
    assert manifest["done"] == [str(made / f"{number}.mp4") for number in range(5)]
    assert manifest["rows"] == 18
    assert manifest["made"]["config"]["dim"] == 32
    assert [len(part["file"]) for part in parts(whole, ("file",))] == [4, 4, 4, 4, 2]  # whole batches of two
    assert not [name for name in os.listdir(whole) if name.endswith(".part")]


def test_readers_of_parquet_read_it(whole):
    frame = pytest.importorskip("pandas").read_parquet(whole)
    assert list(frame.columns) == [*FACTS[:6], "image", "audio", "fusion"]
    features = Features.load(whole)
    order = frame.sort_values(["file", "window"]).index
    assert np.array_equal(np.stack(frame.image[order]), features.pooled[:, 0])
    dataset = pytest.importorskip("pyarrow.dataset").dataset(whole)
    assert dataset.count_rows() == 18
    assert str(dataset.schema.field("fusion").type) == "fixed_size_list<element: float>[32]"


def test_hugging_face_datasets_reads_it(whole, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(whole), split="train", cache_dir=str(tmp_path))
    assert len(rows) == 18
    assert np.array_equal(
        rows.with_format("numpy").sort(["file", "window"])["image"], Features.load(whole).pooled[:, 0]
    )


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_comes_back(tmp_path, suffix, dtype):
    if (suffix, dtype) == ("parquet", "bf16"):
        pytest.skip("Parquet knows no bfloat16")
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype("f4")
    rows = {"file": np.array([f"ä {n}" for n in range(5)], object), "window": np.arange(5), "windows": np.full(5, 9),
            "start": np.arange(5) / 3, "end": np.arange(5) + 1.0, "frame_time": np.arange(5) + 0.5, "image": x[:, 0],
            "audio": x[:, 1], "fusion": x[:, 2], "x_image": x}  # fmt: skip
    path = str(tmp_path / f"a.{suffix}")
    stores.write_rows(path, rows, MADE | {"stored": dtype})
    found, made = stores.read_rows(path)
    assert made["weights"] == "abc"
    assert set(found) == set(rows)
    for name, column in rows.items():
        expected = torch.from_numpy(column).to(DTYPES[dtype]).float().numpy() if column.ndim > 1 else column
        assert np.array_equal(found[name], expected), name
        assert found[name].dtype == expected.dtype
    assert list(stores.read_rows(path, ("file", "audio"))[0]) == ["file", "audio"]


def test_files_of_version_0_1_still_load(tmp_path):
    x = {name: torch.randn(2, n, 8) for name, n in (("x_image", 3), ("x_audio", 2), ("x_fusion", 4))}
    x["pooled"] = torch.stack([tokens.mean(1) for tokens in x.values()], 1)
    facts = {"clips": ["b.mp4", "a.mp4"], "starts": [0.5, 1.5], "config": {"dim": 8}, "checkpoint": "w.pth",
             "weights": "abc", "left": [], "failed": [["c.mp4", "audio", "no audio stream"]]}  # fmt: skip
    save_file(x, tmp_path / "old.safetensors", {name: json.dumps(fact) for name, fact in facts.items()})
    old = Features.load(tmp_path / "old.safetensors")
    assert (old.clips, old.starts, old.checkpoint) == (["a.mp4", "b.mp4"], [1.5, 0.5], "w.pth")
    torch.testing.assert_close(old.tensors(), {name: tensor.flip(0) for name, tensor in x.items()}, rtol=0, atol=0)
    assert str(old.failed[0]) == "c.mp4: audio stream: no audio stream"


@pytest.mark.parametrize("name", ["a.parquet", "a.safetensors"])
def test_damaged_and_other_files_are_refused_by_name(tmp_path, name):
    for content in (b"", b"PAR1 no", os.urandom(200)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match=f"{name}: not features that avfusion wrote"):
            Features.load(tmp_path / name)
    with pytest.raises(StoreError, match=r"none: no such file or folder"):
        Features.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no features in this folder"):
        Features.load(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_formats_hold_the_same_rows(made, whole, tmp_path, kind):
    assert main(line(made, tmp_path / "f", "--tokens", "--format", kind, "--workers", 0)) == 3
    assert all(shard.endswith(f".{kind}") for shard in shards(tmp_path / "f"))
    features = Features.load(tmp_path / "f")
    assert features.x_image.shape == (18, 6, 32)
    assert features.x_audio.shape == (18, 8, 32)
    assert features.x_fusion.shape == (18, 16, 32)
    torch.testing.assert_close(features.x_audio.mean(1), features.pooled[:, 1], rtol=0, atol=1e-5)
    features.x_image = features.x_audio = features.x_fusion = None
    assert_same_rows(features, Features.load(whole))


def test_frames_are_pooled_or_kept(made, tmp_path):
    for name, options in (("pooled", []), ("kept", ["--keep-frames"])):
        assert main(line(made, tmp_path / name, "--frames", 3, *options)) == 3
    pooled, kept = Features.load(tmp_path / "pooled"), Features.load(tmp_path / "kept")
    assert len(kept.clips) == 3 * len(pooled.clips) == 54
    times = torch.tensor(kept.frame_times).view(-1, 3)
    assert (times.diff() > 0.2).all()
    torch.testing.assert_close(times.mean(1), torch.tensor(pooled.frame_times))
    torch.testing.assert_close(kept.pooled.view(18, 3, 3, 32).mean(1), pooled.pooled, rtol=0, atol=1e-5)
    assert main(line(made, tmp_path / "kept", "--frames", 3, "--keep-frames")) == 3  # nothing is left to do
    assert len(Features.load(tmp_path / "kept").clips) == 54


# --- going on, and what is refused ------------------------------------------------------------------------------------


def test_another_model_or_other_settings_are_refused(made, whole, tmp_path, capsys):
    before = {path: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    save_encoder(DeepAVFusion(CONFIG), tmp_path / "other.safetensors")
    for options, told in ((["--checkpoint", tmp_path / "other.safetensors"], "(weights "), (["--tokens"], "(tokens "),
                          (["--store-dtype", "fp16"], '(stored "fp32", now "fp16")'), (["--frames", 2], "(windows "),
                          (["--dtype", "bf16"], '(computed "float32", now "bfloat16")'),
                          (["--format", "safetensors"], '(shards "parquet", now "safetensors")')):  # fmt: skip
        assert main(line(made, whole, *options)) == 1
        assert f"{whole}: holds features made otherwise {told}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_the_same_weights_under_another_name_go_on(made, whole, tmp_path, capsys):
    (tmp_path / "same.safetensors").write_bytes((made / "encoder.safetensors").read_bytes())
    assert main(line(made, whole, "--checkpoint", tmp_path / "same.safetensors")) == 3
    assert "goes on after 18 rows of 5 files" in capsys.readouterr().out


def test_new_files_are_added(made, tmp_path):
    out = tmp_path / "f"
    options = ["--checkpoint", str(made / "encoder.safetensors"), "--out", str(out), "--every", "0.5"]
    assert main(["embed", str(made / "1.mp4"), *options]) == 0
    assert main(["embed", str(made / "1.mp4"), str(made / "2.mp4"), *options]) == 0
    assert Features.load(out).clips == [str(made / f"{n}.mp4") for n in (1, 1, 2, 2)]
    assert len(shards(out)) == 2


def test_two_runs_at_once_are_refused(tmp_path):
    one = Store(tmp_path, MADE)
    with pytest.raises(StoreError, match=rf"{tmp_path}: in use by this process: wait until it ends"):
        Store(tmp_path, MADE)
    one.close()
    Store(tmp_path, MADE).close()


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    for content in ({}, {"made": {"format": "another-1"}}):
        write_json(tmp_path / "_manifest.json", content)
        with pytest.raises(StoreError, match=r"_manifest\.json: cannot be read"):
            Store(tmp_path, MADE)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match=r"data\.parquet: no file of avfusion embed: give a folder of its own"):
        Store(tmp_path, MADE)


def rows(*places):
    found = {name: np.array(column, object if name == "file" else None) for name, column in zip(
        ("file", "window", "windows"), zip(*places, strict=True), strict=True)}  # fmt: skip
    n = len(places)
    return (
        found
        | {"start": np.zeros(n), "end": np.ones(n), "frame_time": np.zeros(n)}
        | {name: np.zeros((n, 4), "f4") for name in ("image", "audio", "fusion")}
    )


def test_what_is_done_is_read_off_the_shards(tmp_path):
    """Also where an engine hands windows on in another order than the file's."""
    store = Store(tmp_path, MADE, shard_rows=2)
    store.add(rows(("a", 0, 3), ("b", 1, 2)))
    store.add(rows(("a", 2, 3)))  # waits
    store.lock.release()  # killed
    store = Store(tmp_path, MADE, shard_rows=2)
    assert (store.whole, store.begun, store.rows) == (set(), {"a": {0}, "b": {1}}, 2)
    store.add(rows(("a", 1, 3), ("a", 2, 3)))
    store.close()
    assert read_manifest(tmp_path)["done"] == ["a"]
    assert read_manifest(tmp_path)["partly"] == {"b": 1}


def test_a_shard_is_written_in_time_though_it_is_not_full(tmp_path, monkeypatch):
    store = Store(tmp_path, MADE)
    store.add(rows(("a", 0, 3)))
    assert store.number == 0
    assert store.shard_rows > 1e5
    monkeypatch.setattr(stores, "MINUTES", 0)
    store.add(rows(("a", 1, 3)))
    assert store.number == 1
    store.close()
    assert read_manifest(tmp_path)["partly"] == {"a": 2}


def test_addresses(made, whole):
    """By fsspec: here its files in memory."""
    import fsspec

    memory, out = fsspec.filesystem("memory"), "memory://bucket/features"
    memory.pipe("/lists/some.txt", f"{made / '1.mp4'}\n\n{made / '2.mp4'}\n".encode())
    options = ["--checkpoint", str(made / "encoder.safetensors"), "--out", out, "--every", "0.5", "--dtype", "fp32"]
    assert main(["embed", "@memory://lists/some.txt", *options, "--workers", "0"]) == 0
    assert main(["embed", "@memory://lists/some.txt", str(made / "0.mp4"), *options, "--workers", "0"]) == 0
    assert sorted(os.path.basename(name) for name in memory.ls("/bucket/features", detail=False)) == [
        "000-000000.parquet", "000-000001.parquet", "_manifest.json",
    ]  # fmt: skip
    found, expected = Features.load(out), Features.load(whole)
    kept = [row for row, name in enumerate(expected.clips) if Path(name).stem in "012"]
    assert found.clips == [expected.clips[row] for row in kept]
    torch.testing.assert_close(found.pooled, expected.pooled[kept], rtol=0, atol=2e-5)


# --- faults -----------------------------------------------------------------------------------------------------------


def start(arguments, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "avfusion", *arguments, "--threads", "1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **options)  # fmt: skip


@pytest.mark.parametrize("suffix", ["parquet", "safetensors", "npy"])
def test_features_are_saved_as_the_same_bytes(whole, tmp_path, suffix):
    features, found = Features.load(whole), set()
    for number in range(6):
        features.save(tmp_path / f"{number}.{suffix}")
        found.add((tmp_path / f"{number}.{suffix}").read_bytes())
    assert len(found) == 1


def test_rot_inside_features_is_told_with_the_file(tmp_path):
    store = Store(tmp_path, MADE)
    store.add(rows(*(("a", window, 300) for window in range(300))))
    store.close()
    (path,) = map(Path, shards(tmp_path))
    whole = path.read_bytes()
    expected = [x.tolist() for x in read_rows(str(path))[0].values()]
    found = []
    for at in range(100, len(whole) - 2000, len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found.append(read_or_refused(path))
    assert all(told is None or told == expected for told in found)  # the same where a byte counts for nothing
    assert found.count(None) > 5


def read_or_refused(path):
    try:
        return [x.tolist() for x in read_rows(str(path))[0].values()]
    except StoreError:
        return None


def test_a_full_disk_loses_nothing(made, whole, tmp_path):
    """A limit on the size of files takes the disk's place: the second shard does not fit."""
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    out = tmp_path / "f"
    options = line(made, out, "--workers", 0, "--shard-rows", 2)
    assert main([*options[:1], str(made / "1.mp4"), *options[2:]]) == 0
    options[options.index("--shard-rows") + 1] = "100"
    process = start(options, preexec_fn=limited)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert (
        "000-000001.parquet: cannot be written (File too large): make room, or make it writable, and run the same"
        in told
    )
    assert Features.load(out).clips == [str(made / "1.mp4")] * 2
    assert sorted(name for name in os.listdir(out) if name[0] not in "._") == ["000-000000.parquet"]
    assert not [name for name in os.listdir(out) if name.endswith(".part")]
    assert main(options) == 3
    assert_same_rows(Features.load(out), Features.load(whole))


def test_a_disk_that_is_too_small_is_known_before(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9000))
    with pytest.raises(SystemExit) as ended:
        main(line(made, tmp_path / "f", "--tokens"))
    assert ended.value.code == 2
    assert "rows need 0.0 GB, 0.0 GB are free: another disk" in capsys.readouterr().err
    assert not (tmp_path / "f" / "_manifest.json").exists()


def test_a_checkpoint_that_cannot_be_read_costs_no_clip(made, tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    assert main(line(made, tmp_path / "f", "--checkpoint", tmp_path / "bad.safetensors")) == 1
    assert "bad.safetensors: not a safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "f" / "_manifest.json").exists()


def test_a_file_that_is_cut_gives_what_is_there_and_the_rest_when_it_is_mended(made, tmp_path, capsys):
    clip = tmp_path / "long.mkv"
    write_clip(clip, seconds=6, sound=noise, rate=16000)
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    options = ["--checkpoint", str(made / "encoder.safetensors"), "--out", str(tmp_path / "f"), "--every", "0.5"]
    assert main(["embed", str(clip), *options]) == 3
    assert "truncated or damaged" in capsys.readouterr().err
    some = Features.load(tmp_path / "f")
    assert 1 <= len(some.clips) < 11
    assert len(some.failed) == 1
    clip.write_bytes(content)
    assert main(["embed", str(clip), *options]) == 0
    features = Features.load(tmp_path / "f")
    assert features.starts == pytest.approx(np.arange(11) / 2, abs=0.05)
    assert features.failed == []
