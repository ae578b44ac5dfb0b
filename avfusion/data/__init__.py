"""Public data sets, and any folder of videos, as batches of clips.

    table = avfusion.data.read("vggsound", "/data/vggsound", split="train")
    loader = avfusion.data.ClipLoader(table, batch_size=64, train=True, num_workers=8)
    for batch in loader:
        ...  # batch.image, batch.waveform, batch.label

docs/data.md tells the layouts, what happens to clips that fail, and how to pack shards and to resume.
"""

import importlib

# The public names and where they live: loaded on first use, as in avfusion itself.
_NAMES = {
    "Batch": "loader",
    "ClipLoader": "loader",
    "LAYOUTS": "layouts",
    "LayoutError": "table",
    "Row": "table",
    "Shards": "shards",
    "Table": "table",
    "clips": "samples",
    "pack": "packing",
    "read": "layouts",
    "semantic_masks": "pictures",
}

__all__ = sorted(_NAMES)


def __getattr__(name):
    if name not in _NAMES:
        raise AttributeError(f"module 'avfusion.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"avfusion.data.{_NAMES[name]}"), name)


def __dir__():
    return __all__
