"""Trains a run, to be killed while it does.

Run as `training_process.py` it forks, for every line it reads, a process that works on the run in that folder, writes its
number, and when it has ended, how. The first run it works on itself: what is imported then is there for all others, which
takes longer than the training.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "devtools")]

import pack  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
worker = pack.load("core.training.worker")

if __name__ == "__main__":
    worker.work(Path(sys.stdin.readline().strip()), "cpu")
    for folder in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # some optimisers print
            os._exit(worker.work(Path(folder.strip()), "cpu"))
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
