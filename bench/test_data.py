"""What a core loads for training: clips from video files, from shards, and from memory, and where the time goes.

The clips are as people download and keep them: 10 s of H.264 at 25 frames a second with a keyframe every 250, stereo
AAC at 44.1 kHz. Before anything is timed, the shards must give the sound of the video files.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import av
import pytest
import soundfile
import torch

from avfusion import data
from avfusion.data import ClipLoader, Shards, Table
from avfusion.data.loader import Attempt, collate
from avfusion.data.table import find_videos
from avfusion.media import stills, streams
from avfusion.media.clip import Clip
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from bench import encoder, measure

CLIPS, BATCH = 16, 16
ROUNDS = 20  # of a profile
BASELINE, LARGE = "mp4, 340 x 256", "mp4, 640 x 360"
SHARDS = "shards, JPEG and FLAC"
ROWS = (BASELINE, LARGE, SHARDS, "shards, JPEG and WAV", "memory, decoded")
GPU_FLOPS = 400e12  # FLOP/s in bfloat16 that training reaches on a large GPU of today: an assumption, for scale

# Stage -> the functions in which its time is spent; what they call of another stage counts there.
STAGES = {
    BASELINE: {
        "open the file": [(streams, "_opened"), (streams.Streams, "__init__")],
        "decode video": [(streams.Streams, "frames")],
        "frame to RGB": [(streams, "_upright")],
        "decode audio": [(streams.Streams, "waveforms")],
        "resample": [(streams.AF, "resample")],
    },
    SHARDS: {
        "read the files, check their CRC": [(Shards, "read")],
        "decode sound": [(soundfile.SoundFile, name) for name in ("__init__", "seek", "read", "close")],
        "scale and reflect sound": [(stills, "_sound"), (stills, "reflect")],
        "decode picture": [(stills, "read_picture")],
    },
}
WHOLE, REST = "whole clip", "everything else"
PROFILED = {"data_2_profile_0": BASELINE, "data_2_profile_1": SHARDS}


def stages(source: str) -> tuple[str, ...]:
    return (WHOLE, *STAGES[source], "augment", "collate", REST)


class Decoded:
    """A source whose clips are in memory: what is left to do is to augment and to collate."""

    def __init__(self, table: Table):
        self.rows, self.classes, self.sha256, self.name = table.rows, table.classes, table.sha256, table.name
        self.clips = [table.read(index) for index in range(len(table))]

    def read(self, index: int, **window) -> Clip:
        return self.clips[index]


class Stopwatch:
    """Seconds in each stage, without those of the stages that it calls."""

    def __init__(self):
        self.seconds, self.inner = defaultdict(float), [0.0]

    def around(self, stage: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            found = self._timed(stage, lambda: function(*args, **kwargs))
            return self._steps(stage, found) if isinstance(found, Generator) else found

        return timed

    def _steps(self, stage: str, found: Generator) -> Generator:
        while (item := self._timed(stage, lambda: next(found, None))) is not None:
            yield item

    def _timed(self, stage: str, call: Callable) -> object:
        self.inner.append(0.0)
        begin = time.perf_counter()
        try:
            return call()
        finally:
            spent = time.perf_counter() - begin
            self.seconds[stage] += spent - self.inner.pop()
            self.inner[-1] += spent


@pytest.fixture(scope="module")
def sources(tmp_path_factory, progress):
    progress("making clips and shards")
    root = tmp_path_factory.mktemp("data")
    synthesize(root / "made", Settings(layout="folder", clips=CLIPS, size=256, seconds=10.0, fps=25))
    tables = []
    for width, height in ((340, 256), (640, 360)):
        folder = root / f"{height}"
        folder.mkdir()
        for number, path in enumerate(find_videos(root / "made")):
            transcode(path, folder / f"{number:02d}.mp4", width, height)
        tables.append(data.read("folder", folder))
    table = tables[0]
    for sound in ("flac", "wav"):
        data.pack(table, root / sound, sound=sound)
    shards = Shards(root / "flac")
    by_id = {row.id: index for index, row in enumerate(table.rows)}
    for index, row in enumerate(shards.rows):
        # Both decoded from the beginning: AAC fills bands with noise that depends on where decoding begins.
        ours, theirs = (
            source.read(i, start=0.0, duration=9.9) for source, i in ((shards, index), (table, by_id[row.id]))
        )
        error = (ours.waveform - theirs.waveform).abs().max().item()
        assert error < 1e-4, f"{row.id}: the shard's sound is off by {error:.1e}"
    return dict(zip(ROWS, (*tables, shards, Shards(root / "wav"), Decoded(table)), strict=True))


def transcode(source: Path, target: Path, width: int, height: int) -> None:
    """The clip in the frame size and with the settings that encoders choose by themselves."""
    with av.open(str(source)) as given, av.open(str(target), "w") as output:
        video, audio = output.add_stream("libx264", rate=25), output.add_stream("aac", rate=44100, layout="stereo")
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        resampler = av.AudioResampler("fltp", "stereo", 44100, audio.frame_size or 1024)
        for frame in given.decode(video=0, audio=0):
            if isinstance(frame, av.VideoFrame):
                packets = video.encode(frame.reformat(width, height, "yuv420p"))
            else:
                packets = [packet for part in resampler.resample(frame) for packet in audio.encode(part)]
            output.mux(packets)
        for part in resampler.resample(None):
            output.mux(audio.encode(part))
        output.mux([*video.encode(None), *audio.encode(None)])


def batches(source) -> Callable:
    """A call that loads the next batch, without worker processes."""
    training = ClipLoader(source, BATCH, train=True)
    return lambda: next(iter(training))


@pytest.fixture(scope="module")
def section(request, sources, progress, publish):
    """One table, measured whole on one thread: its title, and for each row its results and recorded times."""
    source, threads = PROFILED.get(request.param), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made, times = profile(source, sources[source], progress) if source else rate(sources, progress)
        publish(request.param, made)
    finally:
        torch.set_num_threads(threads)
    return made["title"], {row["name"]: (row, times[row["name"]]) for row in made["rows"]}


def rate(sources, progress) -> tuple[dict, dict[str, list[float]]]:
    calls = {name: batches(source) for name, source in sources.items()}
    for call in calls.values():
        call()
    title = "Loading clips for training: 224 x 224 pixels, 3 s, one core"
    times = measure.in_turns(calls, torch.device("cpu"), progress=lambda text: progress(title, text))
    rows = {
        name: {"name": name, "per_second": BATCH / row["seconds"]["median"]} | row
        for name, row in measure.summarise(times).items()
    }
    training = next(pass_ for pass_ in encoder.PASSES if pass_.training)
    consumed = GPU_FLOPS / training.flop(encoder.ROWS["dense, ours"])
    cores = {name: consumed / row["per_second"] for name, row in rows.items()}
    notes = [
        "The clips: 10 s, 25 frames a second, H.264 with a keyframe every 250, stereo AAC at 44.1 kHz. Shards: 4 "
        "frames a second. Everything up to the batch of normalised pictures and waveforms; files are in the page "
        "cache.",
        "memory, decoded: frame and sound are there, they are only augmented and collated.",
        f"For scale: a GPU that trains the encoder on masked input at {GPU_FLOPS / 1e12:.0f} TFLOP/s (assumed) takes "
        f"{consumed:,.0f} videos/s. That is the work of {cores[SHARDS]:.0f} such cores with shards and of "
        f"{cores[BASELINE]:.0f} with video files.",
    ]
    return table(title, rows, BASELINE, notes), times


def profile(name: str, source, progress) -> tuple[dict, dict[str, list[float]]]:
    title = f"Where the time of a clip goes: {name}"
    training = data.clips(source, train=True)
    times, stage_of = defaultdict(list), SimpleNamespace(collate=lambda items: collate(source, items))

    def load(epoch: int):
        torch.manual_seed(epoch)
        return stage_of.collate([Attempt(training[index], [], 1) for index in range(BATCH)])

    load(0)
    functions = [(stage, *function) for stage, functions in STAGES[name].items() for function in functions]
    functions += [("augment", training, "transform"), ("collate", stage_of, "collate")]
    for epoch in range(ROUNDS):
        progress(title, f"round {epoch + 1}")
        watch = Stopwatch()
        with ExitStack() as patched:
            for stage, owner, function in functions:
                timed = watch.around(stage, getattr(owner, function))
                patched.enter_context(mock.patch.object(owner, function, timed))
            watch.around(REST, load)(epoch)
        for stage in stages(name)[1:]:
            times[stage].append(watch.seconds[stage] / BATCH)
        times[WHOLE].append(sum(watch.seconds.values()) / BATCH)
    times = {stage: times[stage] for stage in stages(name)}
    rows = {stage: {"name": stage} | row for stage, row in measure.summarise(times).items()}
    notes = ["Seconds for a clip, each stage without those it calls. augment: crop, flip, float, normalise."]
    return table(title, rows, WHOLE, notes), times


def table(title: str, rows: dict[str, dict], baseline: str, notes: list[str]) -> dict:
    units = {"seconds": "s", "per_second": "clips/s on one core, at the median time", "time_ratio": "to the baseline's"}
    return {
        "title": title, "batch": BATCH, "dtype": "float32", "baseline": baseline, "units": units,
        "rows": list(rows.values()), "notes": notes,
    }  # fmt: skip


@pytest.mark.parametrize("section", ["data_1_loading"], indirect=True)
@pytest.mark.parametrize("row", ROWS)
def test_loading(section, row, replay):
    title, rows = section
    replay(*rows[row], group=title)


@pytest.mark.parametrize("section", ["data_2_profile_0"], indirect=True)
@pytest.mark.parametrize("row", stages(PROFILED["data_2_profile_0"]))
def test_profile_of_a_video_file(section, row, replay):
    title, rows = section
    replay(*rows[row], group=title)


@pytest.mark.parametrize("section", ["data_2_profile_1"], indirect=True)
@pytest.mark.parametrize("row", stages(PROFILED["data_2_profile_1"]))
def test_profile_of_shards(section, row, replay):
    title, rows = section
    replay(*rows[row], group=title)
