"""The page of ``tarflow demo`` in a browser: needs the extra ``demo-test`` and Chromium, and is skipped without."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: CONTRIBUTING.md")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: CONTRIBUTING.md")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed: CONTRIBUTING.md", allow_module_level=True)

MILLISECONDS = 60_000  # a busy machine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The command, as a user runs it: its address, and its temporary folder, deleted when it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "tarflow", "demo", f"--port={port}", "--device=cpu"]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline().startswith("fashion-mnist at http://127.0.0.1:")
        yield f"http://127.0.0.1:{port}", temporary
        assert list(temporary.glob("tarflow-demo-*"))
        for _ in range(2):  # as an impatient user does
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        process.wait(timeout=60)
    assert not list(temporary.glob("tarflow-demo-*"))


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop, light", "narrow, dark"])
def page(served, request):
    """The page, which logs no error, asks nobody else for anything and is as wide as the window."""
    (width, scheme), (address, _) = request.param, served
    errors, asked = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(MILLISECONDS)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_a_class_is_sampled_block_by_block(page):
    page.get_by_label("Class", exact=True).click()
    page.get_by_role("option", name="Trouser").click()
    page.get_by_role("spinbutton", name="Images").fill("2")
    page.get_by_role("button", name="Decoder").click()
    page.get_by_role("radio", name="jacobi").check()
    page.get_by_label("Decode once more").check()
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("The largest difference between their images").wait_for()
    assert page.get_by_role("img", name="Trouser").count() == 2
    for stage in ("latent", "after block 4", "after block 1", "denoising, step 2 of 2"):
        assert page.get_by_role("img", name=stage, exact=True).count() == 1
    assert page.get_by_role("cell", name="sequential").count() == 1


def test_a_setting_that_the_model_does_not_take_is_an_error_in_words(page):
    page.get_by_role("button", name="Decoder").click()
    page.get_by_role("spinbutton", name="Tolerance").fill("-1")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("tolerance: expected a finite number >= 0; got -1").wait_for()


def test_an_uploaded_image_is_scored(page, tmp_path):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no image")
    page.get_by_role("tab", name="Score").click()
    page.get_by_role("radio", name="upload").check()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Drop an image file here to upload").click()
    chooser.value.set_files(tmp_path / "white.png")
    page.get_by_label("Remove Image").wait_for()
    page.get_by_role("button", name="Score", exact=True).click()
    page.get_by_text("bits/dim").wait_for()
    for text in ("60 x 40 pixels, cropped to its centre, resized to 28 x 28", "inverted", "the same 8-bit pixels"):
        assert page.get_by_text(text).count() == 1
    assert page.get_by_role("img", name="its latents").count() == 1


def test_a_drawing_is_scored(page):
    page.get_by_role("tab", name="Score").click()
    page.get_by_role("radio", name="drawing").check()
    page.get_by_role("button", name="Brush").click()
    canvas = page.locator("canvas").first
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y - 60)
    page.mouse.down()
    page.mouse.move(x, y + 60, steps=10)
    page.mouse.up()
    page.get_by_role("button", name="Score", exact=True).click()
    page.get_by_text("280 x 280 pixels, resized to 28 x 28").wait_for()
    assert page.get_by_text("inverted, since its border is light").count() == 1


def test_images_are_interpolated(page):
    page.get_by_role("tab", name="Interpolate").click()
    page.get_by_role("button", name="Interpolate", exact=True).click()
    page.get_by_text("Latents on the arc").wait_for()
    assert page.get_by_role("img", name="0.00").count() == page.get_by_role("img", name="1.00").count() == 1
