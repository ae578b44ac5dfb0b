"""One process, workers, torchrun and Ray Data: the same rows."""

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import avfusion
from avfusion import Decoder, Embedder, Features
from avfusion.cli import main
from avfusion.embedding import decode
from avfusion.embedding.engines import join_cluster
from avfusion.embedding.store import read_manifest

from .test_store import CONFIG, write_set

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("made"), 6, longest=2)


def line(made, out, *options):
    return ["embed", str(made), "--checkpoint", str(made / "encoder.safetensors"), "--out", str(out), "--every", "0.5",
            "--batch-size", "3", "--shard-rows", "6", "--dtype", "fp32", *options]  # fmt: skip


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "features"
    assert main(line(made, out, "--workers", "0")) == 3
    return Features.load(out)


def assert_same_rows(found, expected):
    assert (found.clips, found.starts, found.frame_times) == (expected.clips, expected.starts, expected.frame_times)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=2e-5)
    assert [str(error) for error in found.failed] == [str(error) for error in expected.failed]


def test_rows_are_the_models_outputs(made, expected):
    model = avfusion.load_encoder(made / "encoder.safetensors")
    pooled = model.embed(made / "0.mp4")["pooled"]
    (row,) = Features.of([Embedder(model)({"file": [str(made / "0.mp4")]})], {}).pooled
    torch.testing.assert_close(row, pooled, rtol=0, atol=1e-5)
    rows = Embedder(model, windows={"every": 0.5, "batch_size": 3})({"file": [str(made / f"{n}.mp4") for n in (0, 2)]})
    some = [row for row, name in enumerate(expected.clips) if name.endswith(("0.mp4", "2.mp4"))]
    torch.testing.assert_close(torch.from_numpy(rows["fusion"]), expected.pooled[some, 2], rtol=0, atol=2e-5)


def test_what_cannot_be_read_is_a_row_that_is_no_number(made):
    embedder = Embedder(avfusion.load_encoder(made / "encoder.safetensors"), pooled=False)
    rows = embedder({"file": [str(made / "damaged.mp4"), str(made / "0.mp4")]})
    assert rows["reason"][0].startswith("not a video that can be opened")
    assert (rows["stream"][0], rows["reason"][1], list(rows["window"])) == ("file", "", [-1, 0])
    for name in ("image", "audio", "fusion", "x_image", "x_audio", "x_fusion"):
        assert np.isnan(rows[name][0]).all()
        assert np.isfinite(rows[name][1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(made, expected, dtype):
    embedder = Embedder(avfusion.load_encoder(made / "encoder.safetensors"), windows={"every": 0.5}, dtype=dtype)
    rows = embedder({"file": [str(made / "2.mp4")]})
    own = torch.from_numpy(np.stack([rows[name] for name in ("image", "audio", "fusion")], 1))
    reference = expected.pooled[[row for row, name in enumerate(expected.clips) if name.endswith("2.mp4")]]
    assert own.dtype == torch.float32
    assert 0 < (own - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize(("name", "value"), [("frames", 0), ("batch_size", 0), ("every", -1.0), ("count", 0)])
def test_arguments_of_a_decoder_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Decoder(CONFIG, **{name: value})


def test_workers(made, expected, tmp_path):
    assert main(line(made, tmp_path / "f", "--workers", "2")) == 3
    assert_same_rows(Features.load(tmp_path / "f"), expected)


def test_decoding_holds_few_batches(made):
    """Whatever the number of files: none is opened before its turn."""
    opened, reads = [], decode.read_windows

    def noted(path, *arguments, **options):
        opened.append(path)
        return reads(path, *arguments, **options)

    decode.read_windows = noted
    try:
        batches = Decoder(CONFIG, batch_size=2).batches([str(made / f"{n}.mp4") for n in range(6)])
        for count in range(1, 4):
            assert len(next(batches)["file"]) == 2
            assert len(opened) == 2 * count
    finally:
        decode.read_windows = reads


def die(self, files):
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def test_a_worker_that_dies_is_told_with_its_files(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode.Decoder, "_rows", lambda self, files: (next(files), die(self, files))[1])
    assert main(line(made, tmp_path / "f", "--workers", "1")) == 1
    told = capsys.readouterr().err
    assert "a worker has died" in told
    assert f"while it was reading {made / '0.mp4'} (" in told
    assert "Traceback" not in told


# Two processes of their own, which start torch.
def test_torchrun(made, expected, tmp_path):
    options = line(made, tmp_path / "f", "--workers", "0", "--threads", "1")
    names = [str(made / f"{n}.mp4") for n in range(6)]  # none fails: torchrun would make much of an exit status
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               "-m", "avfusion", "embed", *names, *options[2:]]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'f'}: 20 rows of 6 files" in done.stdout
    found = Features.load(tmp_path / "f")
    expected.failed, failed = [], expected.failed
    assert_same_rows(found, expected)
    expected.failed = failed
    manifest = read_manifest(tmp_path / "f")
    assert manifest["done"] == names
    assert {name[:3] for name in os.listdir(tmp_path / "f") if name.endswith(".parquet")} == {"000", "001"}
    assert main(line(made, tmp_path / "f")) == 3  # one process goes on where two have ended


@pytest.fixture(scope="module", autouse=True)
def handler():
    """Ray leaves one of its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    # Its workers import these tests' modules, too: what is sent to them names them.
    ray.init(num_cpus=2, num_gpus=1, log_to_driver=False, include_dashboard=False,
             runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})  # fmt: skip
    yield ray
    ray.shutdown()


NOWHERE = {"auto": "Could not find any running Ray instance", "nonsense": "Invalid address format: nonsense"}


@pytest.mark.parametrize(("address", "told"), NOWHERE.items())
def test_a_cluster_that_is_not_there(made, tmp_path, capsys, address, told):
    if pytest.importorskip("ray").is_initialized():
        pytest.fail("a cluster was left running")
    with pytest.raises(SystemExit) as ended:
        main(line(made, tmp_path / "f", "--engine", "ray", "--address", address))
    assert ended.value.code == 2
    assert f"--engine ray: {told}" in capsys.readouterr().err


def test_ray(made, expected, tmp_path, cluster):
    assert main(line(made, tmp_path / "f", "--engine", "ray", "--device", "cpu")) == 3
    assert_same_rows(Features.load(tmp_path / "f"), expected)
    assert main(line(made, tmp_path / "f", "--engine", "ray", "--device", "cpu")) == 3
    assert_same_rows(Features.load(tmp_path / "f"), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows that a cluster's GPU is asked for by its failure")
def test_embedders_take_the_gpus_of_a_cluster_where_this_machine_has_none(made, tmp_path, cluster, capfd):
    assert main(line(made, tmp_path / "f", "--engine", "ray", "--dtype", "auto")) == 1
    told = capfd.readouterr().err  # by torch for CUDA, or by one that knows none
    assert re.search("embed: error: Ray: .*(Found no NVIDIA driver|not compiled with CUDA)", told)
    assert read_manifest(tmp_path / "f")["made"]["computed"] == "bfloat16"


def test_devices_of_a_cluster(monkeypatch, cluster):
    assert (join_cluster(device="auto").type, join_cluster(device="cpu").type) == ("cuda", "cpu")
    monkeypatch.setattr(cluster, "cluster_resources", dict)
    assert join_cluster(device="auto").type == "cpu"
    with pytest.raises(ValueError, match="the cluster has no GPU"):
        join_cluster(device="cuda")


def test_ray_data_as_the_documentation_has_it(made, expected, cluster, tmp_path):
    model, paths = avfusion.load_encoder(made / "encoder.safetensors"), [str(made / f"{n}.mp4") for n in range(6)]
    files = cluster.data.from_items([{"file": path} for path in paths])
    windows = files.map_batches(Decoder(model.config, every=0.5), batch_size=1)
    embedder = {"fn_constructor_kwargs": {"model": model, "device": "cpu"}, "num_cpus": 1}
    rows = windows.map_batches(Embedder, batch_size=16, compute=cluster.data.ActorPoolStrategy(size=1), **embedder)
    rows.write_parquet(str(tmp_path / "rows"))
    frame = pytest.importorskip("pandas").read_parquet(tmp_path / "rows").sort_values(["file", "window"])
    assert frame.file.tolist() == expected.clips
    np.testing.assert_allclose(np.stack(frame.fusion), expected.pooled[:, 2], rtol=0, atol=2e-5)
