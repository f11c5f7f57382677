// The forward recurrence of a layer in one launch: weights stay in registers, hidden states travel
// through the L2 cache, blocks wait for each other once a step.

#include "cuda/lstm_recurrence.cuh"

namespace fastopt::cuda {

namespace {

constexpr int kColumns = kGates * kUnits;  // gate by gate

template <class Product>
__global__ void __launch_bounds__(kProductThreads, 1)
    lstm_forward_kernel(const LstmForwardRun run, int first_direction) {
  using Storage = typename Product::Storage;
  constexpr int kOwn = kPairs<Product>;
  const LstmRecurrence& layer = run.layer;
  const LstmSteps& steps = layer.steps;
  const int64_t hidden = steps.hidden;
  const Team team(layer, first_direction);
  const int groups = groups_of<Storage>(hidden);
  const int64_t width = static_cast<int64_t>(groups) * kGroup<Storage>;
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  unsigned char* scratch = dynamic_shared() + kSumBytes<Product, kColumns>;

  Product product;
  const Storage* weights = static_cast<const Storage*>(layer.weights[team.direction]);
  product.load_weights(groups, [&](int column, int64_t k) {
    const int64_t unit = team.first_unit + column % kUnits;
    if (unit >= hidden || k >= hidden) return Storage{};
    return weights[(column / kUnits * hidden + unit) * hidden + k];
  });

  // Of the direction, [batch, ...] and [tokens, ...], from the team's first row on.
  const int64_t states = team.direction * steps.batch + team.first_row;
  const int64_t half = steps.directions * steps.batch * width;  // of the exchange
  Storage* exchange = static_cast<Storage*>(layer.exchange) + states * width;
  const Storage* initial = static_cast<const Storage*>(run.initial_hidden) + states * hidden;
  Storage* final_hidden = static_cast<Storage*>(run.final_hidden) + states * hidden;
  float* cells = static_cast<float*>(run.cells) + states * hidden;
  const int64_t tokens = team.direction * steps.tokens + team.first_row;
  Storage* all_gates = static_cast<Storage*>(run.gates) + tokens * kGates * hidden;
  float* saved_cells =
      run.saved_cells ? static_cast<float*>(run.saved_cells) + tokens * hidden : nullptr;
  const int64_t output_stride = steps.directions * hidden;
  Storage* output =
      static_cast<Storage*>(run.output) + team.first_row * output_stride + team.direction * hidden;

  // A row that joins later finds its initial state whichever half it reads.
  for (int index = static_cast<int>(threadIdx.x); index < team.rows * kUnits;
       index += kProductThreads) {
    const int64_t row = index / kUnits, unit = team.first_unit + index % kUnits;
    if (unit >= hidden) continue;
    const Storage value = Product::exchanged(load(initial + row * hidden + unit));
    exchange[row * width + unit] = value;
    exchange[half + row * width + unit] = value;
  }
  GridBarrier barrier = team.barrier(layer);
  barrier.arrive();

  for (int64_t iteration = 0; iteration < steps.steps; ++iteration) {
    const bool is_reverse = team.direction == 1;
    const int64_t step = is_reverse ? steps.steps - 1 - iteration : iteration;
    const int rows = rows_at(steps, team, step);
    const int next_rows = rows_at(steps, team, is_reverse ? step - 1 : step + 1);
    const int64_t token = first_token(steps, step);
    const Storage* before = exchange + (iteration + 1) % 2 * half;
    Storage* after = exchange + iteration % 2 * half;
    for (int first = 0; first < rows; first += Product::kRows) {
      LstmUnit<float> units[kOwn] = {};
      LstmGates<float> pre[kOwn];
      float cell[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        pre[i] = {};
        cell[i] = 0;
        if (row >= rows || unit >= hidden) continue;
        pre[i] = load_gates(all_gates + (token + row) * kGates * hidden, hidden, unit);
        cell[i] = cells[row * hidden + unit];
      }
      if (first == 0) barrier.wait();
      const int here = rows - first < Product::kRows ? rows - first : Product::kRows;
      product.multiply(before + first * width, width, here, sums, scratch);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        if (row >= rows || unit >= hidden) continue;
        const auto recurrent = [&](int gate) {
          return sum_of_warps<Product, kColumns>(sums, groups, pair.row, gate * kUnits + pair.unit);
        };
        pre[i] = pre[i] + LstmGates<float>{recurrent(0), recurrent(1), recurrent(2), recurrent(3)};
        units[i] = step_unit<float>(pre[i], cell[i]);
        after[row * width + unit] = Product::exchanged(units[i].hidden);
      }
      // Only what others wait for comes before this.
      if (first + Product::kRows >= rows) {
        barrier.arrive();
      } else {
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        if (row >= rows || unit >= hidden) continue;
        cells[row * hidden + unit] = units[i].cell;
        if (saved_cells) saved_cells[(token + row) * hidden + unit] = units[i].cell;
        if (run.save_gates) {
          store_gates(all_gates + (token + row) * kGates * hidden, hidden, unit, units[i].gates);
        }
        store(output + (token + row) * output_stride + unit, units[i].hidden);
        if (row >= next_rows) store(final_hidden + row * hidden + unit, units[i].hidden);
      }
    }
  }
}

template <class Product>
constexpr int kSharedBytes = kSumBytes<Product, kColumns> + Product::kScratchBytes;

template <class Visitor>
void with_forward_product(DType dtype, bool tf32, const Visitor& visit) {
  with_product<kColumns, kMaxHidden, kMaxHidden>(dtype, tf32, visit);
}

}  // namespace

void load_lstm_forward_kernels(DType dtype) {
  for (bool tf32 : {false, true}) {
    with_forward_product(dtype, tf32, [](auto product) {
      load_kernel(lstm_forward_kernel<typename decltype(product)::type>);
    });
  }
}

LstmGrid lstm_forward_grid(DType dtype, bool tf32, int64_t batch, int64_t hidden, int directions,
                           const Stream& stream) {
  LstmGrid grid{};
  if (hidden > kMaxHidden) return grid;
  with_forward_product(dtype, tf32, [&](auto product) {
    using Product = typename decltype(product)::type;
    grid = spread(batch, hidden, directions, 1, kSharedBytes<Product>, lstm_forward_kernel<Product>,
                  stream);
  });
  return grid;
}

void launch_lstm_forward(const LstmForwardRun& run, const Stream& stream) {
  with_forward_product(run.layer.dtype, run.layer.tf32, [&](auto product) {
    using Product = typename decltype(product)::type;
    launch_directions("lstm_forward_kernel", run, kSharedBytes<Product>,
                      lstm_forward_kernel<Product>, stream);
  });
}

}  // namespace fastopt::cuda
