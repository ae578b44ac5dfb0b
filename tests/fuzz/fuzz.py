"""Changes the corpus of a target, led by the lines of this package that it reaches.

    python tests/fuzz/fuzz.py TARGET [FOLDER ...] [-max_total_time=60 ...]

by libFuzzer (Atheris). New inputs go to the first folder; `-help=1` tells the options. What ends in another error than
the target allows, crashes, or takes 20 s or 4 GB, is written to a file crash-..., timeout-... or oom-...
"""

import sys
import warnings

import atheris

with atheris.instrument_imports(include=["avfusion", "avfkernels"]):
    import targets
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")
target = targets.TARGETS[sys.argv.pop(1)]
atheris.Setup([sys.argv[0], "-timeout=20", "-rss_limit_mb=4000", *sys.argv[1:]], target)
atheris.Fuzz()
