// What forward and backward of a layer share: where a step's tensors are.
#pragma once

#include "gemm.h"
#include "rnn_plan.h"
#include "rnn_steps.cuh"
#include "workspace.h"

namespace fastseq::cuda {

template <class T>
constexpr NumberType number_type() {
  return std::is_same_v<T, float>      ? NumberType::float32
         : std::is_same_v<T, double>   ? NumberType::float64
         : std::is_same_v<T, bfloat16> ? NumberType::bfloat16
                                       : NumberType::float16;
}

// One direction of a layer.
template <class T>
struct Direction : DirectionSteps {
  const RnnLayer<T>& layer;

  Direction(const RnnLayer<T>& of, int direction) : DirectionSteps{of.schedule, direction}, layer(of) {}

  int64_t rows(int64_t t) const { return schedule.rows(t); }
  int64_t output_row() const { return layer.directions * layer.out_size(); }
  template <class Output>
  Output* output_at(Output* output, int64_t n) const {
    return output ? output + n * output_row() + d * layer.out_size() : nullptr;
  }
  template <class State>
  State* state_at(State* states, int64_t row, int64_t size) const {
    return states ? states + (d * schedule.batch + row) * size : nullptr;
  }

  Before<T> h_before(const T* output, int64_t t) const {
    return before(output_at(output, 0), output_row(), state_at(layer.h0, 0, layer.out_size()), layer.out_size(), t);
  }
  Before<T> c_before(const T* kept, int64_t kept_planes, int64_t t) const {
    const int64_t H = layer.hidden_size;
    if (!kept) return {};  // of a cell without a cell state
    return before(kept + (kept_planes - 1) * H, kept_planes * H, state_at(layer.c0, 0, H), H, t);
  }
};

// use(first row, end row, time) of the rows that end at that time, for each that has some; -1 for rows without steps.
template <class T, class Use>
cudaError_t for_each_end(const Direction<T>& direction, const Use& use) {
  const Schedule& schedule = direction.schedule;
  const int64_t T_ = schedule.steps, alive = T_ ? schedule.rows(0) : 0;
  if (alive < schedule.batch) FASTSEQ_TRY(use(alive, schedule.batch, int64_t(-1)));
  if (direction.d == 1) return alive ? use(int64_t(0), alive, int64_t(0)) : cudaSuccess;
  for (int64_t t = T_ - 1, first = 0; t >= 0 && first < alive; --t) {
    const int64_t end = schedule.rows(t);
    if (end > first) FASTSEQ_TRY(use(first, end, t));
    first = end;
  }
  return cudaSuccess;
}

template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T>
RnnSizes sizes_of(const RnnLayer<T>& layer, const Call& call, int gates) {
  RnnSizes sizes;
  sizes.gates = gates, sizes.batch = layer.schedule.batch, sizes.hidden = layer.hidden_size;
  sizes.projected = layer.proj_size, sizes.directions = layer.directions;
  sizes.number_bytes = sizeof(T);
  sizes.scheduled = !layer.schedule.batch_sizes || (call.batch_sizes && call.offsets);
  return sizes;
}

// The layer's schedule as the device reads it.
template <class T>
Schedule device_schedule(const RnnLayer<T>& layer, const Call& call) {
  Schedule out = layer.schedule;
  if (out.batch_sizes) out.batch_sizes = call.batch_sizes, out.offsets = call.offsets;
  return out;
}

// Whether all steps go in one launch, as the call wants it.
template <class Plan>
cudaError_t choose(const Call& call, const RnnSizes& sizes, const Plan& plan_of, RnnPlan& plan) {
  if (call.rnn_path == RnnPath::stepwise) return cudaSuccess;
  DeviceFacts device;
  FASTSEQ_TRY(device_facts(device));
  plan = plan_of(sizes, device);
  return call.rnn_path == RnnPath::persistent && !plan.persistent ? cudaErrorNotSupported : cudaSuccess;
}

}  // namespace fastseq::cuda
