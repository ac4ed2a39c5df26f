"""The kernels' exp, sigmoid, tanh and exp2_of_score over their whole domain, within csrc/cpu/vec_math.h's bounds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastseq import _C

FUNCTIONS = ["exp", "sigmoid", "tanh"]  # over all numbers; exp2_of_score has a test of its own
TYPES = [np.float32, np.float64]
HEADER = Path(__file__).resolve().parent.parent / "csrc/cpu/vec_math.h"


def bounds():
    """From the header's own words: "exp 2, sigmoid 4, tanh 4, ..."."""
    return {
        name: float(units)
        for name, units in re.findall(r"(exp|sigmoid|tanh|exp2_of_score) (\d+)[,.]", HEADER.read_text())
    }


@np.errstate(over="ignore", under="ignore")
def exact(function, x):
    """In a wider type: double for float, long double (11 bits more) for double."""
    wide = x.astype(np.float64 if x.dtype == np.float32 else np.longdouble)
    if function == "exp":
        return np.exp(wide)
    if function == "tanh":
        return np.tanh(wide)
    if function == "exp2_of_score":  # zero where it would be no normal number
        return np.where(wide < np.finfo(x.dtype).minexp, 0, np.exp2(wide))
    z = np.exp(-np.abs(wide))  # without cancellation or overflow on either side
    return np.where(wide < 0, z, 1) / (1 + z)


def unit(y, dtype):
    """The distance between neighbours of the type at |y|."""
    facts = np.finfo(dtype)
    _, exponent = np.frexp(np.minimum(np.abs(y), float(facts.max)))
    return np.ldexp(np.ones_like(y), np.maximum(exponent - 1, facts.minexp) - facts.nmant)


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def errors_in_units(function, x):
    y, expected = _C.vec_math(function, x), exact(function, x)
    largest = expected.dtype.type(np.finfo(x.dtype).max)
    overflows = expected > largest + unit(largest, x.dtype) / 2
    assert np.isinf(y[overflows]).all()
    assert np.isfinite(y[~overflows]).all()
    difference = np.abs(y[~overflows].astype(expected.dtype) - expected[~overflows])
    return difference / unit(expected[~overflows], x.dtype), x[~overflows]


def within(function, x):
    errors, x = errors_in_units(function, x)
    worst = int(errors.argmax())
    bound = bounds()[function]
    assert errors[worst] <= bound, f"{function}({x[worst]!r}) is {errors[worst]:.2f} units off, more than {bound}"


def patterns(dtype, count):
    """Finite numbers evenly over the bit patterns: every exponent of both signs, denormals among them."""
    integer = np.uint32 if dtype == np.float32 else np.uint64
    bits = 8 * np.dtype(dtype).itemsize
    step = (1 << bits) // count
    start = int(np.random.default_rng().integers(step))
    x = (np.arange(count, dtype=integer) * integer(step) + integer(start)).view(dtype)
    return x[np.isfinite(x)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_over_all_exponents(function, dtype):
    within(function, patterns(dtype, 1 << (21 if dtype == np.float32 else 19)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_where_the_function_changes(function, dtype):
    """Densely where results are neither constant nor their argument, and around every border of the code."""
    generator = np.random.default_rng()
    ranges = {"exp": (-110, 92), "sigmoid": (-110, 20), "tanh": (-12, 12)}[function]
    if dtype == np.float64:
        ranges = {"exp": (-750, 715), "sigmoid": (-750, 40), "tanh": (-22, 22)}[function]
    within(function, generator.uniform(*ranges, 1 << 19).astype(dtype))
    within(function, generator.uniform(-1, 1, 1 << 18).astype(dtype))
    borders = [
        0,
        0.5,
        1,
        9,
        10,
        18,
        20,
        22,
        87.33,
        88.03,
        88.73,
        89,
        103.3,
        103.98,
        104,
        708.4,
        709.79,
        710,
        745.2,
        746,
    ]
    borders = np.array([*borders, *(np.log(2) * (np.arange(1, 40) / 2))])
    near = borders[:, None] * (1 + np.arange(-500, 501) * float(np.finfo(dtype).eps))
    within(function, np.concatenate([near.ravel(), -near.ravel()]).astype(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_exponentials_of_scores(dtype):
    """Of a softmax, whose largest is 0, or a little more by rounding."""
    x = patterns(dtype, 1 << 20)
    within("exp2_of_score", x[x <= 1])
    lowest = float(np.finfo(dtype).minexp)
    within("exp2_of_score", np.random.default_rng().uniform(lowest - 3, 1, 1 << 19).astype(dtype))
    near = np.arange(-200, 3)[:, None] / 2 * (1 + np.arange(-500, 501) * float(np.finfo(dtype).eps))
    within("exp2_of_score", near[near <= 1].astype(dtype))
    special = np.array([-np.inf, 0.0, -0.0, 1.0, lowest, np.nextafter(dtype(lowest), dtype(-np.inf)), np.nan], dtype)
    expected = np.array([0, 1, 1, 2, 2.0**lowest, 0, np.nan], dtype)
    np.testing.assert_array_equal(_C.vec_math("exp2_of_score", special), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_denormal_results(dtype):
    """exp and sigmoid go down to the smallest denormal, tanh returns a denormal argument."""
    facts = np.finfo(dtype)
    low, high = np.log(float(facts.smallest_normal)) + 1, np.log(float(facts.smallest_subnormal)) - 1
    x = np.linspace(low, high, 200001).astype(dtype)
    for function in ("exp", "sigmoid"):
        within(function, x)
        y = _C.vec_math(function, x)
        assert ((y > 0) & (y < facts.smallest_normal)).any()
    tiny = np.array([facts.smallest_subnormal, facts.smallest_normal / 3, facts.smallest_normal], dtype)
    tiny = np.concatenate([tiny, -tiny])
    np.testing.assert_array_equal(_C.vec_math("tanh", tiny), tiny)


@pytest.mark.parametrize("dtype", TYPES)
def test_special_values(dtype):
    largest = np.finfo(dtype).max
    x = np.array([np.inf, -np.inf, largest, -largest, 0.0, -0.0], dtype)
    expected = {
        "exp": [np.inf, 0, np.inf, 0, 1, 1],
        "sigmoid": [1, 0, 1, 0, 0.5, 0.5],
        "tanh": [1, -1, 1, -1, 0, -0.0],
    }
    for function, values in expected.items():
        y = _C.vec_math(function, x)
        np.testing.assert_array_equal(y, np.array(values, dtype))
        np.testing.assert_array_equal(np.signbit(y), np.signbit(np.array(values)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_stays_nan_and_stays_in_its_lane(function, dtype):
    for n in (1, 3, 4, 15, 16, 17, 33):
        for place in range(n):
            x = np.linspace(-2, 2, n).astype(dtype)
            expected = _C.vec_math(function, x)
            expected[place] = x[place] = np.nan
            np.testing.assert_array_equal(_C.vec_math(function, x), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_odd_and_in_range(dtype):
    x = patterns(dtype, 1 << 16)
    y = _C.vec_math("tanh", x)
    np.testing.assert_array_equal(_C.vec_math("tanh", -x), -y)
    assert (np.abs(y) <= 1).all()
    sigmoid = _C.vec_math("sigmoid", x)
    assert ((sigmoid >= 0) & (sigmoid <= 1)).all()
    assert (_C.vec_math("exp", x) >= 0).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_size_and_place_in_memory(function, dtype):
    """Tails of a vector, and storage that begins anywhere, give the bits that whole vectors give."""
    x = np.random.default_rng().standard_normal(200).astype(dtype)
    expected = _C.vec_math(function, x)
    for n in range(70):
        for start in (0, 1, 3):
            np.testing.assert_array_equal(_C.vec_math(function, x[start : start + n]), expected[start : start + n])


def test_bad_calls():
    with pytest.raises(ValueError, match="function must be exp, sigmoid, tanh or exp2_of_score; got 'sin'"):
        _C.vec_math("sin", np.zeros(1))
    with pytest.raises(TypeError):
        _C.vec_math("exp", np.zeros(1, np.float16))


@pytest.mark.parametrize("isa", [isa for isa in _C.available_isas() if isa != _C.isa()])
def test_on_the_other_instruction_sets(isa):
    """This file's bounds again with other kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not instruction_sets"]
    run = subprocess.run(command, env={**os.environ, "FASTSEQ_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
