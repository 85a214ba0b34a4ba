# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Registers for models that were trained without them: found, added, tuned, and whether they were needed at all."""
