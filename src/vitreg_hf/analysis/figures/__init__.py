# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""The pictures of this package; the only importer of matplotlib."""

from vitreg_hf.analysis.figures.augmentations import Sample as Sample, augmentation_sheet as augmentation_sheet
from vitreg_hf.analysis.figures.maps import attention_figure as attention_figure
from vitreg_hf.analysis.figures.sinks import (
    head_at_rest as head_at_rest,
    kind_curves as kind_curves,
    kind_heads as kind_heads,
    logit_maps as logit_maps,
    outlier_tokens as outlier_tokens,
    text_channel_curves as text_channel_curves,
    text_sink_curves as text_sink_curves,
)
from vitreg_hf.analysis.figures.training import step_curves as step_curves, training_curve as training_curve
