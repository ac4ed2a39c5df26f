"""The CUDA kernels, run on the CPU from their own sources (csrc/cuda/emulation): right under several orders of their
threads, and free of what ThreadSanitizer and AddressSanitizer report. `make cuda-test` runs these alone.
"""

import pytest
from cuda_emulation import (
    ROOT,
    SANITIZERS,
    assert_all_pass,
    build,
    configure,
    skip_without_emulation,
    skip_without_sanitizer,
)

pytestmark = pytest.mark.slow


def built(name, *options):
    folder = ROOT / "build" / name
    configure(ROOT, folder, *options)
    build(folder)
    return folder


@pytest.fixture(scope="module")
def plain():
    skip_without_emulation()
    return built("cuda-emulated")


@pytest.fixture(scope="module", params=SANITIZERS)
def sanitized(request):
    skip_without_emulation()
    skip_without_sanitizer(request.param)
    return built(f"cuda-emulated-{request.param}", SANITIZERS[request.param][0])


def test_the_emulation_is_as_cuda_is(plain):
    assert_all_pass(plain, ("emulation",))


@pytest.mark.parametrize("schedule", ["first-to-last", "last-to-first", "random:1"])
def test_kernels_are_right_whatever_the_order_of_threads(plain, schedule):
    sizes = [] if schedule.startswith("random") else ["--quick"]
    assert_all_pass(plain, ("attention", *sizes), ("rnn", *sizes), schedule=schedule)


def test_sanitizers_have_nothing_to_report(sanitized):
    assert_all_pass(sanitized, ("attention", "--races"), ("rnn", "--races"), ("emulation",))
