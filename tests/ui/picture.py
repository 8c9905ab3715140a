"""Writes docs/images/ui.png, the page after a question: ``python tests/ui/picture.py``, after ``make test-ui``."""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "ui.png"
PORT = 7861
DONE = "document.querySelector('#state')?.textContent === 'done'"


def main() -> None:
    command = [sys.executable, "-m", "t2l_engine", "ui", "--port", str(PORT)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stderr if "the page is at" in line)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1180, "height": 1060})
            page.goto(f"http://127.0.0.1:{PORT}")
            page.locator("#answer").wait_for()
            picture(page)
            browser.close()
    finally:
        process.kill()


def picture(page) -> None:
    page.locator("#answer").click()
    page.wait_for_function(DONE)
    page.evaluate("document.querySelector('#state').textContent = ''")
    page.locator("#look").click()
    page.locator("#near [role=gridcell]", has_text="Extract").locator("visible=true").first.wait_for()
    page.wait_for_timeout(1500)  # the plot is drawn later
    page.screenshot(path=PICTURE)


if __name__ == "__main__":
    main()
