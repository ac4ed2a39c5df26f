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


@pytest.mark.parametrize(
    "command",
    [(), ("info",), ("check",), ("bench",), ("bench", "report"), ("bench", "compare"), ("demo",)]
    + [("train-gpt2",), ("generate",)],
)
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


def started(command):
    """A process that takes Ctrl-C, which a shell tells those that it runs in the background to ignore."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_demo_stops_cleanly(text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastseq", "demo", "--cell", "gru", "--hidden", "16", "--steps", "1000000"]
    command += ["--batch", "4", "--seq", "12", "--threads", "1", "--text", str(text), "--out", str(out)]
    process = started(command)
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


BENCH = (
    "--cell",
    "GRU",
    "--mode",
    "inference",
    "--only",
    "H=128",
    "--only",
    "T=25",
    "--peer",
    "torch.nn",
    "--rounds",
    1,
)


def test_bench_measures_reports_resumes_and_compares(tmp_path):
    path = tmp_path / "results.json"
    done = fastseq("bench", *BENCH, "--json", path, "--markdown", tmp_path / "tables.md", check=0)
    assert "GRU inference float32 T25 B1 I128 H128" in done.stdout
    assert "INCOMPLETE: jax was not measured: it was not asked for" in done.stdout
    results = json.loads(path.read_text())
    (row,) = results["rows"].values()
    assert len(row["contenders"]["fastseq"]["samples"]) >= 1 and row["contenders"]["torch.nn"]["error"] < 1e-4
    assert results["machine"]["gemm"]["float32"]["rate"] > results["machine"]["bandwidth"]["memory"] / 100 > 0
    assert path.with_suffix(".html").exists() and (tmp_path / "tables.md").exists()

    again = fastseq("bench", *BENCH, "--json", path, check=0)
    assert "1 of 1 rows were there" in again.stderr
    assert json.loads(path.read_text())["rows"] == results["rows"]

    quiet, slower = tmp_path / "quiet.json", tmp_path / "slower.json"
    for contender in row["contenders"].values():  # every sample counts, however busy this machine was
        for sample in contender.get("samples", ()):
            sample[1] = 1e11
    quiet.write_text(json.dumps(results))
    fastseq("bench", "report", quiet, "--markdown", tmp_path / "tables.md", check=0)
    assert "<svg" in quiet.with_suffix(".html").read_text()
    assert "| GRU inference float32 T25" in (tmp_path / "tables.md").read_text().replace("**", "")
    for sample in row["contenders"]["fastseq"]["samples"]:
        sample[0] *= 1.5
    slower.write_text(json.dumps(results))
    assert "0 regressions" in fastseq("bench", "compare", quiet, quiet, check=0).stdout
    assert "REGRESSION" in fastseq("bench", "compare", quiet, slower, check=1).stdout
    assert "GRU inference" in fastseq("bench", "report", slower, check=0).stdout

    path.write_text(json.dumps(results | {"build": "another"}))
    assert "was measured with another build" in fastseq("bench", *BENCH, "--json", path, check=2).stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--only", "X=1"), "a size is chosen as T>=16"),
        (("--only", "T=3"), "no point of the grid fits"),
        (("--peer", "tensorflow"), "--peer"),
        (("report", __file__), "cannot be read as results"),
    ],
)
def test_bench_refuses_what_makes_no_sense_before_it_measures(arguments, message, tmp_path):
    given = () if arguments[0] == "report" else ("--json", tmp_path / "results.json")
    assert message in fastseq("bench", *given, *arguments, check=2).stderr


def test_bench_refuses_a_folder_as_file(tmp_path):
    assert "is a folder" in fastseq("bench", "--json", tmp_path, check=2).stderr


def test_bench_stopped_keeps_what_it_has(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "fastseq", "bench", "--part", "rows", "--peer", "torch.nn", "--json", str(path)]
    process = started(command)
    end = time.monotonic() + 120
    while time.monotonic() < end and not (path.exists() and json.loads(path.read_text())["rows"]):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors and "Traceback" not in errors
    assert json.loads(path.read_text())["rows"] and "planned rows were not measured" in output


TINY = ("--width", 16, "--layers", 1, "--heads", 2, "--context", 24, "--batch", 2, "--threads", 1)


def train_gpt2(out, text, *arguments):
    return [*map(str, ("train-gpt2", *TINY, "--text", text, "--out", out, *arguments))]


def test_train_gpt2_stopped_goes_on_to_the_same_bits(text, tmp_path):
    pytest.importorskip("safetensors")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = fastseq(*train_gpt2(whole, text, "--steps", 400), check=0)
    assert "4-gram: " in done.stdout and "The self-trained model is in" in done.stdout
    files = ["README.md", "checkpoint.pt", "config.json", "model.safetensors", "training.png"]
    assert sorted(path.name for path in whole.iterdir()) == files
    assert (whole / "training.png").read_bytes().startswith(b"\x89PNG")
    card = (whole / "README.md").read_text()
    assert "self-trained" in card and "not OpenAI's weights" in card and "def " in card
    assert json.loads((whole / "config.json").read_text())["self_trained"] is True

    process = started([sys.executable, "-m", "fastseq", *train_gpt2(parts, text, "--steps", 400)])
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors and "Traceback" not in errors
    assert sorted(path.name for path in parts.iterdir()) == ["checkpoint.pt"]

    again = fastseq(*train_gpt2(parts, text, "--steps", 400), check=0)
    assert "going on after step" in again.stderr
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    other = fastseq(*train_gpt2(parts, text, "--steps", 400, "--seed", 1), check=2)
    assert "is of a training with another seed: choose another --out, or --fresh" in other.stderr
    fastseq(*train_gpt2(parts, text, "--steps", 20, "--seed", 1, "--fresh"), check=0)
    assert (parts / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    (parts / "checkpoint.pt").write_bytes(b"damaged")
    assert "cannot be read as a checkpoint" in fastseq(*train_gpt2(parts, text), check=2).stderr


def test_train_gpt2_takes_a_bpe(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bpe, out = tmp_path / "bpe", tmp_path / "out"
    bpe.mkdir()
    made = tokenizers.ByteLevelBPETokenizer()
    made.train([str(path) for path in text.iterdir()], vocab_size=280, show_progress=False)
    made.save_model(str(bpe))
    fastseq(*train_gpt2(out, text, "--steps", 5, "--bpe", bpe), check=0)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == made.get_vocab_size()
    assert "(BPE)" in (out / "README.md").read_text() and (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--heads", 3), "n_head must be a divisor of n_embd=16"),
        (("--batch", 10**9), "smaller --batch or --context"),
        (("--text", "/nowhere"), "no *.py files"),
        (("--out", __file__ + "/below"), "cannot write to"),
        (("--bpe", os.path.dirname(__file__)), "has no tokenizer: vocab.json and merges.txt"),
        (("--learning-rate", 0), "--learning-rate"),
    ],
)
def test_train_gpt2_refuses_what_makes_no_sense_before_training(arguments, message, text, tmp_path):
    done = fastseq(*train_gpt2(tmp_path / "out", text, *arguments), check=2)
    assert message in done.stderr and "step" not in done.stdout


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    pytest.importorskip("safetensors")
    from fastseq.models import GPT2, GPT2Config

    folder = tmp_path_factory.mktemp("gpt2")
    sizes = dict(vocab_size=256, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=None)
    GPT2(GPT2Config(**sizes, self_trained=True)).save_pretrained(folder)
    return folder


def test_generate_writes_text(gpt2):
    drawn = ("generate", "--weights", gpt2, "--prompt", "né", "--max-new-tokens", 20, "--seed", 3, "--top-k", 50)
    first, second = fastseq(*drawn, check=0), fastseq(*drawn, check=0)
    assert first.stdout == second.stdout and first.stdout.startswith("né") and len(first.stdout) > 5
    assert "self-trained" in first.stderr
    beams = fastseq("generate", "--weights", gpt2, "--prompt", "a", "--beams", 2, "--max-new-tokens", 5, check=0)
    assert beams.stdout.startswith("a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-new-tokens", 99), "n_positions=64"),
        (("--temperature", 0), "temperature must be positive"),
        (("--top-p", 1.5), "top_p must be within"),
        (("--greedy", "--top-k", 3), "are for tokens that are drawn"),
        (("--prompt", ""), "a token or more"),
        (("--stop", ""), "must not be empty"),
    ],
    ids=str,
)
def test_generate_refuses_in_a_sentence(gpt2, options, message):
    assert (
        message
        in fastseq("generate", "--weights", gpt2, "--prompt", "a", "--max-new-tokens", 5, *options, check=2).stderr
    )


def test_generate_refuses_a_folder_without_a_model(tmp_path):
    pytest.importorskip("safetensors")
    assert "config.json" in fastseq("generate", "--weights", tmp_path, "--prompt", "a", check=2).stderr
    assert "does not exist" in fastseq("generate", "--weights", tmp_path / "no", "--prompt", "a", check=2).stderr
