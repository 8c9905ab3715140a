"""What MkDocs does not do by itself.  Pages link to files elsewhere in the repository: the site holds a copy of each."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown, page, config, files):
    here = Path(page.file.abs_src_path).parent

    def link(match):
        target = (here / match[1]).resolve()
        if target.is_relative_to(config.docs_dir) or not (target.is_relative_to(ROOT) and target.is_file()):
            return match[0]
        copy = f"files/{target.relative_to(ROOT).as_posix()}"
        copy += ".txt" if target.suffix == ".md" else ""  # else it would be a page without a place in the navigation
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(target)))
        return f"]({'../' * page.file.src_uri.count('/')}{copy})"

    return re.sub(r"\]\((\.\./[^)#\s]+)\)", link, markdown)


def on_page_content(html, page, config, files):
    return re.sub(r":(?:attr|class|func|meth|mod):(?=<code>)", "", html)  # roles of Sphinx in docstrings
