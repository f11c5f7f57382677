// The backward recurrence of a layer in one launch, the forward's twin: gradients of the gates
// travel instead of hidden states.

#include "cuda/lstm_recurrence.cuh"

namespace fastopt::cuda {

namespace {

constexpr int kColumns = kUnits;

// What a pair of a row and a unit brings to one step.
struct Operands {
  LstmGates<float> gates;
  float cell, cell_before, cell_gradient;
  float outside;  // of the gradient of the hidden state: what does not come through the gates
};

// Written at once.
template <class Storage>
struct alignas(kGates * sizeof(Storage)) ExchangedGates {
  Storage input, forget, cell, output;
};

template <class Product>
__global__ void __launch_bounds__(kProductThreads, 1)
    lstm_backward_kernel(const LstmBackwardRun run, int first_direction) {
  using Storage = typename Product::Storage;
  constexpr int kOwn = kPairs<Product>;
  const LstmRecurrence& layer = run.layer;
  const LstmSteps& steps = layer.steps;
  const int64_t hidden = steps.hidden;
  const Team team(layer, first_direction);
  const int groups = groups_of<Storage>(kGates * hidden);
  const int64_t width = static_cast<int64_t>(groups) * kGroup<Storage>;
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  unsigned char* scratch = dynamic_shared() + kSumBytes<Product, kColumns>;

  // The four gates of a unit are neighbours in the exchange, so that a thread writes them at once.
  Product product;
  const Storage* weights = static_cast<const Storage*>(layer.weights[team.direction]);
  product.load_weights(groups, [&](int column, int64_t k) {
    const int64_t unit = team.first_unit + column;
    if (unit >= hidden || k >= kGates * hidden) return Storage{};
    return weights[(k % kGates * hidden + k / kGates) * hidden + unit];
  });

  // Of the direction, [batch, ...] and [tokens, ...], from the team's first row on.
  const int64_t states = team.direction * steps.batch + team.first_row;
  const int64_t half = steps.directions * steps.batch * width;  // of the exchange
  Storage* exchange = static_cast<Storage*>(layer.exchange) + states * width;
  const Storage* initial_cell = static_cast<const Storage*>(run.initial_cell) + states * hidden;
  const Storage* final_gradient = static_cast<const Storage*>(run.final_hidden_gradient);
  if (final_gradient) final_gradient += states * hidden;
  float* cell_gradients = static_cast<float*>(run.cell_gradient) + states * hidden;
  Storage* initial_gradient = static_cast<Storage*>(run.initial_hidden_gradient) + states * hidden;
  const int64_t tokens = team.direction * steps.tokens + team.first_row;
  const Storage* all_gates = static_cast<const Storage*>(run.gates) + tokens * kGates * hidden;
  const float* cells = static_cast<const float*>(run.saved_cells) + tokens * hidden;
  Storage* gate_gradients = static_cast<Storage*>(run.gate_gradient) + tokens * kGates * hidden;
  const int64_t output_stride = steps.directions * hidden;
  const Storage* output_gradient = static_cast<const Storage*>(run.output_gradient);
  if (output_gradient) {
    output_gradient += team.first_row * output_stride + team.direction * hidden;
  }

  // The iteration after the last step has the gradients of the initial states.
  GridBarrier barrier = team.barrier(layer);
  const int64_t forwards = team.direction == 1 ? -1 : 1;
  for (int64_t iteration = 0; iteration <= steps.steps; ++iteration) {
    const int64_t step = forwards > 0 ? steps.steps - 1 - iteration : iteration;
    const int rows = rows_at(steps, team, step);
    const int rows_done = rows_at(steps, team, step + forwards);  // by the last iteration
    const int rows_before = rows_at(steps, team, step - forwards);
    const int64_t token = rows > 0 ? first_token(steps, step) : 0;
    const int64_t token_before = rows_before > 0 ? first_token(steps, step - forwards) : 0;
    const Storage* arrived = exchange + (iteration + 1) % 2 * half;
    Storage* leaving = exchange + iteration % 2 * half;
    const int all_rows = rows > rows_done ? rows : rows_done;
    for (int first = 0; first < all_rows; first += Product::kRows) {
      Operands operands[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        Operands& own = operands[i];
        own = {};
        if (row >= all_rows || unit >= hidden) continue;
        const int64_t state = row * hidden + unit;
        // A row's last step: nothing has come from behind it yet.
        if (row >= rows_done && final_gradient) own.outside = load(final_gradient + state);
        if (row >= rows) continue;
        if (output_gradient) {
          own.outside += load(output_gradient + (token + row) * output_stride + unit);
        }
        own.gates = load_gates(all_gates + (token + row) * kGates * hidden, hidden, unit);
        own.cell = cells[(token + row) * hidden + unit];
        own.cell_before = row < rows_before ? cells[(token_before + row) * hidden + unit]
                                            : load(initial_cell + state);
        own.cell_gradient = cell_gradients[state];
      }
      if (first == 0) barrier.wait();
      int here = rows_done - first;
      if (here > Product::kRows) here = Product::kRows;
      if (here > 0) product.multiply(arrived + first * width, width, here, sums, scratch);
      __syncthreads();
      LstmCellGradient<float> gradients[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        if (row >= all_rows || unit >= hidden) continue;
        Operands& own = operands[i];
        if (row < rows_done) {
          own.outside += sum_of_warps<Product, kColumns>(sums, groups, pair.row, pair.unit);
        }
        if (row >= rows) {
          store(initial_gradient + row * hidden + unit, own.outside);
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
      if (first + Product::kRows >= all_rows) {
        barrier.arrive();
      } else {
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const Pair pair(i);
        const int64_t row = first + pair.row, unit = team.first_unit + pair.unit;
        if (row >= rows || unit >= hidden) continue;
        cell_gradients[row * hidden + unit] = gradients[i].cell_before;
        store_gates(gate_gradients + (token + row) * kGates * hidden, hidden, unit,
                    gradients[i].pre);
      }
    }
  }
}

template <class Product>
constexpr int kSharedBytes = kSumBytes<Product, kColumns> + Product::kScratchBytes;

template <class Visitor>
void with_backward_product(DType dtype, bool tf32, const Visitor& visit) {
  with_product<kColumns, static_cast<int>(kGates * kMaxHidden)>(dtype, tf32, visit);
}

}  // namespace

void load_lstm_backward_kernels(DType dtype) {
  for (bool tf32 : {false, true}) {
    with_backward_product(dtype, tf32, [](auto product) {
      load_kernel(lstm_backward_kernel<typename decltype(product)::type>);
    });
  }
}

LstmGrid lstm_backward_grid(DType dtype, bool tf32, int64_t batch, int64_t hidden, int directions,
                            const Stream& stream) {
  LstmGrid grid{};
  with_backward_product(dtype, tf32, [&](auto product) {
    using Product = typename decltype(product)::type;
    grid = spread(batch, hidden, directions, kSharedBytes<Product>, lstm_backward_kernel<Product>,
                  stream);
  });
  return grid;
}

void launch_lstm_backward(const LstmBackwardRun& run, const Stream& stream) {
  with_backward_product(run.layer.dtype, run.layer.tf32, [&](auto product) {
    using Product = typename decltype(product)::type;
    launch_directions("lstm_backward_kernel", run, kSharedBytes<Product>,
                      lstm_backward_kernel<Product>, stream);
  });
}

}  // namespace fastopt::cuda
