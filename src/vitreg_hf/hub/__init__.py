# Copyright 2026 The vitreg_hf authors. Licensed under the Apache License, Version 2.0.
"""From the facts of a training to a model card, and from a folder to a repository on the Hub."""
