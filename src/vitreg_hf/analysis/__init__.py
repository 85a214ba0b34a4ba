# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""Instruments for artifacts, registers and sinks: `extract` asks, nouns compute, `figures` draw, `report` writes."""
