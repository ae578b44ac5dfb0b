"""What files of tests share."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """As in the processes that tests start: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
