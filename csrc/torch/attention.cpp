// The attention operators on the CPU.
#include "attention.h"

#include "attention_operators.h"
#include "cpu_device.h"

namespace fastseq {

at::Tensor attention_output_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                const AttentionOptions& options) {
  return std::get<0>(attention_operators::forward<CpuDevice>(query, key, value, options, false));
}

template AttentionForwardSignature attention_forward<CpuDevice>;
template AttentionBackwardSignature attention_backward<CpuDevice>;

}  // namespace fastseq
