# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Self-supervision as DINOv2 does it: crops, masks, heads, targets and losses that `examples/pretrain_dino.py` joins.

A student sees global and local crops of an image, with some patches of global crops masked, and predicts what a
teacher, its own moving average, sees in the whole global crops: of CLS against another crop (DINO), of masked patches
at their place (iBOT). Registers take part in attention, and no loss reads them.
Reference: Oquab et al., DINOv2 (arXiv 2304.07193); Darcet et al. (arXiv 2309.16588) train registers in this way.
"""
