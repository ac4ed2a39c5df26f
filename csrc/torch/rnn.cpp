// The recurrent operators on the CPU, and what there is on the CPU alone: the call without the dispatcher, and weights
// that are packed once.
#include "rnn.h"

#include "cpu_device.h"
#include "rnn_operators.h"

namespace fastseq {

namespace {

template <class T>
std::vector<at::Tensor> pack(const RnnArguments& a, const RnnStack& stack) {
  const rnn_operators::Inputs in(stack, a);
  const cpu::TypedKernels<T>& kernels = cpu::kernels().typed<T>();
  std::vector<at::Tensor> out;
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    RnnLayer<T> p;
    rnn_operators::fill_layer(p, stack, in, layer, in.x);
    const int64_t numbers = kernels.rnn_packed_numbers[static_cast<int>(stack.cell)](p);
    for (int d = 0; d < p.directions; ++d) {
      out.push_back(empty({numbers}, a.x));
      kernels.rnn_pack[static_cast<int>(stack.cell)](p, d, mutable_pointer<T>(out.back()));
    }
  }
  return out;
}

}  // namespace

std::vector<at::Tensor> pack_weights(const RnnArguments& a, const RnnStack& stack) {
  const CpuDevice device(a.x);
  return with_type<CpuDevice>(a.x.scalar_type(), [&](auto zero) { return pack<decltype(zero)>(a, stack); });
}

RnnOutputs run_forward(const RnnArguments& a, const RnnStack& stack, bool save, const Prepacked* prepacked) {
  return rnn_operators::run_forward(CpuDevice(a.x), a, stack, save, prepacked);
}

template RnnForwardSignature rnn_forward<CpuDevice>;
template RnnBackwardSignature rnn_backward<CpuDevice>;

}  // namespace fastseq
