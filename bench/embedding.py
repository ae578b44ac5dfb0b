"""What features of many hours of video cost: `python -m bench.embedding FOLDER` writes results/embedding.json and .md.

Videos are made in FOLDER. `--only PART,...` measures some parts; entries of others stay. On two cores: decoding 1
minute, folder 4, files 1, long 17 (a video of two hours, by ViT-B), killed 2.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from avfusion import DeepAVFusion, Embedder, EncoderConfig, Features, save_encoder
from avfusion.embedding.decode import decoded
from avfusion.files import write_json, write_text, writing
from avfusion.media.reader import read_windows
from avfusion.media.transforms import image_pixels
from avfusion.media.windows import Plan
from bench import measure

PATH = Path(__file__).parent / "results" / "embedding.json"
CPU = torch.device("cpu")
SMALL = EncoderConfig(dim=64, depth=1, num_heads=2, image_size=(64, 64), audio_size=(64, 192), fusion="dense")


def video(
    path: Path, seconds: int, width: int, height: int, fps: int, preset: str = "veryfast", rate: int = 48000
) -> str:
    """H.264 and AAC: a photograph-like texture that moves under grain, and noise. Nothing, where it is there."""
    if path.exists():
        return str(path)
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (height // 8 + 40, width // 8 + 40, 3), np.uint8)
    grain = [random.normal(0, 3, (height, width, 1)).astype(np.int16) for _ in range(8)]
    texture = av.VideoFrame.from_ndarray(coarse, format="rgb24").reformat(width + 320, height + 320)
    texture = texture.to_ndarray(format="rgb24")
    still = fps <= 10  # hours of it: a new picture a second
    with writing(path) as part, av.open(str(part), "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=fps, options={"preset": preset, "crf": "23", "threads": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        sound, samples = output.add_stream("aac", rate=rate, layout="mono"), 0
        noise = random.normal(0, 0.1, (64, 1, 1024)).astype(np.float32)
        for number in range(seconds * fps):
            moment = number // fps * fps if still else number
            x, y = int(150 + 140 * np.sin(moment / 20)), int(150 + 140 * np.sin(moment / 33))
            if not still or number == moment:
                picture = np.clip(texture[y : y + height, x : x + width] + grain[number % 8], 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            output.mux(stream.encode(frame))
            while samples < (number + 1) * rate // fps:
                heard = av.AudioFrame.from_ndarray(noise[samples // 1024 % 64], format="fltp", layout="mono")
                heard.sample_rate, heard.pts, heard.time_base = rate, samples, Fraction(1, rate)
                output.mux(sound.encode(heard))
                samples += 1024
        output.mux([*stream.encode(None), *sound.encode(None)])
    return str(path)


def in_turns(calls: dict[str, Callable[[], None]], rounds: int, per: int) -> dict[str, dict[str, float]]:
    """Seconds a window: median and quartiles."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            clock = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - clock) / per)
    places = {"q1": 0.25, "median": 0.5, "q3": 0.75}
    return {name: {key: round(float(np.quantile(found, place)), 5) for key, place in places.items()}
            for name, found in times.items()}  # fmt: skip


def decoding(folder: Path) -> dict:
    """One core: 1080p H.264 at 30 frames a second, a window a second."""
    path, threads = video(folder / "hd.mp4", 60, 1920, 1080, 30), torch.get_num_threads()
    torch.set_num_threads(1)

    def every_frame() -> None:
        with av.open(path) as container:
            container.streams.video[0].thread_count = 1
            for _ in container.decode(video=0):
                pass

    calls = {
        "ours, windows": lambda: list(read_windows(path, Plan(every=1.0), transform=image_pixels())),
        "PyAV, every frame decoded": every_frame,
    }
    try:
        from torchcodec.decoders import VideoDecoder

        moments = [second + 1.5 for second in range(57)]
        calls["torchcodec, frames"] = lambda: VideoDecoder(path, num_ffmpeg_threads=1).get_frames_played_at(moments)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec is left out: {str(error).splitlines()[0]}")
    found = in_turns(calls, 3, 57)
    torch.set_num_threads(threads)
    ours = found["ours, windows"]["median"]
    return {"video": "1920x1080, 30 fps, H.264 veryfast, AAC 48 kHz", "seconds a window": found,
            "windows/s a core": round(1 / ours, 1)}  # fmt: skip


def folders(folder: Path) -> dict:
    """What a folder costs beside the model's own time: ViT-B, float32, batches of 8, a window a clip of 10 s."""
    sizes = {f"32 clips of {width}x{height}, 25 fps, 10 s, one keyframe": (width, height)
             for width, height in ((640, 360), (340, 256))}  # fmt: skip
    return {name: folder_of(folder / f"clips-{size[0]}", *size) for name, size in sizes.items()}


def folder_of(folder: Path, width: int, height: int) -> dict:
    clips = [video(folder / f"{number:02d}.mp4", 10, width, height, 25) for number in range(32)]
    torch.manual_seed(0)
    embedder = Embedder(DeepAVFusion(EncoderConfig(fusion="dense")), windows={"batch_size": 8})
    batches = list(decoded(embedder.decoder, clips))

    def whole(workers: int) -> None:
        for batch in decoded(embedder.decoder, clips, workers):
            embedder(batch)

    found = in_turns({
        "the model alone": lambda: [embedder(batch) for batch in batches],
        "decoding alone": lambda: list(decoded(embedder.decoder, clips)),
        "all, one worker": lambda: whole(1), "all, in one process": lambda: whole(0),
    }, 3, len(clips))  # fmt: skip
    alone = found["the model alone"]["median"]
    over = {name: round(found[name]["median"] / alone, 3) for name in found if "all" in name}
    return {"model": "ViT-B, dense, fp32, B = 8", "seconds a clip": found, "over the model alone": over}


def memory_of(root: Path, name: str, *options: str) -> dict:
    """Of `avfusion embed` in one process: what it holds with the model loaded, and its peak from then on.

    Loading takes more than either: the kernel's high-water mark is set back when the manifest appears.
    """
    out = root / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "avfusion", "embed", *options, "--workers", "0", "--out", str(out)]
    clock, loaded, peak = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, marks = Path(f"/proc/{process.pid}/status"), Path(f"/proc/{process.pid}/clear_refs")
    while process.poll() is None:
        held = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in held:  # not of a process that has just ended
            if not loaded and (out / "_manifest.json").exists():
                marks.write_text("5")
                loaded = int(held["VmRSS"].split()[0]) / 1024
            elif loaded:
                peak = int(held["VmHWM"].split()[0]) / 1024
        time.sleep(0.02)
    seconds, rows = time.perf_counter() - clock, len(Features.load(out).clips)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
    return {"rows": rows, "seconds": round(seconds, 1), "rows/s": round(rows / seconds, 2),
            "MiB, the model loaded": round(loaded), "MiB, peak": round(peak),
            "MiB above the model": round(peak - loaded)}  # fmt: skip


def encoder(folder: Path, name: str, config: EncoderConfig) -> list[str]:
    torch.manual_seed(0)
    save_encoder(DeepAVFusion(config), folder / f"{name}.safetensors")
    return ["--checkpoint", str(folder / f"{name}.safetensors")]


def short_clips(folder: Path, count: int) -> str:
    """A list of clips of 3 s."""
    clips = [video(folder / "many" / f"{number:04d}.mp4", 3, 64, 64, 10, rate=16000) for number in range(count)]
    (folder / f"{count}.txt").write_text("\n".join(clips))
    return f"@{folder / f'{count}.txt'}"


def many_files(folder: Path) -> dict:
    """By a small model, beside which the growth would be seen."""
    small = encoder(folder, "small", SMALL)
    return {
        f"{count} files": memory_of(folder, str(count), short_clips(folder, count), *small) for count in (100, 1000)
    }


def long_files(folder: Path) -> dict:
    """A window a second, by ViT-B in bfloat16."""
    found, options = {}, ["--every", "1", "--dtype", "bf16", *encoder(folder, "vit-b", EncoderConfig(fusion="dense"))]
    for name, seconds in (("2 minutes", 120), ("2 hours", 7200)):
        path = video(folder / f"{seconds}.mp4", seconds, 320, 180, 10, "ultrafast", 16000)
        found[name] = memory_of(folder, str(seconds), path, *options)
    return found


def killed(folder: Path) -> dict:
    """500 clips, killed ten times at random, row by row against a run that is left alone."""
    small = encoder(folder, "small", SMALL)
    command = [sys.executable, "-m", "avfusion", "embed", short_clips(folder, 500), *small, "--at", "0,0.5,1",
               "--shard-rows", "16", "--out"]  # fmt: skip
    for name in ("clean", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    subprocess.run([*command, str(folder / "clean")], check=True)
    chance, rows = random.Random(0), []
    for _ in range(10):
        process = subprocess.Popen([*command, str(folder / "killed")], start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(chance.uniform(2.5, 5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        rows.append(len(Features.load(folder / "killed").clips) if list((folder / "killed").glob("*.parquet")) else 0)
    subprocess.run([*command, str(folder / "killed")], check=True)
    clean, resumed = Features.load(folder / "clean"), Features.load(folder / "killed")
    names = ("clips", "starts", "ends", "frame_times")
    return {"rows": len(clean.clips), "rows after each kill": rows,
            "files, times and order equal": all(getattr(clean, name) == getattr(resumed, name) for name in names),
            "largest difference of a feature": (clean.pooled - resumed.pooled).abs().max().item()}  # fmt: skip


def searching(_: Path) -> dict:
    """The 200 nearest of 200,000 rows in memory, as `avfusion search` asks, and by FAISS's exact index."""
    rows = torch.nn.functional.normalize(torch.randn(200_000, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    calls = {"torch": lambda: (rows @ rows[7]).topk(200)}
    try:
        import faiss

        index = faiss.IndexFlatIP(768)
        index.add(rows.numpy())
        calls["FAISS, filled before"] = lambda: index.search(rows[7:8].numpy(), 200)
        calls["FAISS, filling it"] = lambda: faiss.IndexFlatIP(768).add(rows.numpy())
    except ImportError as error:
        print(f"FAISS is left out: {error}")
    return {"seconds": in_turns(calls, 5, 1)}


PARTS = {"decoding": decoding, "folder": folders, "files": many_files, "long": long_files, "killed": killed,
         "search": searching}  # fmt: skip


def section(found: dict) -> list[str]:
    """Rows of numbers as a table, what is deeper under its name, the rest as it is."""
    rows = {name: row for name, row in found.items() if isinstance(row, dict)}
    lines = [f"- {name}: {value}" for name, value in found.items() if name not in rows]
    if rows and not any(isinstance(cell, dict) for row in rows.values() for cell in row.values()):
        columns = list(next(iter(rows.values())))
        lines += ["", f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]
        return lines
    for name, row in rows.items():
        lines += ["", f"**{name}**", "", *section(row)]
    return lines


def markdown(results: dict) -> str:
    about = "By `python -m bench.embedding FOLDER`. Memory: resident, one process, highest once the model is loaded."
    lines = ["# Features of many hours of video", "", about, "", f"![what it costs]({PATH.stem}.png)"]
    for name, entry in results.items():
        how = ", ".join(f"{key} {entry[key]}" for key in ("date", "commit", "threads"))
        lines += ["", f"## {name}", "", f"{entry['device']}, {how}, torch {entry['versions']['torch']}", ""]
        lines += section(entry["measured"])
    return "\n".join(lines) + "\n"


def draw(results: dict) -> None:
    """What decoding costs, and memory whatever there is to do."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    times = results.get("decoding", {}).get("measured", {}).get("seconds a window", {})
    left.barh(list(times), [1000 * time["median"] for time in times.values()], color="#3182bd")
    left.set(title="1080p, a window a second, one core", xlabel="ms a window")
    held = {name: row for part in ("files", "long") for name, row in results.get(part, {}).get("measured", {}).items()}
    loaded = [row["MiB, the model loaded"] for row in held.values()]
    right.barh(list(held), loaded, color="#bdbdbd", label="the model loaded")
    right.barh(list(held), [row["MiB above the model"] for row in held.values()], left=loaded, color="#e6550d",
               label="above it")  # fmt: skip
    right.set(title="peak memory", xlabel="MiB; files: a small model, hours: ViT-B", xlim=(0, 1.4 * max(loaded) + 600))
    right.legend(loc="lower right")
    figure.savefig(PATH.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only.split(","):
        results = json.loads(PATH.read_text()) if PATH.exists() else {}
        print(name, flush=True)
        found = PARTS[name](args.folder.absolute())
        facts = {"device": measure.device_name(CPU)} | measure.environment(CPU)
        results[name] = facts | {"measured": found}
        write_json(PATH, results, indent=1)
        write_text(PATH.with_suffix(".md"), markdown(results))
        draw(results)
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
