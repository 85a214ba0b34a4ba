# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The same command as `python -m vitreg_hf.cli`."""

import sys

from vitreg_hf.cli import main

sys.exit(main())
