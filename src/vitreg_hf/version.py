# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The version, where building reads it without importing anything."""

__version__ = "0.1.0"
