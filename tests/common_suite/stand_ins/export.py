"""Stands in for `tests/exporters/test_export.py`: export each class along each route and compare with eager mode."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from parameterized import parameterized
from transformers.testing_utils import require_executorch, require_onnxruntime, require_onnxscript, torch_device

try:
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
    from transformers.exporters.utils import get_leaf_tensors

    MISSING = None
except ImportError as error:
    MISSING = f"not available: the exporters ({error})"

Inputs = dict[str, torch.Tensor]
_SHAPES = parameterized.expand([("static", False), ("dynamic", True)])


class ExportTesterMixin:
    @_SHAPES
    def test_torch_export(self, name: str, dynamic: bool) -> None:
        def check(model: Any, inputs: Inputs) -> None:
            exported = DynamoExporter().export(model, copy.deepcopy(inputs), config=DynamoConfig(dynamic=dynamic))
            self._compare(exported, model, inputs, tolerance=1e-4)
            if dynamic:
                twice = {name: value.repeat(2, 1, 1, 1) for name, value in inputs.items()}
                self._compare(exported, model, twice, tolerance=1e-4)

        self._for_each_class(check)

    @_SHAPES
    @require_onnxscript
    @require_onnxruntime
    def test_onnx_export(self, name: str, dynamic: bool) -> None:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        def check(model: Any, inputs: Inputs) -> None:
            exported = OnnxExporter().export(model, copy.deepcopy(inputs), config=OnnxConfig(dynamic=dynamic))
            self._compare(exported, model, inputs, tolerance=1e-3)

        self._for_each_class(check)

    @_SHAPES
    @require_executorch
    def test_executorch_export(self, name: str, dynamic: bool) -> None:
        from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

        def check(model: Any, inputs: Inputs) -> None:
            ExecutorchExporter().export(model, copy.deepcopy(inputs), config=ExecutorchConfig(dynamic=dynamic))

        self._for_each_class(check)

    def _for_each_class(self, check: Callable[[Any, Inputs], None]) -> None:
        """Call `check(model, inputs)` for each class of the family."""
        if MISSING:
            self.skipTest(MISSING)
        if not self.test_torch_exportable:
            self.skipTest("the tester says that the model cannot be exported")
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                check(model_class(config).to(torch_device).eval(), self._prepare_for_class(inputs, model_class))

    def _compare(self, exported: Any, model: Any, inputs: Inputs, tolerance: float) -> None:
        """Every tensor of the eager output must come out of the exported program, with the same name and values."""
        with torch.no_grad():
            expected = get_leaf_tensors(model(**copy.deepcopy(inputs)))
            got = _call(exported, copy.deepcopy(inputs))
        # An ONNX program of older versions returns values without names.
        unnamed = isinstance(got, (list, tuple))
        got = dict(zip(expected, got, strict=True)) if unnamed else get_leaf_tensors(got)
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name].to(value.device), value, atol=tolerance, rtol=tolerance)


def _call(exported: Any, inputs: Inputs) -> Any:
    """Run what an exporter returned: a callable, or (older versions) a `torch.export` program."""
    if isinstance(exported, torch.export.ExportedProgram):
        return exported.module()(**inputs)
    return exported(**inputs)
