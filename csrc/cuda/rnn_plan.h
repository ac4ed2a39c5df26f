// Which way a layer goes: all steps in one launch with W_hh kept on the chip, or step by step; and by what tiles.
#pragma once

#include <string>

#include "../params.h"
#include "launch.h"

namespace fastseq::cuda {

struct DeviceFacts {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // that a block may have, and, of these kernels, a multiprocessor
  bool cooperative = false;
};
cudaError_t device_facts(DeviceFacts& facts);  // of the current device

// What the choice depends on beside the device.
struct RnnSizes {
  int gates = 1;
  int64_t batch = 0, hidden = 0, projected = 0, directions = 1;
  int64_t number_bytes = 4;
  bool scheduled = true;  // rows are of one length, or the device has the tables that tell
  bool aligned = false;   // tensors that are read by 16 bytes begin at multiples of them
};

// kUnits and kRows of rnn_persistent.cuh.
struct PersistentTile {
  int units, rows;
};
constexpr PersistentTile kPersistentTiles[] = {{8, 16}, {8, 32}, {8, 64}, {16, 16}, {16, 32}, {16, 64}};

// Floats, of which each is two factors, take more registers than there are.
constexpr bool fits_registers(PersistentTile tile, int64_t number_bytes) {
  return number_bytes == 2 || tile.units * tile.rows < 1024;
}

struct RnnPlan {
  bool persistent = false;
  PersistentTile tile{};
  dim3 grid;
  int64_t shared = 0;
  std::string reason;  // in a sentence
};

RnnPlan plan_rnn_forward(const RnnSizes& sizes, const DeviceFacts& device);
RnnPlan plan_rnn_backward(const RnnSizes& sizes, const DeviceFacts& device);

}  // namespace fastseq::cuda
