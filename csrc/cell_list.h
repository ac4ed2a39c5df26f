// The one list of cells. The order is the order of every table indexed by cell; X(name, type in cells.h).
#pragma once

#define FASTSEQ_FOR_EACH_CELL(X) \
  X(rnn_tanh, RnnTanhCell)       \
  X(rnn_relu, RnnReluCell)       \
  X(lstm, LstmCell)              \
  X(gru, GruCell)

namespace fastseq {

enum class CellKind : int {
#define X(name, type) name,
  FASTSEQ_FOR_EACH_CELL(X)
#undef X
      count
};

// What callers outside the kernels need to know of a cell; filled in from cells.h, so Python learns it from here.
struct CellFacts {
  const char* name;
  int gates;        // G: rows of w_ih and w_hh are G*H
  int kept;         // planes of H values a row that forward keeps for backward
  bool cell_state;  // whether there is a c beside h
};

}  // namespace fastseq
