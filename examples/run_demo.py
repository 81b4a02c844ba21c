"""Run demo.py under torchrun: one process per GPU, or four on the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

processes = torch.cuda.device_count() or 4
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the one process of the comparison may not have them to itself
demo = str(Path(__file__).with_name("demo.py"))
torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
os.execv(sys.executable, [sys.executable, *torchrun, demo, *sys.argv[1:]])
