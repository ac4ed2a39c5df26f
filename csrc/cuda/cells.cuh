// The cells of csrc/cells.h, of one unit a thread.
#pragma once

#include "../cell_list.h"
#include "number.h"

namespace fastseq::cuda {

#include "../cells.h"

// use(run) of each of Cell::hidden_runs. A device has no such table, but it has its constants.
template <class Cell, int kRun = 0, class Use>
FASTSEQ_INLINE void for_each_hidden_run(const Use& use) {
  if constexpr (kRun < Cell::runs) {
    constexpr GateRun run = Cell::hidden_runs[kRun];
    use(run);
    for_each_hidden_run<Cell, kRun + 1>(use);
  }
}

// f of an object of the cell's type.
template <class Use>
cudaError_t with_cell(CellKind cell, const Use& use) {
  switch (cell) {
#define X(name, type)  \
  case CellKind::name: \
    return use(type());
    FASTSEQ_FOR_EACH_CELL(X)
#undef X
    case CellKind::count:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastseq::cuda
