"""What the pages link to outside of this folder becomes part of the site: pictures, programs."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"(?<=\]\()\.\./([\w./-]+)")  # the target of a link of a page in this folder


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds each file that a page links to as ``../PATH``, under that path."""
    root = Path(config.config_file_path).parent
    pages = Path(config.docs_dir).glob("*.md")
    targets = {path for page in pages for path in OUTSIDE.findall(page.read_text())}
    for path in sorted(targets):
        files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Leads such links there."""
    is_in_subfolder = "/" in page.file.src_uri
    return markdown if is_in_subfolder else OUTSIDE.sub(r"\1", markdown)
