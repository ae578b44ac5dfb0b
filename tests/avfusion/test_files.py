"""Files: one process at a time, whatever its end; the same bytes for the same content; limits."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from avfusion import files
from avfusion.files import Held, InUse, append_lines, read_json, save_tensors, writing

HOLD = """
import os, sys, time
from avfusion.files import Held
held = Held(sys.argv[1])
if os.fork() == 0:  # as the workers of a loader are
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_of_one_process_until_that_dies(tmp_path):
    """Its forked children may live on."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InUse, match=rf"^{tmp_path}: in use by process {process.pid} on .*: wait until it ends"):
            Held(tmp_path)
        process.kill()
        process.wait()
        with Held(tmp_path), pytest.raises(InUse, match="in use by this process"):
            Held(tmp_path)
        os.killpg(process.pid, signal.SIGKILL)  # the child
    Held(tmp_path).release()


def test_half_files_of_a_process_before_are_removed(tmp_path):
    """They are only its own: what is deeper, or of another name, stays."""
    for name in (".a.json.1.part", "pictures/.b.png.2.part", "checkpoints/.step-1.part/x", "c.part", "other/.d.3.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    Held(tmp_path, "pictures", "checkpoints", "nowhere").release()
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".lock", "c.part", "other/.d.3.part"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    with pytest.warns(UserWarning, match="cannot be locked .Function not implemented"):
        Held(tmp_path).release()


SAVE = """
import sys, torch
from avfusion.files import save_tensors
save_tensors(sys.argv[1], {"x": torch.arange(5.0), "y": torch.ones(2, 3).T}, dict.fromkeys("qwertz", 'ü "\\n'))
"""


def test_bug_saved_files_differed_in_the_order_of_their_metadata(tmp_path):
    """It is random in each process, and in each call."""
    metadata = dict.fromkeys("qwertz", 'ü "\n')
    tensors = {"y": torch.ones(2, 3).T, "x": torch.arange(5.0)}
    subprocess.run([sys.executable, "-c", SAVE, tmp_path / "other"], check=True)
    expected = (tmp_path / "other").read_bytes()
    for _ in range(8):
        save_tensors(tmp_path / "own", tensors, metadata)
        assert (tmp_path / "own").read_bytes() == expected
    with safe_open(tmp_path / "own", "pt") as file:
        assert file.metadata() == metadata | {"format": "pt"}
        assert torch.equal(file.get_tensor("y"), tensors["y"])


def test_bug_a_line_after_one_that_was_cut_off_was_lost_with_it(tmp_path):
    path = tmp_path / "log.jsonl"
    for text in ("", '{"a": 1}\n', '{"a": 1}\n{"b'):
        path.write_text(text)
        append_lines(path, ["1", "2"])
        assert path.read_text().splitlines() == [*text.splitlines(), "1", "2"]
        assert path.read_text().endswith("2\n")


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a.png'"), writing(tmp_path / "a.png"):
        full()
    assert list(tmp_path.iterdir()) == []


def test_json_is_read_within_limits(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([1]))
    assert read_json(path) == [1]
    for text, told in (("[1", "no valid JSON: Expecting"), ("[" * 200_000, "it is nested too deeply"),
                       ("\udcff", "no valid JSON: 'utf-8' codec")):  # fmt: skip
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=rf"^{path}: .*{told}"):
            read_json(path)
    monkeypatch.setattr(files, "JSON_BYTES", 1000)
    path.write_text(" " * 200_000)
    with pytest.raises(ValueError, match="200,000 bytes, more than the 1,000 that such a file may have"):
        read_json(path)


def test_a_folder_names_its_holder_while_it_is_held(tmp_path):
    with Held(tmp_path) as held:
        held.file.flush()
    assert (tmp_path / ".lock").read_text() == ""  # the same bytes whoever had it
