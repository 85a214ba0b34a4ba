# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other sources, as ViTReg and back: one file per source, tables of names that are read both ways."""
