"""Side by side (`pytest -n logical`): one thread a process, and what takes long first."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def pytest_collection_modifyitems(items):
    """Groups, which one process runs whole (--dist=loadgroup), take long: begun last, they would be waited for."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
