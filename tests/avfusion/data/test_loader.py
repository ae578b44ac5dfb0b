"""The loader: which clips come when, what becomes of those that fail, and resuming at the next clip."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from made_clips import noise, number, write_clip
from PIL import Image

from avfusion import ClipError, data, read_clip
from avfusion.data import Row
from avfusion.data.sampler import order
from avfusion.media.clip import Clip
from avfusion.media.transforms import image_transform


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return Path(write_clip(path, seconds=2, fps=10, rate=16000, layout="mono", sound=noise))


@pytest.fixture
def folder(tmp_path, clip):
    """folder(count): a table of so many copies of a clip of 2 s."""

    def make(count):
        (tmp_path / "clips").mkdir()
        for i in range(count):
            shutil.copy(clip, tmp_path / "clips" / f"{i:03d}.mp4")
        return data.read("folder", tmp_path / "clips")

    return make


class Fake:
    """A source that decodes nothing: clip i is a grey picture and a constant sound; some clips fail."""

    def __init__(self, count, *, bad=(), rows=None, classes=(), volume=1.0):
        self.volume = volume
        self.rows = rows or [Row(f"{i}", Path(f"{i}.mp4")) for i in range(count)]
        self.classes, self.sha256, self.bad = classes, f"fake {count}", frozenset(bad)
        self.action = {}  # index -> what to do instead of reading

    def name(self, index):
        return f"fake/{index}.mp4"

    def read(self, index, *, start=None, **window):
        if index in self.action:
            self.action[index]()
        if index in self.bad:
            raise ClipError(self.name(index), "video", "is bad")
        moment = torch.rand(()).item() if start == "random" else 0.5
        return Clip(
            Image.new("RGB", (8, 8), (index % 256, 0, 0)),
            torch.full((1, 16), self.volume),
            moment,
            moment,
            self.name(index),
        )


def loader(source, batch_size=4, *, train=True, **options):
    own = {name: options.pop(name) for name in ("duration", "min_duration", "gain_db") if name in options}
    clips = data.clips(source, train=train, transform=image_transform((8, 8), train=train), **own)
    return data.ClipLoader(clips, batch_size, train=train, **options)


def contents(batches):
    """What tells batches apart: clips, windows, augmented pictures and sounds."""
    return [
        (b.index.tolist(), b.start.tolist(), b.image.sum((1, 2, 3)).tolist(), b.waveform.sum((1, 2)).tolist())
        for b in batches
    ]


# --- which clip comes when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size", "world_size"), [(24, 4, 2), (29, 4, 2), (13, 2, 3), (8, 4, 2)])
def test_epochs_over_ranks_visit_every_clip_as_often_as_promised(count, batch_size, world_size):
    ranks = [loader(Fake(count), batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = count // (batch_size * world_size)
    orders = set()
    for _ in range(2):
        epochs = [[b.index.tolist() for b in rank] for rank in ranks]
        assert [[len(batch) for batch in epoch] for epoch in epochs] == [[batch_size] * steps] * world_size
        seen = Counter(index for epoch in epochs for batch in epoch for index in batch)
        assert set(seen.values()) == {1}
        assert len(seen) == steps * batch_size * world_size > count - batch_size * world_size
        orders.add(str(epochs))
    assert len(orders) == 2
    assert len(ranks[0]) == steps


@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (11, 2), (9, 3), (2, 4)])
def test_evaluation_visits_every_clip_once_in_order(count, world_size):
    ranks = [loader(Fake(count), 2, train=False, rank=rank, world_size=world_size) for rank in range(world_size)]
    epochs = [[index for batch in rank for index in batch.index.tolist()] for rank in ranks]
    assert sorted(index for epoch in epochs for index in epoch) == list(range(count))
    assert all(epoch == sorted(epoch) for epoch in epochs)
    assert max(map(len, epochs)) - min(map(len, epochs)) <= 1


def test_order_is_a_permutation_that_stays_within_a_few_shards():
    sizes = [10, 7, 10, 3] * 10
    permutation = order(300, 0, 0, sizes, mix=4)
    assert sorted(permutation.tolist()) == list(range(300))
    shard = torch.repeat_interleave(torch.arange(40), torch.tensor(sizes))[permutation].tolist()
    last_needed = {name: at for at, name in enumerate(shard)}
    first_needed = {name: at for at, name in reversed(list(enumerate(shard)))}
    open_shards = [sum(first_needed[s] <= at <= last_needed[s] for s in range(40)) for at in range(300)]
    assert max(open_shards) == 4
    assert not torch.equal(permutation, order(300, 0, 1, sizes, mix=4))
    assert not torch.equal(permutation, order(300, 1, 0, sizes, mix=4))
    assert torch.equal(permutation, order(300, 0, 0, sizes, mix=4))


def test_batches_do_not_depend_on_workers_and_differ_by_epoch_and_seed():
    first = loader(Fake(16, bad=[3]), max_failed=1)
    epochs = [contents(first), contents(first)]
    assert epochs[0] != epochs[1]
    again = loader(Fake(16, bad=[3]), max_failed=1, num_workers=2)
    assert [contents(again), contents(again)] == epochs
    assert contents(loader(Fake(16, bad=[3]), max_failed=1, seed=1)) != epochs[0]


def test_training_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader(Fake(8)))
    assert torch.equal(torch.rand(3), expected)


# --- what a batch holds -----------------------------------------------------------------------------------------------


def test_evaluation_takes_the_middle_of_real_clips(folder):
    table = folder(3)
    (batch,) = loader(table, train=False, duration=1.0)
    expected = read_clip(table.rows[1].path, duration=1.0)
    assert batch.index.tolist() == [0, 1, 2]
    assert torch.equal(batch.waveform[1], expected.waveform)
    assert torch.equal(batch.image[1], image_transform((8, 8))(expected.frame))
    assert batch.start[1] == pytest.approx(expected.start)
    assert (batch.label.tolist(), batch.labels) == ([-1] * 3, None)


def test_training_takes_random_windows_and_frames_of_real_clips(folder):
    seen = []
    table = folder(8)
    clips = data.clips(
        table, train=True, duration=0.5, gain_db=0, transform=lambda frame: torch.tensor([number(frame)])
    )
    training = data.ClipLoader(clips, 8, train=True)
    for _ in range(4):
        (batch,) = training
        for start, waveform, image in zip(batch.start.tolist(), batch.waveform, batch.image, strict=True):
            expected = read_clip(table.rows[0].path, start=start, duration=0.5)
            torch.testing.assert_close(waveform, expected.waveform, rtol=0, atol=1e-6)
            assert start - 0.05 <= image.item() / 10 <= start + 0.55  # the frame lies in the window
            seen.append((start, image.item()))
    starts, frames = zip(*seen, strict=True)
    assert 0 <= min(starts) < 0.2
    assert 1.3 < max(starts) <= 1.5
    assert len(set(starts)) == 32
    assert len(set(frames)) > 8


def test_volume_changes_by_up_to_six_decibels_and_is_clipped():
    gains = torch.cat([b.waveform.amax((1, 2)) for b in loader(Fake(256, volume=0.5), 64)]).mul(2).log10() * 20
    assert gains.min() < -5
    assert gains.max() > 5
    assert gains.abs().max() <= 6
    loud = torch.cat([b.waveform.amax((1, 2)) for b in loader(Fake(64), 64)])
    assert loud.max() == 1
    assert next(iter(loader(Fake(4), train=False))).waveform.eq(1).all()


def test_balanced_epochs_draw_classes_alike():
    """900 clips of one class, 90 of a second, 10 of both: each class comes up half of the time."""
    rows = [Row(str(i), Path("x"), labels=((0,) if i < 900 else (1,) if i < 990 else (0, 1))) for i in range(1000)]
    table = Fake(1000, rows=rows, classes=("x", "y", "never"))
    epochs = [torch.cat([batch.index for batch in loader(table, 100, seed=seed, balanced=True)]) for seed in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])
    second = (epochs[0] >= 900).float().mean()
    assert 0.45 < second < 0.57  # half, and of the first class 10 of 910
    assert len(epochs[0].unique()) < 600
    with pytest.raises(ValueError, match="balanced: no clip has a label"):
        loader(Fake(4), balanced=True)


def test_labels():
    rows = [Row("a", Path("a"), label=1), Row("b", Path("b")), Row("c", Path("c"), labels=(0, 2))]
    (batch,) = loader(Fake(3, rows=rows, classes=("x", "y", "z")), train=False)
    assert batch.label.tolist() == [1, -1, -1]
    assert batch.labels.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 1]]
    (batch,) = loader(Fake(2, rows=rows[:2], classes=("x", "y", "z")), train=False)
    assert batch.labels is None


def test_clips_shorter_than_min_duration_fail(folder):
    table = folder(1)
    assert next(iter(loader(table, train=False))).waveform.shape == (1, 1, 48000)  # reflected
    with pytest.raises(RuntimeError, match=r"too short: 2\.0\d s of picture and sound, needed are 2.5 s"):
        list(loader(table, train=False, min_duration=2.5))


# --- failures ---------------------------------------------------------------------------------------------------------


def corrupt(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "zero bytes":
        content = b""
    elif kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "wrong type":
        content = b"It was a dark and stormy night; the rain fell in torrents.\n" * 50
    else:
        generator = np.random.default_rng(0)
        for at in generator.integers(0, len(content), len(content) // 50):
            content[at] ^= int(generator.integers(1, 256))
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupted_files_are_survived_and_reported(folder, tmp_path, workers):
    table, report = folder(100), tmp_path / "failed.jsonl"
    kinds = dict(zip((7, 31, 62, 99), ("zero bytes", "truncated", "flipped bytes", "wrong type"), strict=True))
    for index, kind in kinds.items():
        corrupt(table.rows[index].path, kind)
    training = loader(table, 25, duration=0.5, report=report, num_workers=workers)
    for _ in range(2):
        for batch in training:
            assert len(batch.index) == 25
            assert not set(batch.index.tolist()) & kinds.keys()
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == [str(table.rows[index].path) for index in kinds]
    assert all(line["stream"] in ("file", "video", "audio") and line["reason"] for line in lines)
    assert training.failed >= 8  # a replacement may be one of them
    assert training.tried == 200 + training.failed


def test_failed_clips_leave_evaluation_batches_smaller():
    evaluation = loader(Fake(12, bad=[1, 4, 5, 6, 7]), train=False, max_failed=0.5)
    assert [batch.index.tolist() for batch in evaluation] == [[0, 2, 3], [8, 9, 10, 11]]
    assert (evaluation.failed, evaluation.tried) == (5, 12)


def test_share_of_failures_is_taken_of_at_least_200_clips():
    early = Fake(1000, bad=range(10))  # the first ten, of which 5 % of 200 are just allowed
    evaluation = loader(early, 5, train=False)
    assert sum(1 for _ in evaluation) == 198
    with pytest.raises(RuntimeError, match=r"11 of 15 clips have failed, more than max_failed=5%; the last is fake/10"):
        list(loader(Fake(1000, bad=range(11)), 5, train=False))
    with pytest.raises(RuntimeError, match="2 of 5 clips have failed"):
        list(loader(Fake(30, bad=range(2)), 5, train=False))  # more than 5 % of all


def test_too_many_failures_before_are_too_many_without_a_new_one():
    training = loader(Fake(1000), max_failed=0.01)
    training.load_state_dict(training.state_dict() | {"tried": 1000, "failed": 40})
    with pytest.raises(RuntimeError, match="40 of 1004 clips have failed, more than max_failed=1%; `failures` lists"):
        next(iter(training))


def test_training_gives_up_where_nothing_can_be_read():
    with pytest.raises(RuntimeError, match="40 of 40 clips have failed"):
        list(loader(Fake(1000, bad=range(1000))))


def test_report_names_each_clip_once_over_runs(tmp_path):
    report = tmp_path / "failed.jsonl"
    report.write_text('{"path": "fake/3.mp4", "stream": "video", "reason": "old", "epoch": 0}\n{"path": "fa')
    training = loader(Fake(12, bad=[3, 5]), max_failed=1, report=report)
    list(training), list(training)
    known, broken, new = report.read_text().splitlines()
    assert json.loads(known)["reason"] == "old"
    assert broken == '{"path": "fa'
    assert json.loads(new) == {"path": "fake/5.mp4", "stream": "video", "reason": "is bad", "epoch": 0}


def test_ranks_write_reports_of_their_own(tmp_path):
    for rank in range(2):
        list(loader(Fake(8, bad=[0, 1]), 2, train=False, rank=rank, world_size=2, max_failed=1,
                    report=tmp_path / "failed.jsonl"))  # fmt: skip
    names = {path.name: json.loads(path.read_text())["path"] for path in tmp_path.iterdir()}
    assert names == {"failed.rank0.jsonl": "fake/0.mp4", "failed.rank1.jsonl": "fake/1.mp4"}


DYING = """
import os, sys, time
from pathlib import Path
from avfusion import data
class Deadly(data.Table):
    def read(self, index, **window):
        if index == 5:
            os.kill(os.getpid(), 9)
        return super().read(index, **window)
rows = [data.Row(str(i), Path(sys.argv[1])) for i in range(5)] + [data.Row("5", Path(sys.argv[1]).parent / "5.mp4")]
loader = data.ClipLoader(Deadly("test", Path(sys.argv[1]).parent, tuple(rows)), 1, train=False, num_workers=2)
for batch in loader:
    time.sleep(float(sys.argv[2]))
"""


# Without a pause it dies while the loader waits for it, with one while the main process is in a step of the training.
@pytest.mark.parametrize("pause", ["0", "0.3"])
def test_death_of_a_worker_names_the_clip_at_hand(clip, pause):
    command = [sys.executable, "-c", DYING, str(clip), pause]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"RuntimeError: a worker has died while it was reading {clip.parent}/5.mp4 (" in done.stderr


def close_files_and_end():
    os.closerange(3, 4096)  # where there is no limit, up to it takes minutes
    time.sleep(0.5)
    os._exit(1)


def test_a_worker_that_has_closed_its_files_and_still_runs_counts_as_dead():
    mine = loader(Fake(8), num_workers=2)
    alive, ending = (multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
                     for target, args in ((time.sleep, (60,)), (close_files_and_end, ())))  # fmt: skip
    try:
        alive.start(), ending.start()
        mine.workers.table[:] = [alive.pid, 3, ending.pid, 5]
        assert mine.workers.held_by_dead(wait=5) == [5]
    finally:
        alive.kill(), alive.join(), ending.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_unexpected_error_names_the_clip(workers):
    source = Fake(8)
    source.action = {5: lambda: 1 / 0}
    with pytest.raises(RuntimeError, match=r"fake/5\.mp4: ZeroDivisionError while reading this clip"):
        list(loader(source, train=False, num_workers=workers))


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [0, 1, 5, 6, 9])
def test_resumed_run_sees_what_an_uninterrupted_one_would(workers, batches):
    source = Fake(26, bad=[3])

    def run(training):
        while True:
            for batch in training:
                yield contents([batch]), training.state_dict()

    whole = run(loader(source, max_failed=1))
    expected = [next(whole)[0] for _ in range(14)]  # six batches an epoch
    first = loader(source, max_failed=1, num_workers=workers)
    interrupted = run(first)
    for _ in range(batches):
        next(interrupted)
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(source, max_failed=1, num_workers=workers)
    second.load_state_dict(state)
    resumed = run(second)
    assert [next(resumed)[0] for _ in range(14 - batches)] == expected[batches:]
    assert second.tried >= 14 * 4


def test_leaving_an_iteration_goes_on_with_the_next_batch():
    whole = loader(Fake(16))
    expected = contents(whole) + contents(whole)
    training = loader(Fake(16))
    assert [contents([next(iter(training))])[0] for _ in range(7)] + contents(training) == expected
    assert (training.epoch, training.consumed) == (2, 0)


def test_resuming_with_other_ranks_repeats_and_loses_no_clip():
    source = Fake(48)
    before = [loader(source, 2, rank=rank, world_size=3) for rank in range(3)]
    seen = []
    for rank in before:
        batches = iter(rank)
        seen += [index for _ in range(3) for index in next(batches).index.tolist()]
    after = [loader(source, 5, rank=rank, world_size=2) for rank in range(2)]
    for rank in after:
        rank.load_state_dict(before[0].state_dict())
        seen += [index for batch in rank for index in batch.index.tolist()]
    assert sorted(seen) == list(range(48))


def test_state_of_another_run_is_refused():
    state = loader(Fake(8)).state_dict()
    with pytest.raises(ValueError, match="the state is of seed 0, this loader's is 1"):
        loader(Fake(8), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of sha256 fake 8, this loader's is fake 9"):
        loader(Fake(9)).load_state_dict(state)


KILLED = """
import json, os, sys
from avfusion import data
clips = data.clips(data.read("folder", sys.argv[1]), train=True, duration=0.5)
loader = data.ClipLoader(clips, 2, train=True, num_workers=1)
for step, batch in enumerate(loader):
    print(json.dumps([batch.index.tolist(), batch.start.tolist(), batch.image.sum().item()]))
    print(json.dumps(loader.state_dict()), flush=True)
    if step == 1:
        os.kill(os.getpid(), 9)
"""


# A process of its own, which starts torch and a worker.
def test_killed_process_resumes_at_the_next_clip(folder):
    table = folder(12)
    done = subprocess.run([sys.executable, "-c", KILLED, str(table.root)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    first, _, second, state = map(json.loads, done.stdout.splitlines())

    def rest(*states):
        resumed = data.ClipLoader(data.clips(table, train=True, duration=0.5), 2, train=True)
        for state in states:
            resumed.load_state_dict(state)
        return [[b.index.tolist(), b.start.tolist(), b.image.sum().item()] for b in resumed]

    assert [first, second, *rest(state)] == rest()


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size=5 on 2 ranks: the set has only 9 clips"):
        loader(Fake(9), 5, rank=0, world_size=2)
    with pytest.raises(ValueError, match="rank=2: expected 0 to 1, since world_size=2"):
        loader(Fake(9), rank=2, world_size=2)
