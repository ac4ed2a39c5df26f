"""The command line as a user types it, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest


def fastseq(*arguments, check=None, **environment):
    command = [sys.executable, "-m", "fastseq", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("command", [(), ("info",), ("check",), ("bench",), ("demo",)])
def test_help_teaches(command):
    text = fastseq(*command, "--help", check=0).stdout
    assert "Usage: python -m fastseq" in text and len(text.splitlines()) > 5


def test_info_names_what_matters():
    text = fastseq("info", check=0).stdout
    for word in ("fastseq", "torch", "compiler", "instruction set", "threads", "CUDA"):
        assert word in text


def test_a_nonsense_isa_is_one_sentence():
    done = fastseq("info", FASTSEQ_ISA="sse9")
    assert done.returncode == 1 and "sse9" in done.stderr.splitlines()[-1]


def test_check_passes_here():
    text = fastseq("check", "--cell", "gru", "--check", "reference", check=0).stdout
    assert "reference" in text and "all passed" in text


def test_check_refuses_an_unknown_cell():
    assert "no case of the list fits" in fastseq("check", "--cell", "gated", check=2).stderr


SMALL = ("--hidden", 16, "--steps", 12, "--batch", 4, "--seq", 12, "--sample", 40, "--threads", 1)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.py").write_text("def f(x):\n    return x + 1  # a line like many others\n" * 60)
    return folder


def test_demo_writes_its_results(tmp_path, text):
    out = tmp_path / "out"
    done = fastseq("demo", *SMALL, "--text", text, "--out", out, check=0)
    results = json.loads((out / "results.json").read_text())
    assert [cell["cell"] for cell in results["cells"]] == ["RNN", "LSTM", "GRU"]
    for cell in results["cells"]:
        assert cell["passed"] and cell["complete"] and cell["ratio"] > 0
        assert len(cell["losses"]["fastseq"]) == len(cell["losses"]["torch.nn"]) == 12
        assert cell["losses"]["fastseq"][-1] < cell["losses"]["fastseq"][0]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "samples.txt").read_text()) > 3 * 40
    assert done.stdout.count("PASS") == 6
    assert sorted(path.name for path in out.iterdir()) == ["losses.png", "results.json", "samples.txt"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--hidden", 0), "--hidden"),
        (("--steps", -1), "--steps"),
        (("--cell", "transformer"), "--cell"),
        (("--out", __file__ + "/below"), "cannot write to"),
        (("--text", "/nowhere"), "no *.py files"),
        (("--batch", 10**9), "smaller --batch or --seq"),
    ],
)
def test_demo_refuses_what_makes_no_sense_before_training(arguments, message, text, tmp_path):
    given = () if "--text" in arguments else ("--text", text)
    done = fastseq("demo", "--out", tmp_path / "out", *given, *arguments, check=2)
    assert message in done.stderr and "step" not in done.stdout


def test_demo_stops_cleanly(text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastseq", "demo", "--cell", "gru", "--hidden", "16", "--steps", "1000000"]
    command += ["--batch", "4", "--seq", "12", "--threads", "1", "--text", str(text), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:  # the float64 steps are done: the long run has begun
        if "step 50 of 50" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "saved" in errors
    cell = json.loads((out / "results.json").read_text())["cells"][0]
    assert not cell["complete"] and cell["losses"]["fastseq"]


def test_bench_compares_before_it_times(tmp_path):
    from fastseq.bench import Point, compare, full_grid, markdown

    assert len(full_grid()) == 3 * 3 * 3 * 4 * 2 + 3 * 2 * 2
    row = compare(Point("GRU", 5, 2, 16, "training"), rounds=3)
    assert row.ratio > 0 and row.error < 1e-4
    assert "| GRU | 5 | 2 | 16 | training |" in markdown([row])


def test_bench_refuses_a_folder_as_file(tmp_path):
    assert "is a folder" in fastseq("bench", "--json", tmp_path, check=2).stderr
