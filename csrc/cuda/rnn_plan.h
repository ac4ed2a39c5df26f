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

// kUnits, kRows and kHolds of rnn_persistent.cuh: whether registers hold a part of the weights. Where shared memory
// alone would do, that gave nothing sure on an H100, from 8% slower to 11% faster; so such a tile has to be clearly
// cheaper.
struct PersistentTile {
  int units, rows;
  bool held = false;
};
constexpr PersistentTile kPersistentTiles[] = {
    {8, 16}, {8, 32}, {8, 64}, {16, 16}, {16, 32}, {16, 64}, {16, 16, true}, {16, 32, true}, {16, 64, true}};

// Floats, of which each is two factors, take more registers than there are, and so do weights of more than 16 rows
// where there are sixteen warps. The weights of a single gate fit without wherever its blocks do.
constexpr bool there_is(PersistentTile tile, int threads, int gates, int64_t number_bytes) {
  if (number_bytes > 2) return !tile.held && tile.units * tile.rows < 1024;
  return !tile.held || (gates > 1 && (threads <= 256 || tile.rows == 16));
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
