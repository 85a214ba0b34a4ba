# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What training examples are put together from: data, augmentation, optimisation, checkpoints, metrics, results.

There is no training loop here and no argument parser: both stand in the examples, where a reader looks for them.
"""
