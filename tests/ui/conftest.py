"""The page on the packaged model, in this process, and Chromium."""

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import document_checkpoint, run, tiny_llama  # noqa: F401

CHECKPOINT, SLOTS, LONGEST = "smollm2-135m", 4, 200


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ui)


@pytest.fixture(scope="session")
def desk():
    pytest.importorskip("gradio", reason='pip install "t2l_engine[ui]"')
    from t2l_engine.cli.common import DType, EngineOptions
    from t2l_engine.cli.desk import open_desk

    made = open_desk(EngineOptions(CHECKPOINT), slots=SLOTS, max_new_tokens=LONGEST, dtype=DType.float32)
    yield made
    made.side_by_side.close()


@pytest.fixture(scope="session")
def page(desk):
    from t2l_engine.serving.page import Page

    return Page(desk.side_by_side, desk.save, title="Under test", max_new_tokens=LONGEST)


@pytest.fixture(scope="session")
def address(page):
    """Of the page, served on a free port."""
    blocks = page.blocks([], "")
    _, url, _ = blocks.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, **page.launch_options())
    yield url
    blocks.close(verbose=False)


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium, or the one that Playwright has installed."""
    api = pytest.importorskip("playwright.sync_api", reason='pip install "t2l_engine[browser]"')
    with api.sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def window(chromium, address):
    """A function that opens a new window on the page; all are closed."""
    opened = []

    def open_window(width=1280, height=900):
        opened.append(chromium.new_context(viewport={"width": width, "height": height}))
        found = opened[-1].new_page()
        found.set_default_timeout(60_000)
        found.goto(address)
        found.get_by_role("button", name="Answer").wait_for()
        return found

    yield open_window
    for context in opened:
        context.close()
