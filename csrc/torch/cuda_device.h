// What the operators ask of a device, of CUDA: kernels on torch's current stream, with memory of torch's allocator. A
// call waits for nothing and reads nothing of the device's, so a CUDA graph can capture it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <limits>

#include "../cpu/memory.h"
#include "../cuda/attention.h"
#include "../cuda/rnn.h"
#include "attention.h"
#include "build_info.h"

namespace fastseq {

class CudaDevice {
 public:
  static constexpr bool kTakesFloat16 = true;
  static constexpr int64_t kMostHeadSize = kMostCudaHeadSize;

  // For as long as the object lives, the device of the input is the current one.
  explicit CudaDevice(const at::Tensor& input) : guard_(checked(input)), stream_(c10::cuda::getCurrentCUDAStream()) {}

  at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) const {
    at::Tensor out = at::empty(sizes, like.options());
    if (cpu::blocks_are_poisoned()) out.fill_(std::numeric_limits<double>::quiet_NaN());
    return out;
  }

  // The same numbers on the device; those that are there already stay. The copy is from pinned memory, as others wait.
  at::Tensor take(const at::Tensor& t, const char* name) const {
    if (!t.device().is_cpu()) return t;
    check_runs_once(name);
    return t.pin_memory().to(guard_.current_device(), t.scalar_type(), /*non_blocking=*/true);
  }

  // Refuses a call that is captured into a CUDA graph if a number of it would then be the same that should be another.
  void check_runs_once(const char* name) const {
    TORCH_CHECK(!capturing(), "a CUDA graph cannot capture a call with ", name,
                ", which is read on the CPU: it would have the same ", "numbers in every replay");
  }

  // Layers are given to the next two one at a time.
  template <class T>
  int rnn_layers_at_once(CellKind, const RnnLayer<T>&, int64_t, bool) const {
    return 1;
  }
  template <class T>
  void rnn_forward(CellKind cell, at::ArrayRef<RnnForward<T>> layers) const {
    const RnnForward<T>& p = layers.front();
    run_with_products<T>(cuda::rnn_forward_workspace(cell, p), [&](cuda::Call& call) {
      tell_schedule(p.schedule, call);
      return cuda::rnn_forward(cell, p, call);
    });
  }
  template <class T>
  void rnn_backward(CellKind cell, at::ArrayRef<RnnBackward<T>> layers) const {
    const RnnBackward<T>& p = layers.front();
    run_with_products<T>(cuda::rnn_backward_workspace(cell, p), [&](cuda::Call& call) {
      tell_schedule(p.schedule, call);
      return cuda::rnn_backward(cell, p, call);
    });
  }
  template <class T>
  void attention_forward(const AttentionForward<T, Computed<T>>& p) const {
    run(cuda::attention_forward_workspace<T>(p),
        [&](const cuda::Call& call) { return cuda::attention_forward<T>(p, call); });
  }
  template <class T>
  void attention_backward(const AttentionBackward<T, Computed<T>>& p) const {
    run(cuda::attention_backward_workspace<T>(p),
        [&](const cuda::Call& call) { return cuda::attention_backward<T>(p, call); });
  }
  template <class T>
  void attention_mask_backward(const AttentionMaskBackward<T, Computed<T>>& p) const {
    run(cuda::attention_backward_workspace<T>(p),
        [&](const cuda::Call& call) { return cuda::attention_mask_backward<T>(p, call); });
  }

 private:
  // torch asks the device of any argument that has one for the operator.
  static c10::Device checked(const at::Tensor& input) {
    TORCH_CHECK(input.is_cuda(), "the input must be on the CUDA device of the other tensors; got ", input.device());
    return input.device();
  }

  static bool capturing() {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }

  // The tables of a ragged schedule in the device's memory, once for all layers of the call. A CUDA graph would find
  // those of this call gone, and goes step by step.
  void tell_schedule(const Schedule& schedule, cuda::Call& call) const {
    if (!schedule.batch_sizes || capturing()) return;
    const int64_t T = schedule.steps;
    if (!tables_.defined()) {
      const at::Tensor tables = at::empty({2 * T + 1}, at::TensorOptions(at::kLong).pinned_memory(true));
      int64_t* const numbers = tables.mutable_data_ptr<int64_t>();
      std::copy(schedule.batch_sizes, schedule.batch_sizes + T, numbers);
      std::copy(schedule.offsets, schedule.offsets + T + 1, numbers + T);
      tables_ = tables.to(guard_.current_device(), at::kLong, /*non_blocking=*/true);
    }
    call.batch_sizes = tables_.const_data_ptr<int64_t>(), call.offsets = call.batch_sizes + T;
  }

  struct Blas {
    cublasHandle_t handle;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  };

  template <class Kernels>
  void run(int64_t workspace_bytes, const Kernels& kernels) const {
    at::Tensor workspace;
    cuda::Call call;
    call.stream = stream_.stream();
    if (workspace_bytes > 0) {
      workspace = at::empty({workspace_bytes}, at::TensorOptions(guard_.current_device()).dtype(at::kByte));
      if (cpu::blocks_are_poisoned()) workspace.fill_(0xff);  // NaN, in every type
      call.workspace = workspace.mutable_data_ptr();
    }
    const cudaError_t error = kernels(call);
    TORCH_CHECK(error == cudaSuccess, "a CUDA kernel of fastseq could not be run: ", cudaGetErrorString(error),
                " (this build has kernels for ", build_info::cuda_archs, ")");
  }

  // The same with cuBLAS for the products. torch's handle is on the current stream, with torch's workspace, and takes
  // TF32 where torch's settings allow it; so then do the library's own products.
  template <class T, class Kernels>
  void run_with_products(int64_t workspace_bytes, const Kernels& kernels) const {
    Blas blas{at::cuda::getCurrentCUDABlasHandle()};
    cublasMath_t mode;
    check(cublasGetMathMode(blas.handle, &mode));
    if constexpr (sizeof(T) == 2)  // sums stay in float to the end
      check(cublasSetMathMode(blas.handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    run(workspace_bytes, [&](cuda::Call& call) {
      call.gemm = multiply, call.gemm_context = &blas;
      call.tf32 = mode == CUBLAS_TF32_TENSOR_OP_MATH;
      const cudaError_t error = kernels(call);
      check(blas.status);
      return error;
    });
  }

  static void check(cublasStatus_t status) {
    TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLAS could not multiply: ", cublasGetStatusString(status));
  }

  static cudaDataType data_type(cuda::NumberType type) {
    switch (type) {
      case cuda::NumberType::float64:
        return CUDA_R_64F;
      case cuda::NumberType::bfloat16:
        return CUDA_R_16BF;
      case cuda::NumberType::float16:
        return CUDA_R_16F;
      default:
        return CUDA_R_32F;
    }
  }

  static cudaError_t multiply(const cuda::Product& product, void* context, void* stream) {
    Blas& blas = *static_cast<Blas*>(context);
    const cudaDataType factors = data_type(product.factors), result = data_type(product.result);
    const bool in_double = factors == CUDA_R_64F;
    if (product.k == 0) {  // and no a and b
      const size_t number = result == CUDA_R_64F ? 8 : result == CUDA_R_32F ? 4 : 2;
      return product.accumulate ? cudaSuccess
                                : cudaMemset2DAsync(product.c, product.c_row * number, 0, product.n * number, product.m,
                                                    static_cast<cudaStream_t>(stream));
    }
    const double one_double = 1, beta_double = product.accumulate;
    const float one_float = 1, beta_float = product.accumulate;
    // cuBLAS has columns where we have rows, so its matrices are our transposed ones: c^T = b^T a^T.
    const auto operation = [](bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
    blas.status = cublasGemmEx_64(
        blas.handle, operation(product.b_transposed), operation(product.a_transposed), product.n, product.m, product.k,
        in_double ? static_cast<const void*>(&one_double) : &one_float, product.b, factors, product.b_row, product.a,
        factors, product.a_row, in_double ? static_cast<const void*>(&beta_double) : &beta_float, product.c, result,
        product.c_row, in_double ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    return blas.status == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown;
  }

  const c10::cuda::CUDAGuard guard_;
  const c10::cuda::CUDAStream stream_;
  mutable at::Tensor tables_;
};

}  // namespace fastseq
