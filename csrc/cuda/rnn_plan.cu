#include "rnn_plan.h"

#include "rnn_persistent.cuh"

namespace fastseq::cuda {

cudaError_t device_facts(DeviceFacts& facts) {
  int device = 0, shared = 0, cooperative = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, device);
  };
  if (const cudaError_t error = get(facts.multiprocessors, cudaDevAttrMultiProcessorCount)) return error;
  if (const cudaError_t error = get(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return error;
  if (const cudaError_t error = get(cooperative, cudaDevAttrCooperativeLaunch)) return error;
  facts.shared_bytes = shared, facts.cooperative = cooperative != 0;
  return cudaSuccess;
}

namespace {

// Of a block with this tile: as TileProduct has it, of sizes known as the program runs.
int64_t shared_bytes(PersistentTile tile, int threads, int columns, int parts, int64_t hidden_bytes) {
  const int groups = depth_groups_of(threads, tile.rows);
  const int held = held_chunks(tile, threads, columns, parts);
  const int64_t row = parts * stored_of_group(hidden_bytes, groups, held) * groups;
  return columns * weight_row_bytes(row) + int64_t(groups) * tile.rows * sums_row(columns) * 4;
}

// `columns` a unit, and parts of K, each of H numbers: gates and 1 forward, 1 and gates backward.
RnnPlan plan(const RnnSizes& sizes, const DeviceFacts& device, int threads, int columns_of_unit, int parts) {
  RnnPlan out;
  const auto stepwise = [&](const std::string& reason) {
    out.reason = "step by step: " + reason;
    return out;
  };
  if (sizes.number_bytes > 4) return stepwise("float64 has no kernels for all steps in one launch");
  if (sizes.projected) return stepwise("the state is projected, and each step needs a second product");
  if (!sizes.scheduled) return stepwise("the rows are of different lengths, which the device is not told");
  if (const int64_t whole = 16 / sizes.number_bytes; sizes.hidden % whole != 0)
    return stepwise("H = " + std::to_string(sizes.hidden) + " is no multiple of " + std::to_string(whole));
  if (!sizes.aligned) return stepwise("a tensor is not aligned to 16 bytes");
  if (!device.cooperative) return stepwise("the device has no cooperative launches");

  const int64_t hidden_bytes = sizes.hidden * sizes.number_bytes;
  double best = 0;
  int64_t fewest = 0;  // blocks that some tile would need
  for (const PersistentTile tile : kPersistentTiles) {
    const int columns = columns_of_unit * tile.units;
    const int64_t shared = shared_bytes(tile, threads, columns, parts, hidden_bytes);
    const int64_t unit_tiles = (sizes.hidden + tile.units - 1) / tile.units;
    const int64_t row_tiles = (sizes.batch + tile.rows - 1) / tile.rows;
    const int64_t blocks = unit_tiles * row_tiles * sizes.directions;
    if (!there_is(tile, threads, sizes.gates, sizes.number_bytes) || shared > device.shared_bytes) continue;
    fewest = fewest == 0 || blocks < fewest ? blocks : fewest;
    if (blocks > device.multiprocessors) continue;
    // Clocks of a step, roughly: the left side by 64 bytes from the L2 cache, weights and sums by 128 from shared
    // memory.
    const double left = double(tile.rows * parts * hidden_bytes) / 64;
    const double weights = double(columns * parts * hidden_bytes * row_groups_of(tile.rows)) / 128;
    const double sums = 2.0 * 4 * depth_groups_of(threads, tile.rows) * tile.rows * columns / 128;
    const double clocks = (left + weights + sums) * (tile.held ? 1.1 : 1);
    if (out.persistent && clocks >= best) continue;
    best = clocks, out.persistent = true, out.tile = tile, out.shared = shared;
    out.grid = dim3(
        static_cast<unsigned>(unit_tiles), static_cast<unsigned>(row_tiles), static_cast<unsigned>(sizes.directions));
  }
  if (out.persistent) {
    out.reason = std::string("all steps in one launch: W_hh in the ") + (out.tile.held ? "registers and " : "") +
                 "shared memory of " + std::to_string(int64_t(out.grid.x) * out.grid.y * out.grid.z) + " of " +
                 std::to_string(device.multiprocessors) + " multiprocessors, " + std::to_string(out.tile.units) +
                 " units and " + std::to_string(out.tile.rows) + " rows each";
    return out;
  }
  if (fewest == 0) return stepwise("a block's part of W_hh is larger than its shared memory");
  return stepwise("it would take " + std::to_string(fewest) + " blocks at once, and the device has " +
                  std::to_string(device.multiprocessors) + " multiprocessors");
}

}  // namespace

RnnPlan plan_rnn_forward(const RnnSizes& sizes, const DeviceFacts& device) {
  return plan(sizes, device, kForwardThreads, sizes.gates, 1);
}
RnnPlan plan_rnn_backward(const RnnSizes& sizes, const DeviceFacts& device) {
  return plan(sizes, device, backward_threads(sizes.number_bytes), 1, sizes.gates);
}

}  // namespace fastseq::cuda
