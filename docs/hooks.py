"""What MkDocs does not do by itself: pages and files from elsewhere in the repository, and the style of our docstrings."""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files, config):
    """Pages that lie beside the README."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown, page, config, files):
    """Links are those of the repository; what the site lacks otherwise is copied into it, below ``files/``."""
    here = Path(page.file.abs_src_path).parent

    def link(match):
        target = (here / match[1]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return match[0]
        path = target.relative_to(ROOT).as_posix()
        uri = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, f"files/{path}")
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return "](" + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))

    return re.sub(r"\]\((?!https?:|#)([^)#\s]+)", link, markdown)


class Docstrings(griffe.Extension):
    """Examples become blocks of code, and roles of Sphinx plain code."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = re.sub(r"(?m)^>>>.*(?:\n.+)*", r"```pycon\n\g<0>\n```", obj.docstring.value)
            obj.docstring.value = re.sub(r":(?:attr|class|func|meth|mod):(?=`)", "", text)
