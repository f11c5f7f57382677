#pragma once

#include <cstdint>

#include "core/lstm_cell.h"
#include "cpu/gemm.h"
#include "cpu/lstm.h"
#include "cpu/team.h"
#include "cpu/threads.h"
#include "cpu/workspace.h"

FASTOPT_BEGIN_NAMESPACE

// Sizes of one direction's work, and who does what. In the recurrence, a team either shares out the
// rows of the batch, which needs no waiting, or, for few rows, the units.
template <class T>
struct LstmWalk {
  // Rows worth a thread of their own. On Zen 4, rows and units tie in the rows LSTM T128 B32 I128
  // H256 and I256 H512 of the benchmark; sharing rows needs no barrier, and a thread that loses its
  // core holds up nobody.
  static constexpr int64_t kRowsPerThread = Tiling<T>::kTileRows;
  static constexpr int64_t kSkew = 16;  // rows a power of two apart would share cache sets

  const LstmLayer& layer;
  int64_t units;  // hidden_size, padded to vectors
  int64_t gates;  // 4 * units: columns of a row of gates
  int64_t gate_stride;

  explicit LstmWalk(const LstmLayer& given)
      : layer(given),
        units(padded_columns<T>(given.hidden_size)),
        gates(4 * units),
        gate_stride(gates + kSkew) {}

  bool shares_rows(int team) const { return team == 1 || layer.batch >= team * kRowsPerThread; }

  template <class Storage>
  const Storage* input_row(int64_t t, int64_t row) const {
    const Storage* base = static_cast<const Storage*>(layer.input);
    return layer.packed_input ? base + (layer.first_token[t] + row) * layer.input_row_stride
                              : base + t * layer.input_step_stride + row * layer.input_row_stride;
  }
};

// Steps and rows of tokens that come in order.
struct TokenCursor {
  const LstmLayer& layer;
  int64_t t, row;

  void move_to(int64_t token) {
    while (token >= layer.first_token[t + 1]) ++t;
    row = token - layer.first_token[t];
  }
};

// Columns [begin, end) of every gate of W [G, depth], transposed and packed: the panels of gate g
// begin at words_of(depth) * g * units.
template <class F, class Storage>
void pack_gate_columns(const void* weights, int64_t depth, int64_t hidden, int64_t units,
                       Range part, SumOf<F>* panels) {
  for (int gate = 0; gate < 4; ++gate) {
    const Storage* rows = static_cast<const Storage*>(weights) + gate * hidden * depth;
    pack_columns<F>([=](int64_t n) { return rows + n * depth; }, depth, hidden, part.begin,
                    part.end, panels + words_of<F>(depth) * gate * units);
  }
}

// Runs body(direction, team) with the directions side by side where the threads can be halved.
template <class Body>
void run_directions(int threads, int directions, const Body& body) {
  struct Shared {
    const Body& body;
    int directions;
    Barrier barriers[kMaxDirections];
  } shared{body, directions, {}};
  const auto run = [](void* context, int rank, int size) {
    Shared& mine = *static_cast<Shared*>(context);
    const SubnormalsFlushed flushed;
    if (mine.directions == 2 && size % 2 == 0) {
      const int direction = rank % 2;
      mine.body(direction, Team{rank / 2, size / 2, &mine.barriers[direction]});
    } else {
      for (int direction = 0; direction < mine.directions; ++direction) {
        mine.body(direction, Team{rank, size, &mine.barriers[0]});
        Team{rank, size, &mine.barriers[0]}.wait();
      }
    }
  };
  parallel_team(threads, run, &shared);
}

FASTOPT_END_NAMESPACE
