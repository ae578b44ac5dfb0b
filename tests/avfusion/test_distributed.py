"""Which device a process takes, as on machines that have several."""

import pytest
import torch

from avfusion import distributed


@pytest.mark.parametrize(
    ("device", "several", "expected"),
    [(None, False, "cuda:0"), ("auto", True, "cuda:3"), ("cuda", True, "cuda:3"), ("cuda:1", False, "cuda:1"),
     (torch.device("cuda", 2), False, "cuda:2"), ("cpu", False, "cpu")],
)  # fmt: skip
def test_every_process_takes_a_gpu_of_its_own(monkeypatch, device, several, expected):
    chosen, joined = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch.distributed, "init_process_group", joined.append)
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")) if several else ():
        monkeypatch.setenv(name, value)
    assert str(distributed.start(device)) == expected
    assert chosen == [expected] * (expected != "cpu")
    assert joined == ["nccl"] * several


def test_without_a_gpu_a_process_computes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.start() == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size(), distributed.gather([1, 2])) == (0, 1, [1, 2])
