"""The pipelines of this package: tokens by name, images of every kind, bad ones that name themselves, attention."""

import base64
import functools
import http.server
import io
import logging
import threading

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers import Dinov2Config, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel, pipeline
from transformers.pipelines import (
    PIPELINE_REGISTRY,
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    ImageSegmentationPipeline,
)

from vitreg_hf import (
    ViTRegBackbone,
    ViTRegConfig,
    ViTRegForImageClassification,
    ViTRegForMaskedImageModeling,
    ViTRegForSemanticSegmentation,
    ViTRegImageProcessor,
    ViTRegModel,
)
from vitreg_hf.pipelines import (
    TOKENS,
    AttentionMapsPipeline,
    CheckedImageClassificationPipeline,
    CheckedImageSegmentationPipeline,
    TokenFeaturesPipeline,
    register_pipelines,
)

HEIGHT, WIDTH, PATCH = 32, 48, 8
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH
MODELS = {
    "image-classification": ViTRegForImageClassification,
    "image-feature-extraction": ViTRegModel,
    "image-segmentation": ViTRegForSemanticSegmentation,
    "attention-maps": ViTRegForImageClassification,
}


def photo(seed=0, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photos(count):
    return [PIL.Image.fromarray(photo(seed)) for seed in range(count)]


def processor(**options):
    return ViTRegImageProcessor(size={"height": HEIGHT, "width": WIDTH}, do_center_crop=False, **options)


@pytest.fixture
def make(make_config):
    """A pipeline of a task on a new model of the family, or on a given one."""

    def make(task, model=None, image_processor=None, **options):
        model = MODELS[task](make_config()).eval() if model is None else model
        options = {"overlay": False, **options} if task == "attention-maps" else options
        return pipeline(task, model=model, image_processor=image_processor or processor(), device="cpu", **options)

    return make


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Address of a server on loopback for the files of `tmp_path`."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def logged(caplog):
    """What Transformers logs as a warning or worse."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def assert_same(first, second, tolerance=0.0):
    """Equal results of a pipeline: nested lists and dicts of numbers, texts, arrays, tensors and pictures."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name], tolerance)
    elif isinstance(first, list) and first and isinstance(first[0], dict):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other, tolerance)
    elif first is None or isinstance(first, str) or (isinstance(first, list) and first and isinstance(first[0], str)):
        assert first == second
    else:
        np.testing.assert_allclose(np.asarray(first), np.asarray(second), atol=tolerance, rtol=0)


# The registry


def test_transformers_finds_these_pipelines_by_task():
    found = {task: PIPELINE_REGISTRY.check_task(task)[1]["impl"] for task in [*MODELS, "semantic-segmentation"]}
    assert found == {
        "image-classification": CheckedImageClassificationPipeline,
        "image-feature-extraction": TokenFeaturesPipeline,
        "image-segmentation": CheckedImageSegmentationPipeline,
        "semantic-segmentation": CheckedImageSegmentationPipeline,
        "attention-maps": AttentionMapsPipeline,
    }


def test_registering_again_changes_nothing_and_logs_nothing(logged):
    before = {task: dict(entry) for task, entry in PIPELINE_REGISTRY.supported_tasks.items()}
    register_pipelines()
    assert before == PIPELINE_REGISTRY.supported_tasks
    assert logged() == []


def test_all_but_the_class_of_a_task_stays():
    entry = PIPELINE_REGISTRY.supported_tasks["image-feature-extraction"]
    assert entry["pt"] == (transformers.AutoModel,)
    assert entry["default"]["model"][0] == "google/vit-base-patch16-224"


@pytest.mark.parametrize("theirs", ["transformers.pipelines.image_classification.X", ImageClassificationPipeline])
def test_a_pipeline_of_transformers_is_replaced_as_a_name_and_as_a_class(monkeypatch, theirs):
    entry = PIPELINE_REGISTRY.supported_tasks["image-classification"]
    monkeypatch.setitem(entry, "impl", theirs)
    register_pipelines()
    assert entry["impl"] is CheckedImageClassificationPipeline


def test_a_pipeline_of_another_package_stays(monkeypatch):
    class Foreign(ImageClassificationPipeline):
        pass

    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks["image-classification"], "impl", Foreign)
    register_pipelines()
    assert PIPELINE_REGISTRY.check_task("image-classification")[1]["impl"] is Foreign


def test_an_inferred_task_takes_tokens(make_config, tmp_path, monkeypatch):
    ViTRegModel(make_config()).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.pipelines.get_task", lambda *_: "image-feature-extraction")
    extract = pipeline(model=str(tmp_path), tokens="cls_token")
    assert np.shape(extract(photo())) == (1, 32)


def test_the_name_that_datasets_use_for_segmentation(make_config, tmp_path, logged):
    ViTRegForSemanticSegmentation(make_config()).save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    named = {task: pipeline(task, model=str(tmp_path)) for task in ("semantic-segmentation", "image-segmentation")}
    first, second = [segment(photos(1)[0]) for segment in named.values()]
    assert_same(first, second)
    assert logged() == []


@pytest.mark.parametrize("task", MODELS)
def test_a_saved_pipeline_is_a_model_without_code(make, tmp_path, task):
    make(task).save_pretrained(tmp_path)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert not list(tmp_path.glob("*.py"))


# Features by name


def outputs_of(extract, image):
    with torch.no_grad():
        return extract.model(**extract.image_processor(image, return_tensors="pt"))


@pytest.mark.parametrize("name", TOKENS)
def test_a_token_by_name_is_that_of_the_model(make, name):
    extract, image = make("image-feature-extraction"), photos(1)[0]
    expected = outputs_of(extract, image)[name]
    found = extract(image, tokens=name)
    assert isinstance(found, list)
    assert np.shape(found) == tuple(expected.shape)
    np.testing.assert_array_equal(np.array(found, dtype=np.float32), expected)
    as_tensor = make("image-feature-extraction", extract.model, tokens=name, return_tensors=True)(image)
    torch.testing.assert_close(as_tensor, expected, rtol=0, atol=0)


def test_shapes_have_one_image_in_front(make):
    found = make("image-feature-extraction", tokens=list(TOKENS), return_tensors=True)(photo())
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "cls_token": (1, 32),
        "register_tokens": (1, 4, 32),
        "patch_tokens": (1, ROWS * COLUMNS, 32),
        "patch_map": (1, 32, ROWS, COLUMNS),
        "pooler_output": (1, 32),
        "last_hidden_state": (1, 1 + 4 + ROWS * COLUMNS, 32),
    }


def test_several_names_give_a_dict_also_one_in_a_list(make):
    extract, image = make("image-feature-extraction", tokens=("patch_map", "cls_token")), photos(1)[0]
    both, one = extract(image), extract(image, tokens=["cls_token"])
    assert list(both) == ["patch_map", "cls_token"]
    assert list(one) == ["cls_token"]
    assert one["cls_token"] == both["cls_token"] == extract(image, tokens="cls_token")


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_of_tokens_equal_single_images(make, batch_size):
    extract, images = make("image-feature-extraction", tokens=list(TOKENS), return_tensors=True), photos(5)
    for found, image in zip(extract(images, batch_size=batch_size), images, strict=True):
        assert_same(found, extract(image), tolerance=1e-5)


def foreign_models():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
    vit = ViTConfig(**small, intermediate_size=48, image_size=(HEIGHT, WIDTH), initializer_range=0.2)
    return {
        "vitreg": ViTRegModel(ViTRegConfig(**small, intermediate_size=48)),
        "vit": ViTModel(vit),
        "dinov2": transformers.Dinov2Model(Dinov2Config(**small, image_size=32)),
    }


@pytest.mark.parametrize("family", ["vitreg", "vit", "dinov2"])
@pytest.mark.parametrize("options", [{}, {"pool": True}, {"return_tensors": True}, {"batch_size": 2}])
def test_without_tokens_features_are_those_of_transformers(family, options):
    model = foreign_models()[family].eval()
    ours = pipeline("image-feature-extraction", model=model, image_processor=processor(), device="cpu")
    theirs = ImageFeatureExtractionPipeline(model=model, image_processor=processor(), device="cpu")
    assert isinstance(ours, TokenFeaturesPipeline)
    for found, expected in zip(ours(photos(3), **options), theirs(photos(3), **options), strict=True):
        assert type(found) is type(expected)
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("overrides", "tokens", "message"),
    [
        (
            {},
            "cls",
            "Expected tokens from cls_token, register_tokens, .*last_hidden_state, or a list of them, got 'cls'",
        ),
        ({}, ["cls_token", "registers"], r"got \['cls_token', 'registers'\]"),
        ({}, [], r"got \[\]"),
        ({"use_cls_token": False, "pooling": "mean"}, "cls_token", "Expected a model with CLS for 'cls_token'"),
        ({"num_register_tokens": 0}, ["patch_map", "register_tokens"], "Expected a model with registers"),
    ],
)
def test_names_that_a_model_has_no_tokens_for(make, make_config, overrides, tokens, message):
    model = ViTRegModel(make_config(**overrides))
    with pytest.raises(ValueError, match=message):
        make("image-feature-extraction", model, tokens=tokens)
    extract = make("image-feature-extraction", model)
    with pytest.raises(ValueError, match=message):
        extract("is refused before it is looked for.png", tokens=tokens)


def test_tokens_and_the_pooled_features_exclude_each_other(make):
    extract = make("image-feature-extraction", tokens="cls_token")
    with pytest.raises(ValueError, match="Expected tokens or pool=True, got both"):
        extract(photo(), pool=True)
    with pytest.raises(ValueError, match="Expected tokens or pool=True, got both"):
        make("image-feature-extraction", extract.model, tokens="cls_token", pool=True)
    pooled = make("image-feature-extraction", extract.model, pool=True)
    with pytest.raises(ValueError, match="Expected tokens or pool=True, got both"):
        pooled(photo(), tokens="cls_token")
    assert pooled(photo(), tokens="pooler_output", pool=False) == pooled(photo())


def test_a_model_that_names_no_tokens(make):
    with pytest.raises(ValueError, match=r"Expected a model that names its tokens, 'vitreg', .* got a 'vit'"):
        make("image-feature-extraction", foreign_models()["vit"], tokens="cls_token")


def test_a_head_has_tokens_but_no_pooled_features(make, make_config):
    model = ViTRegForImageClassification(make_config()).eval()
    extract = make("image-feature-extraction", model, tokens="cls_token")
    assert np.shape(extract(photo())) == (1, 32)
    with pytest.raises(ValueError, match=r"Expected one of cls_token, .*patch_map, which .* got 'pooler_output'"):
        extract(photo(), tokens="pooler_output")


# Images of every kind


@pytest.mark.parametrize("task", MODELS)
def test_all_kinds_of_images_give_the_same(make, tmp_path, served, task):
    run, pixels = make(task), photo(0, HEIGHT, WIDTH)  # resizing rounds grey levels, but not floats
    picture, file = PIL.Image.fromarray(pixels), tmp_path / "a photo.png"
    picture.save(file)
    kinds = {
        "PIL": picture,
        "path": str(file),
        "Path": file,
        "address": f"{served}/a%20photo.png",
        "base64": base64.b64encode(file.read_bytes()).decode(),
        "array": pixels,
        "batch of one": pixels[None],
        "channels first": np.moveaxis(pixels, -1, 0),
        "tensor": torch.from_numpy(pixels),
        "floats": pixels.astype(np.float32),
    }
    results = dict(zip(kinds, run(list(kinds.values())), strict=True))
    for kind, found in results.items():
        assert_same(found, results["PIL"], tolerance=1e-5 if kind == "floats" else 0.0)
        assert_same(run(kinds[kind]), found)
    assert_same(run(images=[picture])[0], results["PIL"])


def test_a_mask_has_the_size_of_its_array(make):
    masks = make("image-segmentation")(np.moveaxis(photo(), -1, 0))
    assert {mask["mask"].size for mask in masks} == {(56, 40)}


def test_no_images_are_no_results(make):
    assert make("image-classification")([]) == []


@pytest.mark.parametrize("pad", [False, True])
def test_images_of_several_sizes_need_one_size_for_a_batch(make, make_config, pad):
    options = {"do_resize": False, "do_center_crop": False, "do_pad": pad, "size_divisor": PATCH if pad else None}
    classify = make("image-classification", image_processor=ViTRegImageProcessor(**options))
    images = [photo(0), photo(1, 48, 40)]
    assert [len(one) for one in classify(images)] == [5, 5]
    with pytest.raises(ValueError, match=r"one size for a batch of 2, got 40 x 56, 48 x 40: pass batch_size=1"):
        classify(images, batch_size=2)


def test_classification_of_other_models_is_that_of_transformers():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, num_labels=3
    )
    model, images = ViTForImageClassification(config).eval(), photos(3)
    read = ViTImageProcessor(size={"height": 32, "width": 32})
    ours = pipeline("image-classification", model=model, image_processor=read, device="cpu")
    theirs = ImageClassificationPipeline(model=model, image_processor=read, device="cpu")
    assert isinstance(ours, CheckedImageClassificationPipeline)
    assert ours(images, top_k=2) == theirs(images, top_k=2)


def test_classification_computes_of_the_last_layer_what_it_reads(make):
    classify, seen = make("image-classification"), []
    classify.model.vitreg.layers[-1].register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    found = classify(photos(1))[0]
    assert seen == [1]
    with torch.no_grad():
        logits = classify.model(**classify.image_processor(photos(1), return_tensors="pt")).logits[0]
    expected = logits.softmax(-1).sort(descending=True).values[: len(found)]
    np.testing.assert_allclose([entry["score"] for entry in found], expected, atol=1e-6)


def test_segmentation_is_that_of_transformers(make):
    ours = make("image-segmentation")
    theirs = ImageSegmentationPipeline(model=ours.model, image_processor=processor(), device="cpu")
    for found, expected in zip(ours(photos(2), subtask="semantic"), theirs(photos(2)), strict=True):
        assert_same(found, expected)


# Bad images


def broken_files(folder):
    """Files that are no image, by what is wrong with them."""
    encoded = {}
    for kind in ("PNG", "JPEG"):
        stream = io.BytesIO()
        PIL.Image.fromarray(photo()).save(stream, kind)
        encoded[kind] = stream.getvalue()
    contents = {
        "broken.png": encoded["PNG"][:60] + bytes(40) + encoded["PNG"][100:],
        "truncated.jpg": encoded["JPEG"][:-200],
        "text.png": b"no image",
        "empty.png": b"",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: str(folder / name) for name in [*contents, "missing.png"]}


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_bad_file_names_itself_and_its_place(make, tmp_path, task, batch_size):
    run, good = make(task), photos(1)[0]
    for path in broken_files(tmp_path).values():
        with pytest.raises(ValueError) as raised:
            run([good, good, path, good, good], batch_size=batch_size)
        assert str(raised.value).startswith(f"Expected a readable image, got image 3 of 5, {path!r}: ")
        assert isinstance(raised.value.__cause__, Exception)
        with pytest.raises(ValueError) as raised:
            run(path)
        assert str(raised.value).startswith(f"Expected a readable image, got {path!r}: ")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16", "F", "1"])
def test_pixels_are_those_of_the_image_processor(make, tmp_path, mode):
    """Turned into RGB first, 16 bit images would be clipped and transparent ones lose what they are laid over."""
    values = np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)
    if mode in ("I;16", "F"):
        image = PIL.Image.fromarray(values.astype(np.uint16) * 257 if mode == "I;16" else values.astype(np.float32))
    else:
        image = PIL.Image.fromarray(np.dstack([values, values.T[:40, :40].repeat(2, 1)[:, :48], values, values]))
        image = image.convert(mode) if mode != "RGBA" else image
    classify = make("image-classification")
    expected = classify.image_processor(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(classify.preprocess(image)["pixel_values"], expected, atol=0, rtol=0)
    if mode != "F":
        image.save(tmp_path / "image.png")
        torch.testing.assert_close(
            classify.preprocess(tmp_path / "image.png")["pixel_values"], expected, atol=0, rtol=0
        )


def test_decompression_bombs_are_refused(make, tmp_path, monkeypatch):
    """Also those between the limits of Pillow, of which it only warns."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 2000)
    classify, path = make("image-classification"), tmp_path / "bomb.png"
    for size in ((60, 60), (100, 100)):
        PIL.Image.new("L", size).save(path)
        with pytest.raises(ValueError, match=r"got '.*bomb\.png': .*(60 x 60|exceeds limit)"):
            classify(str(path))
    PIL.Image.new("L", (40, 40)).save(path)
    assert classify(str(path))


def test_reasons_say_what_is_wrong(make, tmp_path, served):
    classify, files = make("image-classification"), broken_files(tmp_path)
    reasons = {
        files["missing.png"]: "there is no such file, and it is no base64 data of an image",
        files["truncated.jpg"]: "truncated",
        files["text.png"]: "cannot identify image file",
        f"{served}/text.png": "what this address answers is no image",
        f"{served}/missing.png": "what this address answers is no image",
        "A" * 5000: r"'A{60}'\.\.\. \(5000 characters\): there is no such file",
        None: "an object of type NoneType: ",
        3.5: "an object of type float: ",
    }
    for image, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            classify([image])


def test_a_dead_address_names_itself(make, served):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        dead = f"http://127.0.0.1:{server.server_port}/photo.png"
    with pytest.raises(ValueError, match=f"got image 2 of 2, '{dead}': .*[Cc]onnect|refused"):
        make("image-feature-extraction")([photo(), dead])


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize(
    ("image", "described"),
    [
        (np.zeros(7, np.uint8), r"an array of uint8 and shape \(7,\): expected real numbers of shape \(H, W\)"),
        (np.zeros((2, 40, 56, 3), np.uint8), r"an array of uint8 and shape \(2, 40, 56, 3\): .* one image per array"),
        (np.zeros((0, 56, 3), np.uint8), r"an array of uint8 and shape \(0, 56, 3\)"),
        (np.zeros((40, 56, 3), np.complex64), r"an array of complex64 and shape \(40, 56, 3\)"),
        (np.full((40, 56, 3), "a"), r"an array of <U1 and shape \(40, 56, 3\)"),
        (torch.zeros(1, 1, 3, 40, 56), r"a tensor of float32 and shape \(1, 1, 3, 40, 56\)"),
        (torch.zeros(3, 40, 56, dtype=torch.complex64), r"a tensor of complex64"),
        (np.full((40, 56, 3), 1000), r"an array of int64 and shape \(40, 56, 3\): expected torch.int64 pixels in"),
    ],
)
def test_a_bad_array_names_its_kind_and_shape(make, task, image, described):
    with pytest.raises(ValueError, match=f"got image 2 of 2, {described}"):
        make(task)([photo(), image])


def test_a_broken_pil_image_names_its_file(make, tmp_path):
    path = broken_files(tmp_path)["truncated.jpg"]
    with PIL.Image.open(path) as picture:
        named = f"a PIL image of mode RGB, 56 x 40 pixels, from '{path}': .*truncated"
        with pytest.raises(ValueError, match=named):
            make("image-classification")(picture)


def test_generators_stream_and_number_their_images(make):
    pulled = []

    def images():
        for number, image in enumerate([photo(), photo(), np.zeros(3), photo()], start=1):
            pulled.append(number)
            yield image

    results = iter(make("image-classification")(images()))
    assert pulled == [1]  # Transformers looks at the first
    assert len(next(results)) == 5
    assert pulled == [1]
    next(results)
    with pytest.raises(ValueError, match=r"got image 3, an array of float64 and shape \(3,\)"):
        next(results)
    assert pulled == [1, 2, 3]


class Folder(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images, self.read = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


def test_datasets_stream_and_number_their_images(make):
    dataset = Folder([photo(), "missing.png", photo()])
    results = iter(make("image-classification")(dataset))
    next(results)
    assert dataset.read == [0]
    with pytest.raises(ValueError, match=r"got image 2 of 3, 'missing\.png'"):
        next(results)


def test_a_dataset_without_length_streams_too(make):
    results = iter(make("image-classification")(Stream([photo(), "missing.png"])))
    next(results)
    with pytest.raises(ValueError, match=r"got 'missing\.png'"):
        next(results)


def test_worker_processes_name_bad_images(make):
    run = make("image-classification")
    with pytest.raises(ValueError, match=r"got image 2 of 2, 'missing\.png'"):
        run([photo(), "missing.png"], num_workers=1)


# Attention maps


def slow_maps(model, pixel_values, layer):
    """`(T, h, rows, columns)` cut out of full attention matrices of the eager backend."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(pixel_values, output_attentions=True).attentions[layer][0]
    prefix = attention.shape[-1] - ROWS * COLUMNS
    return attention[:, :prefix, prefix:].transpose(0, 1).unflatten(-1, (ROWS, COLUMNS))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [-1, 0])
def test_maps_are_those_of_full_attention_under_every_backend(make, make_config, backend, layer):
    model, image = ViTRegModel(make_config()).eval(), photos(1)[0]
    model.set_attn_implementation(backend)
    run = make("attention-maps", model, layer=layer)
    mean, every = run(image), run(image, heads="all")
    expected = slow_maps(model, run.image_processor(image, return_tensors="pt").pixel_values, layer)
    np.testing.assert_allclose(every["maps"], expected, atol=1e-6)
    np.testing.assert_allclose(mean["maps"], expected.mean(dim=1), atol=1e-6)
    np.testing.assert_allclose(every["on_patches"], expected.sum(dim=(-2, -1)), atol=1e-5)
    np.testing.assert_allclose(mean["on_patches"], mean["maps"].sum((-2, -1)), atol=1e-6)
    assert mean["tokens"] == ["CLS", "register 1", "register 2", "register 3", "register 4"]
    assert mean["layer"] == every["layer"] == layer % 3
    assert mean["maps"].dtype == every["on_patches"].dtype == np.float32


def test_options_of_a_call_stand_before_those_of_the_pipeline(make):
    run, image = make("attention-maps", layer=0, heads="all"), photos(1)[0]
    assert run(image)["layer"] == 0
    changed = run(image, layer=1, heads="mean")
    assert (changed["layer"], changed["maps"].shape) == (1, (5, ROWS, COLUMNS))
    assert run(image)["maps"].shape == (5, 4, ROWS, COLUMNS)


@pytest.mark.parametrize(
    "kind",
    [
        ViTRegModel,
        ViTRegForImageClassification,
        ViTRegForMaskedImageModeling,
        ViTRegForSemanticSegmentation,
        ViTRegBackbone,
    ],
)
def test_every_kind_of_checkpoint_loads_its_own_weights_silently(make, make_config, tmp_path, logged, kind):
    model, image = kind(make_config()).eval(), photos(1)[0]
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded = pipeline("attention-maps", model=str(tmp_path), overlay=False, device="cpu")
    assert logged() == []
    assert_same(loaded(image), make("attention-maps", model)(image))


def test_registers_alone(make, make_config):
    model = ViTRegModel(make_config(use_cls_token=False, pooling="mean", num_register_tokens=2)).eval()
    assert make("attention-maps", model)(photo())["tokens"] == ["register 1", "register 2"]


@pytest.mark.parametrize("registers", [0, 2])
def test_models_of_other_families(make, registers):
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": PATCH,
        "image_size": 32,
    }
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    options = {"num_register_tokens": registers} if registers else {}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**small, **options)).eval()
    run, image = make("attention-maps", model), photos(1)[0]
    found = run(image, heads="all", layer=0)
    expected = slow_maps(model, run.image_processor(image, return_tensors="pt").pixel_values, 0)
    np.testing.assert_allclose(found["maps"], expected, atol=1e-6)
    assert found["tokens"] == ["CLS", "register 1", "register 2"][: 1 + registers]


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("family", ["vitreg", "dinov2"])
def test_batches_of_maps_equal_single_images(make, family, batch_size):
    run, images = make("attention-maps", foreign_models()[family].eval(), heads="all"), photos(5)
    for found, image in zip(run(images, batch_size=batch_size), images, strict=True):
        assert_same(found, run(image), tolerance=1e-6)


def test_images_keep_their_sizes_where_the_processor_lets_them(make, make_config):
    read = ViTRegImageProcessor(do_resize=False, do_center_crop=False, do_pad=True, size_divisor=PATCH)
    run = make("attention-maps", ViTRegModel(make_config()).eval(), read)
    found = run([photo(), photo(1, 47, 30)])
    assert [one["maps"].shape for one in found] == [(5, 5, 7), (5, 6, 4)]


def test_padding_gets_no_attention(make, make_config):
    plain = {"do_resize": False, "do_center_crop": False}
    padded = ViTRegImageProcessor(**plain, do_pad=True, pad_size={"height": 48, "width": 64})
    model, image = ViTRegModel(make_config()).eval(), photo(0, HEIGHT, WIDTH)
    found = make("attention-maps", model, padded)(image)["maps"]
    assert found.shape == (5, 6, 8)
    np.testing.assert_allclose(found[:, :ROWS, :COLUMNS], make("attention-maps", model)(image)["maps"], atol=1e-5)
    found[:, :ROWS, :COLUMNS] = 0
    assert not found.any()


def test_half_precision_gives_float32_that_sums_to_at_most_one(make, make_config):
    run = make("attention-maps", ViTRegModel(make_config()).eval().to(torch.bfloat16))
    found = run(photo())
    assert found["maps"].dtype == np.float32
    assert (found["on_patches"] <= 1.01).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "Expected layer from -3 to 2, got 3"),
        ({"layer": -4}, "Expected layer from -3 to 2, got -4"),
        ({"layer": True}, "got True"),
        ({"layer": 0.0}, "got 0.0"),
        ({"heads": "first"}, "Expected heads 'mean' or 'all', got 'first'"),
        ({"overlay": "yes"}, "Expected overlay True or False, got 'yes'"),
    ],
)
def test_options_that_are_refused(make, options, message):
    run = make("attention-maps")
    with pytest.raises(ValueError, match=message):
        run("is refused before it is looked for.png", **options)
    with pytest.raises(ValueError, match=message):
        make("attention-maps", run.model, **options)


def test_an_unknown_option_is_refused(make):
    with pytest.raises(TypeError, match="layers"):
        make("attention-maps")(photo(), layers=1)


def test_models_without_such_tokens_are_refused(make, make_config):
    without = ViTRegModel(make_config(use_cls_token=False, pooling="mean", num_register_tokens=0))
    with pytest.raises(ValueError, match="Expected a vision model with CLS or registers, got ViTRegModel"):
        make("attention-maps", without)
    text = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    with pytest.raises(ValueError, match="Expected a vision model with CLS or registers, got BertModel"):
        make("attention-maps", transformers.BertModel(text))
    convolutions = transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8))
    with pytest.raises(ValueError, match=r"Expected a model of a known family .* got 'resnet'"):
        make("attention-maps", convolutions)


def test_a_model_in_training_mode_is_refused(make, make_config):
    with pytest.raises(ValueError, match="Expected a model in evaluation mode"):
        make("attention-maps", ViTRegModel(make_config()).train())(photo())


def test_the_overlay_is_drawn_unless_it_is_not_wanted(make):
    run = make("attention-maps", overlay=True)
    picture = run(photo(), heads="all")["overlay"]
    assert isinstance(picture, PIL.Image.Image)
    assert min(picture.size) > 100
    assert "overlay" not in run(photo(), overlay=False)
    drawn_by_default = pipeline("attention-maps", model=run.model, image_processor=processor(), device="cpu")
    assert drawn_by_default(photo())["overlay"].size == picture.size


def test_the_overlay_shows_the_image_as_the_model_sees_it(make, monkeypatch):
    seen = {}

    def keep(image, maps, **more):
        seen.update(image=image, maps=maps, **more)
        return PIL.Image.new("RGB", (1, 1))

    monkeypatch.setattr("vitreg_hf.analysis.figures.overlay.attention_overlay", keep)
    picture, run = photos(1)[0], make("attention-maps", overlay=True, layer=1)
    found = run(picture, heads="all")
    plain = processor(do_normalize=False, do_rescale=False)(picture, return_tensors="pt").pixel_values[0]
    assert np.abs(seen["image"] - plain.permute(1, 2, 0).numpy()).max() <= 1
    np.testing.assert_allclose(seen["maps"], found["maps"].mean(axis=1), atol=1e-7)
    assert seen["title"] == "ViTRegForImageClassification: attention in layer 2 of 3"


def test_without_matplotlib_the_way_out_is_named(make, monkeypatch):
    monkeypatch.setattr("vitreg_hf.pipelines.attention_maps.find_spec", lambda _: None)
    model = make("attention-maps").model
    message = r"Expected matplotlib for an overlay, .* pip install 'vitreg_hf\[analysis\]' or pass overlay=False"
    with pytest.raises(ValueError, match=message):
        make("attention-maps", model, overlay=True)
    run = pipeline("attention-maps", model=model, image_processor=processor(), device="cpu")
    with pytest.raises(ValueError, match=message):
        run("is refused before it is looked for.png")
    assert run(photo(), overlay=False)["maps"].shape == (5, ROWS, COLUMNS)
    assert make("attention-maps", model, overlay=False)(photo())["maps"].shape == (5, ROWS, COLUMNS)
