# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""One process of several that computes targets of its tokens: `python targets_of_a_process.py RANK PROCESSES FOLDER`.

It loads the file of the targets alone, so that it needs nothing but torch.
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[3]


def load_targets():
    file = ROOT / "src" / "vitreg_hf" / "training" / "self_supervision" / "targets.py"
    spec = importlib.util.spec_from_file_location("targets", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=processes)
    scores = torch.load(folder / f"scores_{rank}.pt", weights_only=True)
    targets = load_targets()
    centring, sinkhorn = targets.Centring(scores.shape[1]), targets.SinkhornKnopp()
    for _ in range(2):
        centred, balanced = centring(scores, 0.1), sinkhorn(scores, 0.1)
    torch.save({"centred": centred, "balanced": balanced, "centre": centring.centre}, folder / f"targets_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
