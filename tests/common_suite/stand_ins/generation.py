"""Stands in for `tests/generation/test_utils.py`.

The model mixin asks whether a tester inherits this class, and wants that it does so only for models that generate.
"""


class GenerationTesterMixin:
    pass
