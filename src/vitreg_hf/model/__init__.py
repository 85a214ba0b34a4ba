# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The family itself. Flat and self-contained: these files also travel beside the weights as remote code."""
