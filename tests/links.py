"""Links and paths in the pages that lead nowhere.

python -m tests.links           of all pages; the status is 1 when there is one
python -m tests.links PAGE...   of these

A link is a Markdown link without a scheme; a path is a word with a slash in `backticks`, seen from
the page's folder, the repository's or the package's. Fenced blocks are left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "kernels/**/README.md")
# These tell of files as they were: the log on its days, the changelog before a change.
NOT_PAGES = ("docs/log.md", "CHANGELOG.md")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)[^)]*\)")
# A span may go over the end of a line, not over that of a paragraph.
SPAN = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")
PATH = re.compile(r"(?:\.{1,2}/)*[A-Za-z_.*][\w.*-]*(?:/[\w.*-]+)*/?")
# What commands make, and names that the reader fills in: RUN/release.
NOT_OURS = re.compile(
    r"(\.venv|my-env|build|runs)/.*|data/(?!.*\.py$).*|(checkpoints|release|samples|tensorboard)/.*"
    r"|(.*/)?[A-Z][A-Z-]+(/.*)?"
)


def pages(root: Path = ROOT) -> list[Path]:
    """All pages whose links are kept."""
    found = {page for pattern in PAGES for page in root.glob(pattern)}
    return sorted(page for page in found if str(page.relative_to(root)) not in NOT_PAGES)


def broken(page: Path, root: Path = ROOT) -> list[str]:
    """`README.md:12: docs/gone.md` for each link or path of a page that leads nowhere."""
    text = FENCED.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())
    found = []
    for link in LINK.finditer(text):
        if not (page.parent / link[1]).exists():
            found.append((link.start(), link[1]))
    for span in SPAN.finditer(text):
        paths = (word for word in span[1].split() if "/" in word and PATH.fullmatch(word))
        found += [(span.start(), path) for path in paths if not _leads(path, page, root)]
    name = page.relative_to(root)
    return [f"{name}:{text.count(chr(10), 0, at) + 1}: {where}" for at, where in sorted(found)]


def _leads(path: str, page: Path, root: Path) -> bool:
    bases = (page.parent, root, root / "dalle_dist")
    exists = any((base / path).exists() or any(base.glob(path)) for base in bases)
    return exists or bool(NOT_OURS.fullmatch(path))


def main(names: list[str]) -> int:
    chosen = [Path(name).resolve() for name in names] or pages()
    found = [line for page in chosen for line in broken(page)]
    for line in found:
        print(f"{line} does not exist")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
