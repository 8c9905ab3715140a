"""Writes docs/images/ui.png, the page after a question, and prints how soon new sentences answer: ``tests/ui/picture.py``.

After ``make test-ui``, which installs what it needs.  The time is from the click on Answer to the first letter of the
adapter's answer on the page, of ten sentences that the server has not seen, one after the other.
"""

import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "ui.png"
PORT = 7861
SENTENCES = (
    "Name the animal.", "Write the last word.", "Give the second word.", "Put the word in brackets.", "Name the city.",
    "Count the words.", "Write the first letter.", "Give the colour.", "Repeat the sentence.", "Name the fruit.",
)  # fmt: skip
DONE = "document.querySelector('#state')?.textContent === 'done'"
CLICK = """() => {
  document.querySelector('#state')?.remove();
  const begun = performance.now();
  window.taken = null;
  window.watch?.disconnect();  // of the click before
  window.watch = new MutationObserver(() => {
    const cells = document.querySelectorAll('#answers td');
    if (window.taken === null && document.querySelector('#state') && cells[cells.length - 1].textContent)
      window.taken = performance.now() - begun;
  });
  window.watch.observe(document.querySelector('#answers'), {childList: true, subtree: true, characterData: true});
  document.querySelector('#answer').click();
}"""


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
            taken = [answered(page, sentence) for sentence in SENTENCES]
            browser.close()
    finally:
        process.kill()
    print(f"first adapted token after the click: median {statistics.median(taken):.0f} ms, at most {max(taken):.0f} ms")


def picture(page) -> None:
    page.evaluate(CLICK)
    page.wait_for_function(DONE)
    page.evaluate("document.querySelector('#state').textContent = ''")
    page.locator("#look").click()
    page.locator("#near [role=gridcell]", has_text="Extract").locator("visible=true").first.wait_for()
    page.wait_for_timeout(1500)  # the plot is drawn later
    page.screenshot(path=PICTURE)


def answered(page, sentence: str) -> float:
    """Milliseconds until the adapter of ``sentence`` began to answer."""
    page.locator("#descriptions textarea").fill(sentence)
    page.wait_for_timeout(500)
    page.evaluate(CLICK)
    page.wait_for_function(DONE)
    return page.evaluate("window.taken")


if __name__ == "__main__":
    main()
