"""A tree with committed results, for tests that change it."""

import shutil

from bench.report import pages
from bench.source import ROOT


def copy_results(folder):
    """Make ``folder``, and return it: one machine's result of each suite, and the documents that hold blocks."""
    (folder / pages.RESULTS).mkdir(parents=True)
    first = {path.name.partition(".")[0]: path for path in sorted((ROOT / pages.RESULTS).glob("*.jsonl"), reverse=True)}
    for path in first.values():
        shutil.copy(path, folder / pages.RESULTS)
    for document in pages.BLOCKS.values():
        (folder / document).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / document, folder / document)
    return folder
