"""docs/adding-a-cell.md, followed to the letter: its blocks applied to a copy of the tree, built and checked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastseq import _C

ROOT = Path(__file__).resolve().parent.parent
TREE = ["CMakeLists.txt", "LICENSE", "README.md", "cmake", "csrc", "fastseq", "pyproject.toml", "setup.py"]

# <!-- file: PATH, after: a part of a line --> and the block of code that goes there
EDIT = re.compile(
    r"^<!-- file: (\S+), (after|before|in place of|at the end)(?:: ([^\n]+))? -->\n```\w+\n(.*?)^```$", re.M | re.S
)
CHECK = re.compile(r"^<!-- check -->\n```python\n(.*?)^```$", re.M | re.S)

# Beyond the page's own check, and without its tools: that kernels ran, in every form and dtype, and a module's life.
MORE = """
import copy, itertools, pickle
from fastseq import _C, ops, reference

facts = _C.cells()["ugrnn"]
assert (facts["gates"], facts["kept"], facts["states"]) == (2, 2, 1), facts

# Few steps are matrix products, more run on packed panels; H below, at and beyond the width of a vector.
for dtype, T, H, bias in itertools.product((torch.float32, torch.float64), (3, 12), (3, 16, 33), (True, False)):
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-9, 1e-11)
    shapes = [(2 * H, 5), (2 * H, H)] + [(2 * H,)] * (2 if bias else 0)
    weights = [torch.randn(shape, dtype=dtype).div(H**0.5).requires_grad_() for shape in shapes]
    sizes = torch.tensor([3] * (T - 1) + [1])
    packed = ((int(sizes.sum()), 5), (1, 3, H), {"batch_sizes": sizes})
    for x_shape, h_shape, form in [((T, 3, 5), (1, 3, H), {}), ((3, 5), (3, H), {}), packed]:
        x, h_0 = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in (x_shape, h_shape))
        _C.reset_counters()
        results = []
        for rnn in (ops.rnn, reference.rnn):
            output, h_n, _ = rnn("ugrnn", x, h_0, None, weights, bias=bias, **form)
            loss = output.sin().sum() + h_n.cos().sum()
            results.append((output, h_n, *torch.autograd.grad(loss, (x, h_0, *weights))))
        torch.testing.assert_close(*results, rtol=rtol, atol=atol)
        name = f"ugrnn/{str(dtype).removeprefix('torch.')}"
        assert _C.counters() == {f"rnn_forward/{name}": 1, f"rnn_backward/{name}": 1}, _C.counters()

# Double backward, and torch.func by the reference.
x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
layer = fastseq.rnn.UGRNN(5, 4, dtype=torch.float64)
assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (x,), fast_mode=True)
loss = lambda x: layer(x)[0].sin().sum()
torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(x), x)[0])

# Copies, and what the kernels do not take.
for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
    assert torch.equal(twin(x)[0], layer(x)[0])
half = copy.deepcopy(layer).half()
output, h_n = half(x.half(), lengths=[2, 3])
assert output.dtype == h_n.dtype == torch.float16
torch.testing.assert_close(output.double(), layer(x, lengths=[2, 3])[0], rtol=0.01, atol=0.01)
assert fastseq.explain(half, x.half()).path == "reference"
with torch.autocast("cpu", torch.bfloat16):
    assert fastseq.rnn.UGRNN(5, 4)(x.float())[0].shape == (3, 2, 4)
print("all held")
"""


def edits_of(page: str) -> list[tuple[str, str, str, str]]:
    """(path, where, anchor, text) of each edit that the page asks for; every block of code is one, but the check."""
    edits = EDIT.findall(page)
    assert len(edits) + len(CHECK.findall(page)) == len(re.findall(r"^```(?:cpp|python)$", page, re.M))
    return edits


def apply_edit(text: str, where: str, anchor: str, addition: str) -> str:
    if where == "at the end":
        return text + addition
    lines = text.splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if anchor in line]
    assert len(places) == 1, f"{anchor!r} must be in one line; it is in {len(places)}"
    begin = places[0] + (where == "after")
    end = places[0] + (where != "before")
    return "".join([*lines[:begin], addition, *lines[end:]])


def test_the_page_names_four_files_and_about_a_hundred_lines():
    edits = edits_of((ROOT / "docs/adding-a-cell.md").read_text())
    assert len({path for path, *_ in edits}) == 4
    assert sum(len(text.strip().splitlines()) for *_, text in edits) <= 100


@pytest.mark.slow
def test_a_cell_added_by_the_page_works(tmp_path):
    page = (ROOT / "docs/adding-a-cell.md").read_text()
    for name in TREE:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")  # what was built here is not what is tested
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    for path, where, anchor, addition in edits_of(page):
        file = tmp_path / path
        file.write_text(apply_edit(file.read_text(), where, anchor, addition))

    # The flags of no build type are those of CXXFLAGS: for a test, compiling must be quick rather than the code fast.
    quick = {"FASTSEQ_ISAS": _C.isa(), "FASTSEQ_BUILD_TYPE": "None", "CXXFLAGS": "-O1"}
    run(tmp_path, quick, "setup.py", "-q", "build_ext", "--inplace")
    (check,) = CHECK.findall(page)
    (tmp_path / "check.py").write_text(check + MORE)
    # In this folder the copy comes before an installed fastseq.
    output = run(tmp_path, {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}, "check.py")
    assert f"fastseq.UGRNN runs fastseq::rnn_forward (ugrnn, float64, {_C.isa()})" in output
    assert output.endswith("all held\n")


def run(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout
