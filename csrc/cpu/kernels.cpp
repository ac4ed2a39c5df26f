// Compiled once for each instruction set, with FASTSEQ_ISA_NAMESPACE set to its name. Everything with code in it is
// included inside that namespace: an inline function compiled for AVX-512 must never be the copy the linker keeps for
// another instruction set. For the same reason no standard-library template is used here.
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dispatch.h"
#include "memory.h"

extern "C" {  // libgomp, the OpenMP runtime of torch (parallel.h)
void GOMP_parallel(void (*region)(void*), void* data, unsigned threads, unsigned flags);
int omp_in_parallel(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

#define FASTSEQ_INLINE inline __attribute__((always_inline))
#define FASTSEQ_STRING_(x) #x
#define FASTSEQ_STRING(x) FASTSEQ_STRING_(x)

#if defined(FASTSEQ_ISA_BASE)  // float and double are that instruction set's
namespace fastseq::cpu::FASTSEQ_ISA_BASE {
extern const TypedKernels<float> kF32;
extern const TypedKernels<double> kF64;
extern const Probes<float> kProbesF32;
extern const Probes<double> kProbesF64;
}  // namespace fastseq::cpu::FASTSEQ_ISA_BASE
#endif

namespace fastseq::cpu::FASTSEQ_ISA_NAMESPACE {

#include "vec.h"
#include "vec_math.h"
#include "vectors.h"
#include "../cells.h"
#include "terms.h"
#include "amx.h"
#include "panel.h"
#include "amx_product.h"
#include "workspace.h"
#include "parallel.h"
#include "direct.h"
#include "step_weights.h"
#include "gemm_block.h"
#include "gemm_amx.h"
#include "gemm.h"
#include "rnn_driver.h"
#include "rnn_forward.h"
#include "rnn_backward.h"
#include "rnn_stack.h"
#include "../random.h"
#include "../attention_entry.h"
#include "attention_blocks.h"
#include "attention_amx.h"
#include "attention_driver.h"
#include "attention_scores.h"
#include "attention_forward.h"
#include "attention_few.h"
#include "attention_backward.h"
#include "probe.h"

template <class T, Vec<T> (*F)(Vec<T>)>
void map(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<T>::size) F(Vec<T>::load(x + i, n - i)).store(y + i, n - i);
}

template <class T>
constexpr TypedKernels<T> typed_kernels() {
  return {
#define X(name, type) rnn_layers_at_once<type, T>,
      {FASTSEQ_FOR_EACH_CELL(X)},
#undef X
#define X(name, type) rnn_forward<type, T>,
      {FASTSEQ_FOR_EACH_CELL(X)},
#undef X
#define X(name, type) rnn_backward<type, T>,
      {FASTSEQ_FOR_EACH_CELL(X)},
#undef X
#define X(name, type) rnn_packed_numbers<type, T>,
      {FASTSEQ_FOR_EACH_CELL(X)},
#undef X
#define X(name, type) rnn_pack<type, T>,
      {FASTSEQ_FOR_EACH_CELL(X)},
#undef X
      attention_forward<T>,       attention_backward<T>, attention_mask_backward<T>,
  };
}
template <class T>
void gemm_of_rows(int threads, int64_t m, int64_t n, int64_t k, const T* a, const T* b, Compute<T>* c) {
  gemm(threads, m, n, k, rows_of(a, k), rows_of(b, n), false, c, n);
}
template <class T>
constexpr Probes<T> probes_of() {
  return {
      map<T, exp<T>>, map<T, sigmoid<T>>, map<T, tanh<T>>, map<T, exp2_of_score<T>>, gemm_of_rows<T>, fma_rate<T>,
  };
}

#if defined(FASTSEQ_ISA_BASE)
using fastseq::cpu::FASTSEQ_ISA_BASE::kF32;
using fastseq::cpu::FASTSEQ_ISA_BASE::kF64;
using fastseq::cpu::FASTSEQ_ISA_BASE::kProbesF32;
using fastseq::cpu::FASTSEQ_ISA_BASE::kProbesF64;
#else
extern const TypedKernels<float> kF32;
extern const TypedKernels<double> kF64;
extern const Probes<float> kProbesF32;
extern const Probes<double> kProbesF64;
const TypedKernels<float> kF32 = typed_kernels<float>();
const TypedKernels<double> kF64 = typed_kernels<double>();
const Probes<float> kProbesF32 = probes_of<float>();
const Probes<double> kProbesF64 = probes_of<double>();
#endif
static const TypedKernels<bfloat16> kBf16 = typed_kernels<bfloat16>();

extern const Kernels kTable;
const Kernels kTable = {
    FASTSEQ_STRING(FASTSEQ_ISA_NAMESPACE),
#define X(name, type) {#name, type::gates, type::kept, type::cell_state},
    {FASTSEQ_FOR_EACH_CELL(X)},
#undef X
    &kF32,
    &kF64,
    &kBf16,
    &kProbesF32,
    &kProbesF64,
    gemm_of_rows<bfloat16>,
    read_rate,
    meeting_seconds,
};

}  // namespace fastseq::cpu::FASTSEQ_ISA_NAMESPACE
