# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""What a trained model looks at: `extract` asks the model, `figures` draws."""
