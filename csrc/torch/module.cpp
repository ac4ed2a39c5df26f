// The Python module fastseq._C: importing it loads the operators; what it exposes are facts about the build, probes
// and the direct call.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../attention_params.h"
#include "attention.h"
#include "build_info.h"
#include "counters.h"
#include "direct_call.h"
#include "memory.h"
#include "probes.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace fastseq;
  m.doc() = "Build facts, kernel counters and test probes of fastseq's extension.";
  isa();  // a FASTSEQ_ISA that makes no sense is an error here and now

  m.def("version", [] { return build_info::version; });
  m.def(
      "build_info",
      [] {
        py::dict out;
        out["version"] = build_info::version;
        out["torch"] = build_info::torch;
        out["compiler"] = build_info::compiler;
        out["flags"] = build_info::flags;
        out["build_type"] = build_info::build_type;
        return out;
      },
      "How this extension was built.");
  m.def(
      "cuda",
      [] {
        py::dict out;
        out["built"] = build_info::cuda_built;
        out["why"] = build_info::cuda_why;
        out["version"] = build_info::cuda_version;
        out["archs"] = build_info::cuda_archs;
        return out;
      },
      "Whether CUDA kernels are in this build and why, of which CUDA, and for which architectures.");
  m.def("isa", &isa, "The instruction set in use.");
  m.def("available_isas", &available_isas, "Instruction sets in this build that this machine runs, best first.");
  m.def(
      "cells",
      [] {
        py::dict out;
        for (const CellFacts& facts : cells()) {
          py::dict entry;
          entry["gates"] = facts.gates;
          entry["kept"] = facts.kept;
          entry["states"] = facts.cell_state ? 2 : 1;
          out[facts.name] = entry;
        }
        return out;
      },
      "The cells: gates (G), planes of H kept for backward, states (1: h; 2: h and c).");
  m.attr("FEW_QUERIES") = kFewQueries;
  m.attr("MOST_CUDA_HEAD_SIZE") = kMostCudaHeadSize;
  m.def("counters", &counters, "Calls of each kernel since the start or the last reset; only kernels that ran.");
  m.def("direct_calls", &direct_calls,
        "Calls since then that went by direct_layer and direct_cell; counters has them too.");
  m.def("reset_counters", [] {
    reset_counters();
    reset_direct_calls();
  });
  m.def("empty_cache", &empty_cache, "Gives the memory that kernels keep for their next call back to the system.");
  m.def("poison_memory", &poison_memory, py::arg("poison"),
        "For tests: whether the memory that kernels work in comes full of NaN.");
  add_direct_calls(m.ptr());

  const auto probe = [](const std::string& function, const auto& x) {
    auto y = std::decay_t<decltype(x)>(x.size());
    vec_math(function, x.data(), y.mutable_data(), x.size());
    return y;
  };
  const char* doc = "The kernels' own exp, sigmoid, tanh or exp2_of_score of a contiguous float32 or float64 array.";
  m.def(
      "vec_math", [=](const std::string& f, const py::array_t<float, py::array::c_style>& x) { return probe(f, x); },
      py::arg("function"), py::arg("x").noconvert(), doc);
  m.def(
      "vec_math", [=](const std::string& f, const py::array_t<double, py::array::c_style>& x) { return probe(f, x); },
      py::arg("function"), py::arg("x").noconvert(), doc);

  const auto product = [](const auto& a, const auto& b, auto* a_data, auto* b_data) {
    if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(0))
      throw std::invalid_argument("gemm takes a (m, k) and b (k, n)");
    auto c = py::array_t<float>({a.shape(0), b.shape(1)});
    float* c_data = c.mutable_data();
    const int64_t m = a.shape(0), n = b.shape(1), k = a.shape(1);
    {
      py::gil_scoped_release unlocked;
      gemm(m, n, k, a_data, b_data, c_data);
    }
    return c;
  };
  using Floats = py::array_t<float, py::array::c_style>;
  using Halves = py::array_t<uint16_t, py::array::c_style>;
  const char* gemm_doc =
      "a b of contiguous float32 matrices (m, k) and (k, n), or of the bits of bfloat16 ones, uint16, by the kernels' "
      "own product on torch's number of threads: float32.";
  m.def(
      "gemm", [=](const Floats& a, const Floats& b) { return product(a, b, a.data(), b.data()); },
      py::arg("a").noconvert(), py::arg("b").noconvert(), gemm_doc);
  m.def(
      "gemm",
      [=](const Halves& a, const Halves& b) {
        return product(a, b, reinterpret_cast<const bfloat16*>(a.data()), reinterpret_cast<const bfloat16*>(b.data()));
      },
      py::arg("a").noconvert(), py::arg("b").noconvert(), gemm_doc);
  m.def("fma_rate", &fma_rate, py::arg("iterations"), py::arg("threads") = 1, py::arg("dtype") = "float32",
        py::call_guard<py::gil_scoped_release>(),
        "FLOP/s of multiply-adds in registers alone, `iterations` rounds of twelve vectors on each thread.");
  m.def("read_rate", &read_rate, py::arg("bytes"), py::arg("repeats"), py::arg("threads") = 1,
        py::call_guard<py::gil_scoped_release>(),
        "Bytes/s that the threads read together, each `repeats` times over `bytes` of its own.");
  m.def("meeting_seconds", &meeting_seconds, py::arg("times"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Seconds in which the threads meet once, of `times`, each having written a line that the others then read; "
        "NaN where not all of them came.");
}
