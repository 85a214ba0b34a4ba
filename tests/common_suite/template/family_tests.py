"""Transformers' common test mixins, aimed at the family that this file's folder is named after."""

import copy
import importlib
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import tests.test_image_processing_common as image_processing
import tests.test_pipeline_mixin as pipeline_mixin
import torch
import transformers
from tests.families import FAMILIES, TINY
from tests.images import NUM_LABELS, ImageModelTester
from tests.test_backbone_common import BackboneTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

FAMILY = FAMILIES[Path(__file__).resolve().parent.name]
CONFIG = FAMILY.load(FAMILY.config)
HEADS = FAMILY.heads()
MODEL_CLASSES = tuple(FAMILY.load(name) for name in HEADS.values())
PROCESSORS = {backend: FAMILY.load(name) for backend, name in FAMILY.image_processors.items()}

# The mixins and pipelines recognise a head by its class name in these tables, to which `Auto*.register` does not add.
_NAME_TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedImageModeling": "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoBackbone": "MODEL_FOR_BACKBONE_MAPPING_NAMES",
}
for _auto, _name in HEADS.items():
    getattr(modeling_auto, _NAME_TABLES[_auto]).setdefault(FAMILY.model_type, _name)


def optional_mixin(module: str, name: str) -> type:
    """The mixin `tests.<module>.<name>`; where this version lacks it, a class with one test that skips and says so."""
    try:
        return getattr(importlib.import_module(f"tests.{module}"), name)
    except (ImportError, AttributeError) as error:
        reason = f"not available: {name} ({error})"

        def test_mixin_is_available(self: unittest.TestCase) -> None:
            self.skipTest(reason)

        return type(name, (), {"test_mixin_is_available": test_mixin_is_available})


MemoryCleanupMixin = optional_mixin("test_memory_cleanup_mixin", "MemoryCleanupMixin")
TrainingTesterMixin = optional_mixin("test_training_mixin", "TrainingTesterMixin")
# With `parallel`, which aims both mixins at images.
FSDPTesterMixin = optional_mixin("parallel", "FSDPTesterMixin")
TensorParallelTesterMixin = optional_mixin("parallel", "TensorParallelTesterMixin")


class FamilyTest:
    """Gives each test its `model_tester`, and skips what the family says does not apply."""

    all_model_classes = MODEL_CLASSES
    model_tester: Any = None

    def setUp(self) -> None:
        super().setUp()
        test = self._testMethodName
        if test in FAMILY.not_applicable:
            self.skipTest(FAMILY.not_applicable[test])
        self.model_tester = ImageModelTester(FAMILY, test)


def processor_arguments(crop: int | None = None) -> dict[str, Any]:
    """Arguments of the image processor under test, if wanted for crops of another size."""
    arguments = copy.deepcopy(dict(FAMILY.processor_arguments))
    if crop is not None:
        arguments |= {"size": {"shortest_edge": crop}, "crop_size": {"height": crop, "width": crop}}
    return arguments


class ModelTest(FamilyTest, ModelTesterMixin, pipeline_mixin.PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {task: FAMILY.load(name) for task, name in FAMILY.pipelines().items()}
    test_resize_embeddings = False
    # The mixin reads a model's year off its config file's copyright line, and would skip one that has none.
    test_can_init_all_missing_weights_before_2023 = True

    @classmethod
    def setUpClass(cls) -> None:
        """Have the pipeline mixin load tiny models from a local folder, in place of the Hub."""
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        names = [processor.__name__ for processor in PROCESSORS.values()]
        summary = {}
        for name in set(FAMILY.pipelines().values()):
            saved = Path(folder.name, FAMILY.model_type, name)
            torch.manual_seed(0)
            ImageModelTester(FAMILY).build(name).save_pretrained(saved)
            PROCESSORS["torchvision"](**processor_arguments(crop=TINY["image_size"])).save_pretrained(saved)
            summary[name] = {"tokenizer_classes": [], "processor_classes": names}
        replaced = {
            "TRANSFORMERS_TINY_MODEL_PATH": folder.name,
            "tiny_model_summary": summary,
            # It takes the processor classes from here, by name.
            "transformers_module": types.SimpleNamespace(**dict(zip(names, PROCESSORS.values(), strict=True))),
        }
        for attribute, value in replaced.items():
            patch = mock.patch.object(pipeline_mixin, attribute, value)
            patch.start()
            cls.addClassCleanup(patch.stop)

    def test_config(self) -> None:
        ConfigTester(self, config_class=CONFIG, has_text_modality=False, hidden_size=64).run_common_tests()

    def test_inputs_embeds(self) -> None:
        """The mixin's version feeds token embeddings; see `not_applicable`."""

    def test_model_get_set_embeddings(self) -> None:
        """The mixin's version wants an `nn.Embedding`; here the input layer embeds patches."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            assert isinstance(model.get_output_embeddings(), torch.nn.Linear | None)

    def test_output_shapes(self) -> None:
        tester = self.model_tester
        images, batch = tester.images(), tester.batch_size
        with torch.no_grad():
            hidden = tester.build(FAMILY.model)(images).last_hidden_state
            assert hidden.shape == (batch, tester.seq_length, tester.hidden_size)
            classifier = tester.build(FAMILY.image_classification, num_labels=NUM_LABELS)
            output = classifier(images, labels=tester.labels())
            assert (output.logits.shape, output.loss.shape) == ((batch, NUM_LABELS), ())
            if FAMILY.masked_image_modeling:
                masked = torch.rand(batch, tester.num_patches, device=torch_device) < 0.5
                output = tester.build(FAMILY.masked_image_modeling)(images, bool_masked_pos=masked)
                assert (output.reconstruction.shape, output.loss.shape) == (images.shape, ())
            if FAMILY.semantic_segmentation:
                labels = torch.randint(NUM_LABELS, (batch, *images.shape[2:]), device=torch_device)
                model = tester.build(FAMILY.semantic_segmentation, num_labels=NUM_LABELS)
                output = model(images, labels=labels)
                assert (output.logits.shape[:2], output.loss.shape) == ((batch, NUM_LABELS), ())

    def test_grey_images(self) -> None:
        model = self.model_tester.build(FAMILY.image_classification, num_channels=1, num_labels=NUM_LABELS)
        with torch.no_grad():
            logits = model(self.model_tester.images(num_channels=1)).logits
        assert logits.shape == (self.model_tester.batch_size, NUM_LABELS)

    def test_auto_classes(self) -> None:
        """Each Auto class builds and loads the class it was registered with."""
        for auto_name, name in HEADS.items():
            auto, expected = getattr(transformers, auto_name), FAMILY.load(name)
            model = auto.from_config(self.model_tester.get_config())
            assert type(model) is expected
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                assert type(AutoConfig.from_pretrained(folder)) is CONFIG
                # `AutoBackbone.from_pretrained` asks the Hub about a local folder, and raises.
                loader = expected if auto_name == "AutoBackbone" else auto
                assert type(loader.from_pretrained(folder)) is expected


class BackboneTest(FamilyTest, BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (FAMILY.load(FAMILY.backbone),)
    config_class = CONFIG

    def test_feature_map_shapes(self) -> None:
        tester = self.model_tester
        with torch.no_grad():
            maps = tester.build(FAMILY.backbone, out_indices=[1, 2])(tester.images()).feature_maps
        expected = (tester.batch_size, tester.hidden_size, tester.grid, tester.grid)
        assert [feature_map.shape for feature_map in maps] == [expected, expected]


class ProcessorTester(image_processing.ImageProcessingTester):
    """Describes processor and inputs to the image processing mixin; sets all itself, since 5.17's base sets none."""

    batch_size, num_channels, num_labels = 7, 3, 4
    min_resolution, max_resolution = 30, 400

    def __init__(self, parent: Any) -> None:
        self.parent = parent
        self.image_processing_classes = PROCESSORS
        for name, value in processor_arguments().items():
            setattr(self, name, value)

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return processor_arguments()

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict[str, Any], dict[str, int]]:
        size = self.crop_size
        logits = torch.randn(self.batch_size, self.num_labels, size["height"], size["width"])
        outputs = transformers.modeling_outputs.SemanticSegmenterOutput(logits=logits)
        return {"outputs": outputs}, {"num_labels": self.num_labels, **size}


_SEGMENTS = any(hasattr(processor, "post_process_semantic_segmentation") for processor in PROCESSORS.values())
_SEGMENTATION_MIXINS = (image_processing.PostProcessSemanticSegmentationTestMixin,) if _SEGMENTS else ()


class ImageProcessingTest(*_SEGMENTATION_MIXINS, image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ProcessorTester

    if not hasattr(image_processing.ImageProcessingTestMixin, "image_processor_tester_class"):  # 5.17

        def setUp(self) -> None:
            self.image_processor_tester = ProcessorTester(self)
            self.image_processing_classes = PROCESSORS
            self.image_processor_dict = processor_arguments()
            if self._testMethodName == "test_call_numpy_4_channels":
                self.image_processor_dict["do_convert_rgb"] = False  # as newer versions of the test say themselves


class TrainingTest(FamilyTest, TrainingTesterMixin, unittest.TestCase):
    """The mixin trains on text only: tell it so, and hand it images where it expects tokens."""

    trained_class = FAMILY.image_classification
    labels_per_image: tuple[int, ...] = ()

    def setUp(self) -> None:
        super().setUp()
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model_tester = ImageModelTester(FAMILY, num_labels=NUM_LABELS, **no_dropout)
        get_config = self.model_tester.get_config

        def with_vocabulary() -> Any:
            config = get_config()
            config.vocab_size = 0  # read, and passed to the method below
            return config

        self.model_tester.get_config = with_vocabulary

    def _get_model_modality(self) -> str:
        return "text"

    def _get_trainable_model_class(self) -> type:
        return FAMILY.load(self.trained_class)

    def _create_text_training_batch(self, **_sizes: int) -> dict[str, torch.Tensor]:
        labels = torch.arange(8) % NUM_LABELS
        labels = labels.view(-1, *(1 for _ in self.labels_per_image)).expand(-1, *self.labels_per_image)
        return {"pixel_values": self.model_tester.images(batch_size=8).cpu(), "labels": labels.contiguous()}


if FAMILY.semantic_segmentation:

    class SegmentationTrainingTest(TrainingTest):
        """One label for all pixels of an image: enough to see that the head learns."""

        trained_class = FAMILY.semantic_segmentation
        labels_per_image = (TINY["image_size"], TINY["image_size"])


class FSDPTest(FamilyTest, FSDPTesterMixin, unittest.TestCase):
    def test_plan_names_every_block(self) -> None:
        """The plan that configs inherit names a language model's layers, and matches nothing of other models."""
        model = self.model_tester.build(FAMILY.model)
        if not hasattr(model, "_expand_parallel_plan"):
            self.skipTest("not available: PreTrainedModel._expand_parallel_plan")
        if not FAMILY.plan_names_every_block:
            self.skipTest("the family keeps the plan that configs inherit")
        names = model._expand_parallel_plan(model._fsdp_plan)
        blocks = [name for name in names if name.rpartition(".")[2].isdigit()]
        assert len(blocks) == TINY["num_hidden_layers"]


class TensorParallelTest(FamilyTest, TensorParallelTesterMixin, unittest.TestCase):
    def _get_tp_config(self, tie_word_embeddings: bool | None = None) -> Any:
        # 5.17 splits evenly or not at all.
        return self.model_tester.get_config(num_labels=NUM_LABELS, intermediate_size=40)


class MemoryCleanupTest(MemoryCleanupMixin, unittest.TestCase):
    def test_model_frees_its_memory(self) -> None:
        tester = ImageModelTester(FAMILY)
        self.model = tester.build(FAMILY.image_classification)
        self.model(tester.images())
