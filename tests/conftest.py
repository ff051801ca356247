"""Puts the repository root on the path, so that `import k2` finds this tree and no other."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and one gives the same bits everywhere
