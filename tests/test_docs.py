"""The documents: examples run, links lead somewhere, and what architecture.md names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import _C

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


def test_the_examples_of_the_readme_run_and_print_what_it_says():
    page = (ROOT / "README.md").read_text()
    printed = []
    for example in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        done = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed += done.stdout.splitlines()
    by_kernel, by_torch = printed
    operator = f"fastseq::rnn_forward (gru, float32, {_C.isa()})"
    assert by_kernel == f"fastseq.GRU runs {operator}: the input is float32 on the CPU."
    assert f"# {by_torch}\n" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_what_the_architecture_names_exists():
    page = (ROOT / "docs/architecture.md").read_text().partition("## To come")[0]
    sources = [path for folder in ("csrc", "fastseq", "tests") for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in [*sources, ROOT / "setup.py"] if path.suffix in (".h", ".cpp", ".py")]
    text = "\n".join(path.read_text() for path in sources if path != Path(__file__))
    block = re.search(r"## The house\n\n```\n(.*?)```", page, re.S).group(1)
    files = set(re.findall(r"[\w/]+\.(?:h|cpp|py)\b", block))
    files |= {name for name in re.findall(r"`([\w/]+\.(?:h|cpp|py))`", page)}
    absent = [name for name in files if not any(str(path).endswith(f"/{name}") for path in sources)]
    assert not absent

    names = {name for name in re.findall(r"`([A-Za-z_][\w.:]*)(?:\([^`]*\))?`", page) if name not in files}
    parts = {part for name in names for part in re.split(r"::|\.", name) if part}
    absent = [part for part in parts if not re.search(rf"\b{part}\b", text)]
    assert not absent
