// The operators' schemas and registrations.
#include <torch/library.h>

#include "attention.h"
#include "rnn.h"

TORCH_LIBRARY(fastseq, m) {
  m.def(
      "rnn_forward(str cell, Tensor x, Tensor? hx, Tensor? cx, Tensor[] weights, Tensor[] dropout_masks, "
      "Tensor? lengths, Tensor? batch_sizes, int num_layers, bool bidirectional, bool bias, bool save) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)");
  m.def(
      "rnn_backward(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, str cell, Tensor x, Tensor? hx, Tensor? cx, "
      "Tensor[] weights, Tensor[] dropout_masks, Tensor? lengths, Tensor? batch_sizes, int num_layers, "
      "bool bidirectional, bool bias, Tensor output, Tensor reserve, bool[] needs) -> Tensor[]");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, "
      "Tensor? dropout_seed, Tensor? query_starts, Tensor? key_starts, Tensor? query_lengths, Tensor? key_lengths, "
      "float scale, float softcap, float dropout_p, SymInt? low, SymInt? high, bool from_end) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor? d_out, Tensor? d_lse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor? alibi_slopes, "
      "Tensor? dropout_seed, Tensor? query_starts, Tensor? key_starts, Tensor? query_lengths, Tensor? key_lengths, "
      "float scale, float softcap, float dropout_p, SymInt? low, SymInt? high, bool from_end, "
      "Tensor out, Tensor lse, bool[] needs) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("rnn_forward", fastseq::rnn_forward<fastseq::CpuDevice>);
  m.impl("rnn_backward", fastseq::rnn_backward<fastseq::CpuDevice>);
  m.impl("attention_forward", fastseq::attention_forward<fastseq::CpuDevice>);
  m.impl("attention_backward", fastseq::attention_backward<fastseq::CpuDevice>);
}

TORCH_LIBRARY_IMPL(fastseq, Autograd, m) {
  m.impl("rnn_forward", fastseq::rnn_forward_autograd);
  m.impl("attention_forward", fastseq::attention_forward_autograd);
}
