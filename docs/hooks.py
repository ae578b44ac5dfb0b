"""What mkdocs does beyond Markdown: the results of bench/, pages that lie in the root, drawings made from the code."""

import importlib.util
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
FROM_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files, config):
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for card in sorted((ROOT / "avfusion/models/weights").glob("*.md")):
        text = card.read_text(encoding="utf-8").split("---\n", 2)[2]  # without the Hub's front matter
        files.append(File.generated(config, f"weights/{card.name}", content=text))
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that work in the repository work here; `<!-- draw: NAME -->` is a drawing, `<!-- results -->` a list."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)?bench/results/([^)]*)\)", rf"]({up}results/\1)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?docs/([^)]*)\)", rf"]({up}\1)", markdown)
    markdown = re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?:tests|avfusion|avfkernels|csrc)/[^)]*\)", r"\1", markdown)
    markdown = re.sub(r"<!-- draw: (\w+) -->", lambda found: _drawing(found[1]), markdown)
    return markdown.replace("<!-- results -->", _results())


def _drawing(name: str) -> str:
    spec = importlib.util.spec_from_file_location("drawings", Path(__file__).with_name("drawings.py"))
    drawings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawings)
    return f'<div class="drawing">{getattr(drawings, name)()}</div>'


def _results() -> str:
    files = [path for path in sorted(RESULTS.iterdir()) if path.suffix != ".png"]
    return "\n".join(f"- [`{path.name}`](results/{path.name})" for path in files)
