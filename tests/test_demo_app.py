"""The page of `examples/demo_app.py`: what it says of an image, and the page itself in the machine's own Chromium.

The picture of the page in the README is made here too, from the model that `make demo` trains:
`VITREG_WRITE_SCREENSHOT=1 pytest tests/test_demo_app.py -k screenshot` writes docs/demo_app.png.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTModel

from vitreg_hf import ViTRegConfig, ViTRegForImageClassification, ViTRegImageProcessor, ViTRegModel
from vitreg_hf.analysis.extract import load_vision, prefix_attention, subject_of

ROOT = Path(__file__).resolve().parents[1]
APP, DIGITS = ROOT / "examples" / "demo_app.py", ROOT / "outputs" / "digits"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if BROWSER else ["Chromium"]
in_browser = pytest.mark.skipif(bool(MISSING), reason=f"the page is tested where there is {', '.join(MISSING)}")
NAMES = ["CLS", "register 1", "register 2", "register 3", "register 4"]
CLASSES = ["apple", "<b>bread</b>", "cheese", "dill & egg", "<i>fig</i>", "grape", "{{ham}}"]
PROCESSOR = ViTRegImageProcessor(size={"height": 32, "width": 32}, size_divisor=8)


@pytest.fixture(scope="module")
def app():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("example_demo_app", APP)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def save_model(folder, model_class=ViTRegForImageClassification, **overrides):
    """Save a model with large weights, so that every class, head and layer differs, and its image processor."""
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    image = {"image_size": 32, "patch_size": 8, "num_register_tokens": 4, "num_labels": len(CLASSES)}
    weights = {"initializer_range": 0.2, "token_initializer_range": 0.5}
    config = ViTRegConfig(**{**size, **image, **weights, **overrides})
    config.id2label = dict(enumerate(CLASSES))
    model_class(config).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def photo(seed=0, size=(48, 40)):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize(size)


def bomb(path, side=20_000):
    """A small PNG that says it has 400 million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def upload_of(path):
    """What Gradio hands over for an uploaded file, whose own name it has replaced."""
    return {"path": str(path), "orig_name": f"my {path.name}"}


# What the page says, without a page


def test_what_is_seen_is_what_the_model_computes(app, tmp_path):
    folder = save_model(tmp_path)
    seen = app.look(load_vision(str(folder)), photo())
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(photo(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(pixels, output_prefix_attentions=[0, 1, 2], output_hidden_states=True)
    probabilities = outputs.logits.softmax(-1)[0]
    assert seen.classes == pytest.approx(dict(zip(CLASSES, probabilities.tolist(), strict=True)), abs=1e-5)
    assert list(seen.classes.values()) == sorted(seen.classes.values(), reverse=True)
    assert list(seen.names) == NAMES
    assert seen.attention.shape == (3, 4, 5, 4, 4)
    for layer in (1, 2, 3):
        maps = outputs.prefix_attentions[layer - 1][0, ..., 5:].unflatten(-1, (4, 4))  # heads, tokens, rows, columns
        torch.testing.assert_close(torch.from_numpy(seen.maps(layer, 2)), maps[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.from_numpy(seen.maps(layer, 0)), maps.mean(0), atol=1e-5, rtol=0)
        assert torch.equal(prefix_attention(model, pixels, layer - 1).maps[0], seen.attention[layer - 1])
    norms = torch.stack([state[0, 5:].norm(dim=-1).unflatten(0, (4, 4)) for state in outputs.hidden_states[1:3]])
    torch.testing.assert_close(seen.norms[:2], norms, atol=1e-4, rtol=1e-5)


def test_the_norms_are_compared_with_twice_the_median(app):
    norms = torch.full((1, 4, 4), 3.0)
    norms[0, 1, 2], norms[0, 3, 3] = 30.0, 5.9
    seen = app.Seen(np.zeros((32, 32, 3), np.uint8), None, (), torch.zeros(1, 4, 0, 4, 4), norms)
    text = app.norms_html(seen, 1)
    assert "Outliers: 1 of 16 patches." in text
    assert re.search(r"above 6,\s+2 times the median of this image \(3\)", text)
    assert re.search(r"The largest norm is 30,\s+10 times the median", text)


def test_models_without_registers_head_cls_or_both_work(app, tmp_path):
    without = app.look(load_vision(str(save_model(tmp_path / "a", num_register_tokens=0))), photo())
    assert list(without.names) == ["CLS"]
    headless = app.look(load_vision(str(save_model(tmp_path / "b", ViTRegModel))), photo())
    assert headless.classes is None
    no_cls = save_model(tmp_path / "c", use_cls_token=False, pooling="mean")
    assert list(app.look(load_vision(str(no_cls)), photo()).names) == NAMES[1:]
    neither = save_model(tmp_path / "d", use_cls_token=False, pooling="mean", num_register_tokens=0)
    seen = app.look(load_vision(str(neither)), photo())
    assert "neither CLS nor registers" in app.attention_html(seen, 1, 0)
    assert "of 16 patches" in app.norms_html(seen, 1)


def test_a_model_of_another_family_works(app):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    seen = app.look(subject_of(ViTModel(config), PROCESSOR), photo())
    assert (seen.names, seen.classes) == (("CLS",), None)
    assert "layer 2 of 2, head 3 of 4" in app.attention_html(seen, 2, 3)


def test_several_labels_of_one_image_get_a_probability_each(app, tmp_path):
    folder = save_model(tmp_path, problem_type="multi_label_classification")
    seen = app.look(load_vision(str(folder)), photo())
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(photo(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits[0].sigmoid()
    assert seen.classes == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-5)


def test_of_two_classes_with_one_name_the_likelier_is_shown(app, tmp_path):
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict.fromkeys(config["id2label"], "crane")
    config["label2id"] = {"crane": 0}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(photo(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1).max().item()
    assert app.look(load_vision(str(folder)), photo()).classes == pytest.approx({"crane": expected})


@pytest.mark.parametrize("kind", ["text", "cut off", "bomb", "vector"])
def test_a_bad_file_is_a_sentence_with_the_name_that_its_owner_knows(app, kind, tmp_path):
    path = tmp_path / ("drawing.svg" if kind == "vector" else "bad.png")
    if kind == "bomb":
        bomb(path)
    elif kind == "cut off":
        photo(size=(300, 300)).save(path)
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    text, classes, seen = app.answer(None, upload_of(path))
    assert text.startswith("<p class='alert' role='alert'>Expected a readable image, got")
    assert f"my {path.name}" in text
    assert str(tmp_path) not in text
    assert (classes, seen) == (None, None)
    assert app.drawn(seen, 1, 0) == ("", "")


@pytest.mark.parametrize("upload", [None, {}, {"path": None}])
def test_no_image_is_a_sentence(app, upload):
    assert "Expected an image, got none: choose one, or click an example" in app.answer(None, upload)[0]


def test_what_an_error_quotes_is_no_code(app, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    text, *_ = app.answer(None, {"path": str(tmp_path / "bad.png"), "orig_name": "<script>alert(1)</script>.png"})
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_options_are_checked_before_the_page_starts(app, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        for options, message in (
            (["--port", 70_000], "expected --port from 1 to 65535, got 70000"),
            (["--port", port], f"expected a free port in --port, got {port}"),
        ):
            with pytest.raises(SystemExit, match="2"):
                app.parse([str(word) for word in options])
            assert message in capsys.readouterr().err
    for options, message in (
        ([tmp_path], f"expected a folder with a trained model in --model_dir, got '{tmp_path}'"),
        ([tmp_path / "none", "--images_dir", tmp_path / "no"], f"got '{tmp_path / 'no'}', which does not exist"),
        (["no_one/nothing"], "expected a trained model in --model_dir, a folder or Hub id, got 'no_one/nothing'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            app.parse([str(word) for word in ("--port", port, "--model_dir", *options)])
        assert message in capsys.readouterr().err


def test_images_to_click_come_from_a_folder_beside_the_model(app, tmp_path):
    options = ["--port", str(free_port()), "--model_dir", str(save_model(tmp_path / "model"))]
    assert app.parse(options).examples == ()
    for folder, count in ((tmp_path / "model" / "held_out", 12), (tmp_path / "others", 2)):
        folder.mkdir()
        for index in range(count):
            photo(index).save(folder / f"{index:02}.png")
    assert len(app.parse(options).examples) == 10
    assert len(app.parse([*options, "--images_dir", str(tmp_path / "others")]).examples) == 2


# The page in a browser

# Gradio shows a picture faintly until the event behind it has ended.
FADED_IN = """() => [...document.querySelectorAll("figure")].every(part => {
    for (let at = part; at; at = at.parentElement) if (getComputedStyle(at).opacity !== "1") return false;
    return true;
})"""


@contextmanager
def served(model, trap, temporary, *options):
    """Address of the page of a model, run as a person runs it, and its process.

    Args:
        model: folder.
        trap: where a server that phones home would call.
        temporary: folder of its temporary files.
        options: more words of the command line.
    """
    port = free_port()
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "HF_"))}
    proxy = f"http://127.0.0.1:{trap.getsockname()[1]}"
    own = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "ALL_PROXY": proxy, "NO_PROXY": "127.0.0.1,localhost"}
    own |= {name.lower(): value for name, value in own.items()} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    own |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)}
    command = [sys.executable, APP, "--model_dir", model, "--port", port, *options]
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**outside, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Ctrl-C is ignored where the tests run in the background, and the page would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "Running on local URL" in line:
                break
        else:
            pytest.fail("".join(printed))
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def trap():
    """A proxy that no one should call."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        chromium = playwright.chromium.launch(executable_path=BROWSER, headless=True, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory, trap):
    """Address of the page of a small model, its folder, and that of the images to click."""
    torch.manual_seed(0)
    folder, images = save_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("images")
    for index in range(3):
        photo(index).save(images / f"{index}.png")
    temporary = tmp_path_factory.mktemp("temporary")
    with served(folder, trap, temporary, "--images_dir", images) as (address, _):
        yield address, folder, images


@contextmanager
def tab(browser, address):
    """The page, opened; at the end it must have asked no one but its own server, and have complained of nothing."""
    page, requests, complaints = browser.new_page(viewport={"width": 1400, "height": 900}), [], []
    page.set_default_timeout(30_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Analyse").wait_for()
    yield page
    page.close()
    assert complaints == []
    places = {urlsplit(url).netloc for url in requests if not url.startswith(("data:", "blob:"))}
    assert places == {urlsplit(address).netloc}


def analyse(page, file):
    """Upload a file, wait until it has arrived, and press the button."""
    page.locator("#upload input[type=file]").set_input_files(file)
    page.locator("#upload img").wait_for(state="attached")
    page.get_by_role("button", name="Analyse").click()


def classes_on(page):
    """Names and percentages, as they are shown."""
    rows = page.locator("[data-testid$=confidence-set]")
    return list(zip(rows.locator("dt").all_inner_texts(), rows.locator("dd").all_inner_texts(), strict=True))


def classes_of(folder, image):
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]).logits
    best = logits.softmax(-1)[0].topk(5)
    return [
        (model.config.id2label[index], 100 * probability)
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def check_classes(page, folder, file):
    expected, shown = classes_of(folder, PIL.Image.open(file)), classes_on(page)
    assert [name for name, _ in shown] == [name for name, _ in expected]
    for (_, percentage), (_, probability) in zip(shown, expected, strict=True):
        assert float(percentage.rstrip("%")) == pytest.approx(probability, abs=0.51)  # shown without decimals


def attention_picture(page, where):
    """The picture of attention in this layer and head, once it is there."""
    picture = page.get_by_alt_text(f"What {', '.join(NAMES)} attend to in {where}")
    picture.wait_for()
    return picture


@in_browser
def test_an_upload_shows_classes_attention_and_norms(browser, site, tmp_path):
    address, folder, _ = site
    photo(7).save(tmp_path / "mine.png")
    with tab(browser, address) as page:
        assert "Registers are a few more tokens" in page.locator("body").inner_text()
        assert "3 layers of 4 attention heads, " in page.locator("body").inner_text()
        assert "Tokens: CLS, 4 registers and 16 patches of 8 x 8 pixels" in page.locator("body").inner_text()
        assert page.locator("figure").count() == 0
        analyse(page, tmp_path / "mine.png")
        attention = attention_picture(page, "layer 3, mean of 4 heads")
        check_classes(page, folder, tmp_path / "mine.png")
        assert attention.evaluate("picture => picture.naturalWidth") > 1000
        assert attention.bounding_box()["width"] > 1000
        norms = page.get_by_alt_text("Norm of each patch token after layer 3")
        assert norms.evaluate("picture => picture.complete && picture.naturalWidth") > 500
        assert page.locator("figure").count() == 2
        shares = re.findall(r"(CLS|register \d) (\d+)%", page.locator(".seen").first.inner_text())
        model = load_vision(str(folder))
        pixels = model.preprocess(photo(7), return_tensors="pt")["pixel_values"]
        expected = prefix_attention(model, pixels).share_on_patches()[0]
        assert [name for name, _ in shares] == NAMES
        assert [int(share) for _, share in shares] == pytest.approx((100 * expected).tolist(), abs=0.51)
        assert "of 16 patches." in page.locator(".seen").nth(1).inner_text()


@in_browser
def test_layer_and_head_change_the_pictures(browser, site, tmp_path):
    address, *_ = site
    photo(7).save(tmp_path / "mine.png")
    with tab(browser, address) as page:
        analyse(page, tmp_path / "mine.png")
        seen = [attention_picture(page, "layer 3, mean of 4 heads").get_attribute("src")]
        norms = [page.get_by_alt_text("Norm of each patch token after layer 3").get_attribute("src")]
        page.get_by_role("slider", name="Layer").press("ArrowLeft")
        seen.append(attention_picture(page, "layer 2, mean of 4 heads").get_attribute("src"))
        norms.append(page.get_by_alt_text("Norm of each patch token after layer 2").get_attribute("src"))
        for head in ("head 1", "head 4"):
            page.get_by_label("Attention head").click()
            page.get_by_role("option", name=head).click()
            seen.append(attention_picture(page, f"layer 2, {head} of 4").get_attribute("src"))
        assert len(set(seen)) == 4
        assert len(set(norms)) == 2


@in_browser
def test_a_click_on_an_example_is_enough(browser, site):
    address, folder, images = site
    with tab(browser, address) as page:
        page.locator(".gallery-item").nth(1).click()
        attention_picture(page, "layer 3, mean of 4 heads")
        check_classes(page, folder, images / "1.png")


@in_browser
def test_a_file_that_is_no_image_gets_a_sentence_in_place_of_pictures(browser, site, tmp_path):
    address, *_ = site
    photo(7).save(tmp_path / "mine.png")
    broken = tmp_path / "${1+1} {{value}} broken.png"
    broken.write_text("no image at all")
    with tab(browser, address) as page:
        page.get_by_role("button", name="Analyse").click()
        page.get_by_role("alert").wait_for()
        assert "Expected an image, got none" in page.get_by_role("alert").inner_text()
        analyse(page, tmp_path / "mine.png")
        attention_picture(page, "layer 3, mean of 4 heads")
        assert page.get_by_role("alert").count() == 0
        page.get_by_role("button", name="Remove Image").click()
        analyse(page, broken)
        page.get_by_role("alert").wait_for()
        sentence = page.get_by_role("alert").inner_text()
        assert sentence.startswith("Expected a readable image, got '")
        assert broken.name in sentence
        assert "/tmp" not in sentence
        page.locator("figure").first.wait_for(state="detached")
        assert classes_on(page) == []


@in_browser
def test_a_model_without_a_head_says_so_and_uploads_are_deleted_at_the_end(browser, trap, tmp_path):
    folder, temporary = save_model(tmp_path / "model", ViTRegModel), tmp_path / "temporary"
    temporary.mkdir()
    photo(7).save(tmp_path / "mine.png")
    with served(folder, trap, temporary) as (address, process):
        with tab(browser, address) as page:
            analyse(page, tmp_path / "mine.png")
            attention_picture(page, "layer 3, mean of 4 heads")
            assert page.get_by_test_id("label-output-value").inner_text() == "no classification head"
            assert page.locator(".gallery-item").count() == 0
        assert list(temporary.rglob("mine.png"))
        process.send_signal(signal.SIGINT)  # as Ctrl-C
        process.wait(60)
    assert not list(temporary.rglob("*.png"))


@in_browser
@pytest.mark.skipif(not (DIGITS / "held_out").is_dir(), reason="the digits model is trained by make demo")
def test_the_screenshot_of_the_digits(browser, trap, tmp_path):
    file = sorted((DIGITS / "held_out" / "3").iterdir())[0]
    with served(DIGITS, trap, tmp_path) as (address, _), tab(browser, address) as page:
        analyse(page, file)
        attention_picture(page, "layer 4, mean of 4 heads")
        check_classes(page, DIGITS, file)
        page.mouse.move(0, 0)
        page.wait_for_function(FADED_IN)
        page.screenshot(path=tmp_path / "demo_app.png", full_page=True, animations="disabled")
    with PIL.Image.open(tmp_path / "demo_app.png") as picture:
        assert picture.width == 1400
        assert 900 < picture.height < 1800
    if os.environ.get("VITREG_WRITE_SCREENSHOT"):
        shutil.copyfile(tmp_path / "demo_app.png", ROOT / "docs" / "demo_app.png")


@in_browser
def test_a_file_of_the_server_that_was_not_uploaded_is_refused(browser, site, tmp_path):
    address, *_ = site
    photo(7).save(tmp_path / "secret.png")
    with tab(browser, address) as page:
        events = page.request.get(f"{address}/config").json()["dependencies"]
        button = next(event["id"] for event in events if len(event["outputs"]) == 3)
        file = {"path": str(tmp_path / "secret.png"), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        call = {"data": [file], "fn_index": button, "session_hash": "stranger"}
        page.request.post(f"{address}/gradio_api/queue/join", data=call)
        answers = page.request.get(f"{address}/gradio_api/queue/data?session_hash=stranger").text()
    ended = next(line for line in answers.split("\n\n") if "process_completed" in line)
    assert json.loads(ended.removeprefix("data: "))["success"] is False


@in_browser
def test_the_server_calls_no_one(site, trap):
    trap.setblocking(False)
    with pytest.raises(BlockingIOError):
        trap.accept()
