"""One library's training loop in a process of its own, fed and timed by `feed.Feed`. Started by `training_step.py`; see `feed.py` for what it says.

python worker.py LIBRARY BATCHES.npy '{"kind": "topk", "d_model": 768, ...}' --threads 2
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
from contextlib import suppress

import numpy
import torch
from feed import Feed, Stop, Task


def make_torchvision_importable() -> None:
    """Some libraries import torchvision, though nothing here uses it. Its wheels on PyPI are built for CUDA: beside a CPU build of torch its
    import fails, since two operators that it describes are not there. Declared, it does not miss them."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", help="the module with_LIBRARY.py beside this file")
    parser.add_argument("batches", help="a NumPy file [n, tokens, d_model]")
    parser.add_argument("task", help="the fields of feed.Task as JSON")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    make_torchvision_importable()
    adapter = importlib.import_module(f"with_{arguments.library}")
    batches = [torch.from_numpy(batch) for batch in numpy.load(arguments.batches)]
    with suppress(Stop):
        adapter.train(Task(**json.loads(arguments.task)), Feed(batches, sys.stdin, answers))


if __name__ == "__main__":
    main()
