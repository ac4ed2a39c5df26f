#include "stack.h"

#include <algorithm>
#include <numeric>

#include "types.h"

namespace fastseq {

namespace {

CellKind find_cell(const std::string& name) {
  const auto& cells = cpu::kernels().cells;
  for (const CellFacts& facts : cells)
    if (name == facts.name) return static_cast<CellKind>(&facts - cells);
  std::string known;
  for (const CellFacts& facts : cells) known += (known.empty() ? "" : ", ") + std::string(facts.name);
  TORCH_CHECK_VALUE(false, "cell must be one of ", known, "; got '", name, "'");
}

int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t out = 1;
  for (int64_t factor : factors)
    TORCH_CHECK(!__builtin_mul_overflow(out, factor, &out),
                "the sizes of this call overflow a 64-bit count: ", at::IntArrayRef(factors.begin(), factors.size()));
  return out;
}

void check_like(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of the input, ", x.scalar_type(),
              "; got ", t.scalar_type());
  check_device(name, t, x);
}

// `where` is put together only for the message: in a call of one step these checks are a part of the time.
template <class Where>
void check_sizes(const char* name, const Where& where, const char* letters, const at::Tensor& t,
                 at::IntArrayRef expected, const std::string& cell) {
  TORCH_CHECK(t.sizes() == expected, name, where(), " must be ", letters, " = ", expected, " for cell '", cell,
              "'; got ", t.sizes());
}

const char* nowhere() { return ""; }

at::Tensor int64_on_cpu(const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 1 && t.scalar_type() == at::kLong && t.device().is_cpu(), name,
              " must be a 1-D int64 tensor on the CPU; got ", t.dim(), "-D ", t.scalar_type(), " on ", t.device());
  return t.contiguous();
}

}  // namespace

RnnStack::RnnStack(const RnnArguments& a)
    : cell(find_cell(a.cell)),
      facts(cpu::kernels().cells[static_cast<int>(cell)]),
      bias(a.bias),
      layers(a.num_layers),
      directions(a.bidirectional ? 2 : 1) {
  const bool packed = a.batch_sizes.has_value();
  single_step = a.x.dim() == 2 && !packed;
  TORCH_CHECK(a.x.dim() == 2 || (a.x.dim() == 3 && !packed), "input must be (T, B, I), (B, I) for a single step, or ",
              "(N, I) with batch_sizes; got ", a.x.sizes());
  check_kernel_type(a.x);
  TORCH_CHECK(layers >= 1, "num_layers must be at least 1; got ", layers);
  TORCH_CHECK(!single_step || (layers == 1 && directions == 1 && !a.lengths),
              "a single step (2-D input) is one layer, one direction, no lengths; got num_layers=", layers,
              ", bidirectional=", a.bidirectional, a.lengths ? ", lengths" : "");
  TORCH_CHECK(!(packed && a.lengths), "lengths and batch_sizes exclude each other; got both");

  const auto per_direction = static_cast<int64_t>(a.weights.size()) / (layers * directions);
  projected = false;
  projected = per_direction == weights_per_direction() + 1;
  TORCH_CHECK(static_cast<int64_t>(a.weights.size()) == layers * directions * weights_per_direction() &&
                  (!projected || facts.cell_state),
              "weights must hold ", bias ? 4 : 2, " tensors (one more with a projection, LSTM only) a layer and ",
              "direction, of ", layers * directions, "; got ", a.weights.size());
  TORCH_CHECK(a.weights[1].dim() == 2, "w_hh must be 2-D (G*H, H); got ", a.weights[1].sizes());
  hidden_size = a.weights[1].size(0) / facts.gates;
  out_size = a.weights[1].size(1);
  TORCH_CHECK(hidden_size > 0 && out_size > 0, "w_hh must be (G*H, H) with H at least 1; got ", a.weights[1].sizes());
  input_size = a.x.size(-1);

  steps = single_step ? 1 : packed ? 0 : a.x.size(0);
  batch = single_step ? a.x.size(0) : packed ? 0 : a.x.size(1);
  if (packed) take_batch_sizes(*a.batch_sizes, a.x);
  padded_rows = packed ? a.x.size(0) : checked_product({steps, batch});
  if (a.lengths) take_lengths(*a.lengths);

  check_weights(a);
  check_states(a);
  TORCH_CHECK(
      a.dropout_masks.empty() || static_cast<int64_t>(a.dropout_masks.size()) == layers - 1,
      "dropout_masks must be empty or one for each layer but the last, ", layers - 1, "; got ", a.dropout_masks.size());
  for (const at::Tensor& mask : a.dropout_masks) {
    check_like("a dropout mask", mask, a.x);
    check_sizes("a dropout mask", nowhere, "(T, B, D*Hout)", mask, output_sizes(a.x), a.cell);
  }
}

void RnnStack::check_weights(const RnnArguments& a) const {
  const int64_t GH = facts.gates * hidden_size;
  for (int64_t i = 0, n = 0; i < layers * directions; ++i) {
    const auto where = [&] { return layers * directions > 1 ? " of layer " + std::to_string(i / directions) : ""; };
    const auto check = [&](const char* name, const char* letters, std::initializer_list<int64_t> expected) {
      const at::Tensor& w = a.weights[n++];
      check_like(name, w, a.x);
      check_sizes(name, where, letters, w, expected, a.cell);
    };
    check("w_ih", "(G*H, I)", {GH, layer_input_size(i / directions)});
    check("w_hh", projected ? "(G*H, P)" : "(G*H, H)", {GH, projected ? out_size : hidden_size});
    if (bias) {
      check("b_ih", "(G*H,)", {GH});
      check("b_hh", "(G*H,)", {GH});
    }
    if (projected) check("w_hr", "(P, H)", {out_size, hidden_size});
  }
}

void RnnStack::check_states(const RnnArguments& a) const {
  TORCH_CHECK(facts.cell_state || !a.cx, "cell '", a.cell, "' has no cell state; got a cx");
  const char* letters = single_step ? "(B, Hout)" : "(num_layers*D, B, Hout)";
  if (a.hx) {
    check_like("hx", *a.hx, a.x);
    check_sizes("hx", nowhere, letters, *a.hx, state_sizes(out_size), a.cell);
  }
  if (a.cx) {
    check_like("cx", *a.cx, a.x);
    check_sizes("cx", nowhere, letters, *a.cx, state_sizes(hidden_size), a.cell);
  }
}

void RnnStack::take_batch_sizes(const at::Tensor& tensor, const at::Tensor& x) {
  const at::Tensor sizes = int64_on_cpu("batch_sizes", tensor);
  steps = sizes.size(0);
  batch_sizes.assign(sizes.const_data_ptr<int64_t>(), sizes.const_data_ptr<int64_t>() + steps);
  batch = steps ? batch_sizes[0] : 0;
  int64_t total = 0;
  for (int64_t t = 0; t < steps; ++t) {
    TORCH_CHECK(batch_sizes[t] > 0 && (t == 0 || batch_sizes[t] <= batch_sizes[t - 1]),
                "batch_sizes must be positive and never grow; got ", batch_sizes[t], " at step ", t);
    total += batch_sizes[t];
  }
  TORCH_CHECK(
      total == x.size(0), "batch_sizes must add up to the rows of the packed input, ", x.size(0), "; got ", total);
  if (steps && batch_sizes.back() == batch) batch_sizes.clear();  // dense after all
  make_offsets();
}

void RnnStack::take_lengths(const at::Tensor& tensor) {
  const at::Tensor lengths = int64_on_cpu("lengths", tensor);
  TORCH_CHECK(lengths.size(0) == batch, "lengths must be (B,) = (", batch, ",); got ", lengths.sizes());
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  bool dense = true;
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(length[b] >= 0 && length[b] <= steps, "lengths must be within 0..T = 0..", steps, "; got ",
                      length[b], " for row ", b);
    dense = dense && length[b] == steps;
  }
  if (dense) return;

  order = at::empty({batch}, at::kLong);
  rank = at::empty({batch}, at::kLong);
  int64_t* by_length = order.mutable_data_ptr<int64_t>();
  std::iota(by_length, by_length + batch, 0);
  std::stable_sort(by_length, by_length + batch, [&](int64_t a, int64_t b) { return length[a] > length[b]; });
  for (int64_t r = 0; r < batch; ++r) rank.mutable_data_ptr<int64_t>()[by_length[r]] = r;

  for (int64_t t = 0, alive = batch; t < length[by_length[0]]; ++t) {
    while (length[by_length[alive - 1]] <= t) --alive;
    batch_sizes.push_back(alive);
  }
  make_offsets();
  rows = at::empty({offsets.back()}, at::kLong);
  int64_t* to = rows.mutable_data_ptr<int64_t>();
  for (size_t t = 0; t < batch_sizes.size(); ++t)
    for (int64_t r = 0; r < batch_sizes[t]; ++r) *to++ = static_cast<int64_t>(t) * batch + by_length[r];
}

void RnnStack::make_offsets() {
  offsets.assign(1, 0);
  for (int64_t size : batch_sizes) offsets.push_back(offsets.back() + size);
}

Schedule RnnStack::schedule() const {
  if (rows.defined())
    return {static_cast<int64_t>(batch_sizes.size()), batch, batch_sizes.data(), offsets.data(), steps};
  if (!batch_sizes.empty()) return {steps, batch, batch_sizes.data(), offsets.data()};
  return {steps, batch, nullptr, nullptr};
}

at::DimVector RnnStack::output_sizes(const at::Tensor& x) const {
  at::DimVector sizes(x.sizes());
  sizes.back() = directions * out_size;
  return sizes;
}

at::DimVector RnnStack::state_sizes(int64_t state_size) const {
  if (single_step) return {batch, state_size};
  return {layers * directions, batch, state_size};
}

int64_t RnnStack::reserve_numel() const { return layer_reserve(layers - 1).output; }

RnnStack::LayerReserve RnnStack::layer_reserve(int64_t layer) const {
  const int64_t output = checked_product({padded_rows, directions, out_size});
  const int64_t kept = checked_product({padded_rows, facts.kept, hidden_size});
  const int64_t emitted = projected ? padded_rows * hidden_size : 0;
  LayerReserve at{};
  const int64_t begin = checked_product({layer, output + directions * (kept + emitted)});
  for (int d = 0; d < 2; ++d) {
    at.kept[d] = begin + d * (kept + emitted);
    at.emitted[d] = at.kept[d] + kept;
  }
  at.output = begin + directions * (kept + emitted);
  return at;
}

at::Tensor RnnStack::to_rows(const at::Tensor& padded) const {
  return rows.defined() ? padded.reshape({padded_rows, padded.size(-1)}).index_select(0, rows) : padded.contiguous();
}

at::Tensor RnnStack::from_rows(const at::Tensor& all, at::IntArrayRef sizes) const {
  if (!rows.defined()) return all.sizes() == sizes ? all : all.view(sizes);
  at::Tensor padded = at::zeros({padded_rows, all.size(1)}, all.options());
  padded.index_copy_(0, rows, all);
  return padded.view(sizes);
}

at::Tensor RnnStack::to_order(const at::Tensor& state) const {
  return order.defined() ? state.index_select(1, order) : state.contiguous();
}
at::Tensor RnnStack::from_order(const at::Tensor& state) const {
  return order.defined() ? state.index_select(1, rank) : state;
}

}  // namespace fastseq
