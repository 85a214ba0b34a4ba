# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The pictures of this package; the only importer of matplotlib."""

from vitreg_hf.analysis.figures.maps import attention_figure as attention_figure
from vitreg_hf.analysis.figures.training import training_curve as training_curve
