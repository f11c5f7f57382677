// The backward recurrence of a layer in one launch, the forward's twin: gradients of the gates
// travel instead of hidden states. They are four times as many, and where each block would have to
// read much, blocks share their columns: a family of kSplit blocks multiplies for the units of all
// its members, each a part of the depth, and then exchanges sums.

#include "cuda/lstm_recurrence.cuh"

namespace fastopt::cuda {

namespace {

// Written at once.
template <class Storage>
struct alignas(kGates * sizeof(Storage)) ExchangedGates {
  Storage input, forget, cell, output;
};

// What happens in an iteration of a direction that runs backward.
struct BackwardStep {
  int rows, rows_done, rows_before;  // of this step, of the last iteration's, of the next one's
  int64_t token, token_before;

  __device__ BackwardStep(const LstmSteps& steps, const Team& team, int64_t iteration) {
    const int64_t forwards = team.direction == 1 ? -1 : 1;
    const int64_t step = forwards > 0 ? steps.steps - 1 - iteration : iteration;
    rows = rows_at(steps, team, step);
    rows_done = rows_at(steps, team, step + forwards);
    rows_before = rows_at(steps, team, step - forwards);
    token = rows > 0 ? first_token(steps, step) : 0;
    token_before = rows_before > 0 ? first_token(steps, step - forwards) : 0;
  }
  __device__ int all_rows() const { return rows > rows_done ? rows : rows_done; }
};

// What a pair of a row and a unit brings to one step.
struct Operands {
  LstmGates<float> gates;
  float cell, cell_before, cell_gradient;
  float outside;  // of the gradient of the hidden state: what does not come through the gates
};

// The tensors of a team, from its first row on.
template <class Storage>
struct TeamTensors {
  int64_t hidden, output_stride;
  const Storage* initial_cell;     // [rows, hidden]
  const Storage* final_gradient;   // [rows, hidden], or nullptr
  float* cell_gradients;           // [rows, hidden]
  Storage* initial_gradient;       // [rows, hidden]
  const Storage* gates;            // [tokens, G]
  const float* cells;              // [tokens, hidden]
  Storage* gate_gradients;         // [tokens, G]
  const Storage* output_gradient;  // [tokens, output_stride], or nullptr

  __device__ TeamTensors(const LstmBackwardRun& run, const Team& team) {
    const LstmSteps& steps = run.layer.steps;
    hidden = steps.hidden;
    output_stride = steps.directions * hidden;
    const int64_t states = (team.direction * steps.batch + team.first_row) * hidden;
    initial_cell = static_cast<const Storage*>(run.initial_cell) + states;
    final_gradient = static_cast<const Storage*>(run.final_hidden_gradient);
    if (final_gradient) final_gradient += states;
    cell_gradients = static_cast<float*>(run.cell_gradient) + states;
    initial_gradient = static_cast<Storage*>(run.initial_hidden_gradient) + states;
    const int64_t tokens = (team.direction * steps.tokens + team.first_row) * hidden;
    gates = static_cast<const Storage*>(run.gates) + kGates * tokens;
    cells = static_cast<const float*>(run.saved_cells) + tokens;
    gate_gradients = static_cast<Storage*>(run.gate_gradient) + kGates * tokens;
    output_gradient = static_cast<const Storage*>(run.output_gradient);
    if (output_gradient) {
      output_gradient += team.first_row * output_stride + team.direction * hidden;
    }
  }

  __device__ Operands load_operands(const BackwardStep& step, int64_t row, int64_t unit) const {
    Operands own{};
    if (row >= step.all_rows() || unit >= hidden) return own;
    const int64_t state = row * hidden + unit;
    // A row's last step: nothing has come from behind it yet.
    if (row >= step.rows_done && final_gradient) own.outside = load(final_gradient + state);
    if (row >= step.rows) return own;
    const int64_t token = step.token + row;
    if (output_gradient) own.outside += load(output_gradient + token * output_stride + unit);
    own.gates = load_gates(gates + token * kGates * hidden, hidden, unit);
    own.cell = cells[token * hidden + unit];
    own.cell_before = row < step.rows_before ? cells[(step.token_before + row) * hidden + unit]
                                             : load(initial_cell + state);
    own.cell_gradient = cell_gradients[state];
    return own;
  }

  __device__ void store_results(const BackwardStep& step, int64_t row, int64_t unit,
                                const LstmCellGradient<float>& gradient) const {
    cell_gradients[row * hidden + unit] = gradient.cell_before;
    store_gates(gate_gradients + (step.token + row) * kGates * hidden, hidden, unit, gradient.pre);
  }
};

// The sums that a family exchanges, [members, rows, columns], from the team's first row on.
template <int kSplit>
struct Family {
  static constexpr int kColumns = kUnits * kSplit;

  int member;
  int64_t member_stride;
  float* sums;
  GridBarrier barrier;

  __device__ Family(const LstmBackwardRun& run, const Team& team)
      : member(team.first_unit / kUnits % kSplit),
        member_stride(run.layer.steps.batch * kColumns),
        sums(run.partial_sums +
             (int64_t{team.direction} * count(team) + number(team)) * kSplit * member_stride +
             team.first_row * kColumns),
        barrier(counter(run.layer, team), kSplit) {}

  // This member's for all columns of the family.
  __device__ void store_sum(int64_t row, int column, float sum) const {
    sums[member * member_stride + row * kColumns + column] = sum;
  }
  // All members' for one of the block's own units.
  __device__ float load_sum(int64_t row, int unit) const {
    const float* first = sums + row * kColumns + member * kUnits + unit;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < kSplit; ++other) {
      sum += load_exchanged_float(first + other * member_stride);
    }
    return sum;
  }

 private:
  // The families of a team, and which one the block belongs to.
  static __device__ int count(const Team& team) { return static_cast<int>(team.blocks) / kSplit; }
  static __device__ int number(const Team& team) { return team.first_unit / kColumns; }
  // Behind those of the teams.
  static __device__ unsigned* counter(const LstmRecurrence& layer, const Team& team) {
    const int teams = layer.steps.directions * layer.grid.parts;
    const int own_team = team.direction * layer.grid.parts + team.part;
    return layer.counters + teams + own_team * count(team) + number(team);
  }
};

template <>
struct Family<1> {
  static constexpr int member = 0;

  __device__ Family(const LstmBackwardRun&, const Team&) {}
};

template <class Product, int kSplit>
__global__ void __launch_bounds__(kProductThreads, 1)
    lstm_backward_kernel(const LstmBackwardRun run, int first_direction) {
  using Storage = typename Product::Storage;
  constexpr int kColumns = kUnits * kSplit;
  constexpr int kOwn = kPairs<Product>;
  constexpr int kRows = kOwn * kProductThreads / kUnits;  // that pairs cover at once
  const LstmRecurrence& layer = run.layer;
  const LstmSteps& steps = layer.steps;
  const int64_t hidden = steps.hidden;
  const Team team(layer, first_direction);
  const TeamTensors<Storage> tensors(run, team);
  const int all_groups = groups_of<Storage>(kGates * hidden);
  const int64_t width = static_cast<int64_t>(all_groups) * kGroup<Storage>;
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  unsigned char* scratch = dynamic_shared() + kSumBytes<Product, kColumns>;
  Family<kSplit> family(run, team);

  // The block's part of the depth.
  const int most_groups = (all_groups + kSplit - 1) / kSplit;
  const int first_group = family.member * most_groups;
  int groups = all_groups - first_group;
  groups = groups < 0 ? 0 : groups > most_groups ? most_groups : groups;
  const int64_t first_k = static_cast<int64_t>(first_group) * kGroup<Storage>;

  // The four gates of a unit are neighbours in the exchange, so that a thread writes them at once.
  Product product;
  const Storage* weights = static_cast<const Storage*>(layer.weights[team.direction]);
  product.load_weights(groups, [&](int column, int64_t local_k) {
    const int64_t unit = team.first_unit - family.member * kUnits + column;
    const int64_t k = first_k + local_k;
    if (unit >= hidden || k >= kGates * hidden) return Storage{};
    return weights[(k % kGates * hidden + k / kGates) * hidden + unit];
  });

  const int64_t half = steps.directions * steps.batch * width;  // of the exchange
  Storage* exchange = static_cast<Storage*>(layer.exchange) +
                      (team.direction * steps.batch + team.first_row) * width;

  GridBarrier barrier = team.barrier(layer);
  // The iteration after the last step has the gradients of the initial states.
  for (int64_t iteration = 0; iteration <= steps.steps; ++iteration) {
    const BackwardStep step(steps, team, iteration);
    const Storage* arrived = exchange + (iteration + 1) % 2 * half + first_k;
    Storage* leaving = exchange + iteration % 2 * half;
    const int all_rows = step.all_rows();
    // Leaves the sums of `here` rows in shared memory, for the block.
    const auto multiply = [&](int first) {
      int here = step.rows_done - first;
      if (here > Product::kRows) here = Product::kRows;
      if (here > 0) product.multiply(arrived + first * width, width, here, sums, scratch);
      __syncthreads();
    };
    for (int first = 0; first < all_rows; first += kRows) {
      Operands operands[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        operands[i] = tensors.load_operands(step, first + pair.row, team.first_unit + pair.unit);
      }
      if (first == 0) barrier.wait();
      if constexpr (kSplit == 1) {
        multiply(first);
      } else if (first == 0) {
        for (int row = 0; row < step.rows_done; row += Product::kRows) {
          multiply(row);
          for (int index = static_cast<int>(threadIdx.x); index < Product::kRows * kColumns;
               index += kProductThreads) {
            const int local = index / kColumns, column = index % kColumns;
            if (row + local >= step.rows_done) break;
            family.store_sum(row + local, column,
                             sum_of_warps<Product, kColumns>(sums, groups, local, column));
          }
          __syncthreads();
        }
        family.barrier.arrive();
        family.barrier.wait();
      }
      LstmCellGradient<float> gradients[kOwn] = {};
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        if (row >= all_rows || unit >= hidden) continue;
        Operands& own = operands[i];
        if (row < step.rows_done) {
          if constexpr (kSplit == 1) {
            own.outside += sum_of_warps<Product, kColumns>(sums, groups, pair.row, pair.unit);
          } else {
            own.outside += family.load_sum(row, pair.unit);
          }
        }
        if (row >= step.rows) {
          store(tensors.initial_gradient + row * hidden + unit, own.outside);
          continue;
        }
        gradients[i] = cell_gradient<float>(own.gates, own.cell_before, own.cell, own.outside,
                                            own.cell_gradient);
        const LstmGates<float>& pre = gradients[i].pre;
        *reinterpret_cast<ExchangedGates<Storage>*>(leaving + row * width + unit * kGates) = {
            Product::exchanged(pre.input), Product::exchanged(pre.forget),
            Product::exchanged(pre.cell), Product::exchanged(pre.output)};
      }
      // Only what others wait for comes before this.
      if (first + kRows >= all_rows) {
        barrier.arrive();
      } else {
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        if (row >= step.rows || unit >= hidden) continue;
        tensors.store_results(step, row, unit, gradients[i]);
      }
    }
  }
}

constexpr int kShared = 8;  // blocks of a family

template <class Product, int kSplit>
constexpr int kSharedBytes = kSumBytes<Product, kUnits * kSplit> + Product::kScratchBytes;

// What one way to run the pass in consists of.
struct BackwardKernel {
  void (*run)(const LstmBackwardRun, int);
  int shared_bytes;
  int max_hidden;
};

template <int kSplit, class Visitor>
void with_kernel(DType dtype, bool tf32, const Visitor& visit) {
  constexpr int kDepth = kGates * kMaxHidden / kSplit;
  // With one column for each lane's part, more do not fit beside all else.
  constexpr int kFmaDepth = kSplit == 1 ? kDepth / 2 : kDepth;
  with_product<kUnits * kSplit, kDepth, kFmaDepth>(dtype, tf32, [&](auto product) {
    using Product = typename decltype(product)::type;
    visit(BackwardKernel{lstm_backward_kernel<Product, kSplit>, kSharedBytes<Product, kSplit>,
                         Product::kMaxDepth * kSplit / kGates});
  });
}

template <int kSplit>
LstmGrid grid_of(DType dtype, bool tf32, int64_t batch, int64_t hidden, int directions,
                 const Stream& stream) {
  LstmGrid grid{};
  with_kernel<kSplit>(dtype, tf32, [&](const BackwardKernel& kernel) {
    if (hidden > kernel.max_hidden) return;
    grid = spread(batch, hidden, directions, kSplit, kernel.shared_bytes, kernel.run, stream);
  });
  return grid;
}

// What a block may read in a step before it is better to share columns, which costs another wait: a
// block's share of the L2 cache's rate is some 40 GB/s, a wait about a microsecond. An estimate.
constexpr int64_t kMuch = 96 << 10;

}  // namespace

void load_lstm_backward_kernels(DType dtype) {
  for (bool tf32 : {false, true}) {
    const auto load = [](const BackwardKernel& kernel) { load_kernel(kernel.run); };
    with_kernel<1>(dtype, tf32, load);
    with_kernel<kShared>(dtype, tf32, load);
  }
}

LstmGrid lstm_backward_grid(DType dtype, bool tf32, int64_t batch, int64_t hidden, int directions,
                            const Stream& stream) {
  const LstmGrid alone = grid_of<1>(dtype, tf32, batch, hidden, directions, stream);
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t rows = alone.part_rows < batch ? alone.part_rows : batch;
  if (alone.parts > 0 && rows * kGates * hidden * bytes <= kMuch) return alone;
  const LstmGrid shared = grid_of<kShared>(dtype, tf32, batch, hidden, directions, stream);
  return shared.parts == 0 ? alone : shared;
}

void launch_lstm_backward(const LstmBackwardRun& run, const Stream& stream) {
  const auto run_kernel = [&](const BackwardKernel& kernel) {
    launch_directions("lstm_backward_kernel", run, kernel.shared_bytes, kernel.run, stream);
  };
  const LstmRecurrence& layer = run.layer;
  if (layer.grid.split == 1) {
    with_kernel<1>(layer.dtype, layer.tf32, run_kernel);
  } else {
    with_kernel<kShared>(layer.dtype, layer.tf32, run_kernel);
  }
}

}  // namespace fastopt::cuda
