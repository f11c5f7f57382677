#pragma once

#include <type_traits>

#include "cpu/lstm_walk.h"

FASTOPT_BEGIN_NAMESPACE

// The backward pass of one direction. Steps run in the opposite order of the forward pass. The
// gradients of the gates of a chunk are kept just long enough for the products with them.
template <class Storage>
class LstmBackwardPass {
 public:
  using T = ComputeType<Storage>;              // of the arithmetic
  using F = typename FactorOf<Storage>::type;  // of what is multiplied

  LstmBackwardPass(const LstmBackward& call, const LstmWalk<T>& walk, int direction)
      : call_(call),
        layer_(call.layer),
        walk_(walk),
        direction_(direction),
        wanted_(call.weights[direction]),
        inputs_(layer_.input_size),
        outputs_(layer_.output_size),
        hidden_(layer_.hidden_size) {}

  void reserve(Workspace& space) {
    constexpr int64_t kSkew = LstmWalk<T>::kSkew;
    input_stride_ = padded_columns<T>(inputs_) + kSkew;
    output_stride_ = padded_columns<T>(outputs_) + kSkew;
    cell_stride_ = walk_.units + kSkew;
    space.reserve(&no_weights_, inputs_ > outputs_ ? inputs_ : outputs_);
    space.reserve(&hidden_panels_, words_of<F>(walk_.gates) * output_stride_);
    space.reserve(&gates_, layer_.chunk_rows * walk_.gate_stride);
    space.reserve(&hidden_gradient_, layer_.batch * output_stride_);
    space.reserve(&cell_gradient_, layer_.batch * cell_stride_);
    if (call_.input_gradient) {
      space.reserve(&weight_panels_, words_of<F>(walk_.gates) * input_stride_);
      space.reserve(&input_gradients_, layer_.chunk_rows * input_stride_);
    }
    scratch_size_ = transposed_scratch<F>(layer_.chunk_rows);
    space.reserve(&scratch_, layer_.threads * scratch_size_);
    const int64_t words = words_of<F>(layer_.chunk_rows);
    space.reserve(&input_factors_, words * input_stride_);
    space.reserve(&output_factors_, words * output_stride_);
    reserve_sums(space, wanted_.input, walk_.gates, inputs_, input_stride_, input_sums_);
    reserve_sums(space, wanted_.hidden, walk_.gates, outputs_, output_stride_, hidden_sums_);
    if (wants_bias()) space.reserve(&bias_sums_, walk_.gates);
    if (projected()) {
      space.reserve(&projection_panels_, words_of<F>(outputs_) * cell_stride_);
      space.reserve(&output_gradients_, layer_.chunk_rows * output_stride_);
      space.reserve(&unprojected_gradients_, layer_.batch * cell_stride_);
      space.reserve(&unprojected_, layer_.chunk_rows * cell_stride_);
      space.reserve(&unprojected_factors_, words * cell_stride_);
      reserve_sums(space, wanted_.projection, outputs_, hidden_, cell_stride_, projection_sums_);
    }
  }

  void run(Team team) {
    prepare(team);
    team.wait();
    const int64_t chunk_count = layer_.chunk_count;
    for (int64_t i = 0; i < chunk_count; ++i) {
      const int64_t chunk = direction_ == 0 ? chunk_count - 1 - i : i;
      const int64_t begin = layer_.chunks[chunk], end = layer_.chunks[chunk + 1];
      for (int64_t s = 0; s < end - begin; ++s) {
        step(team, direction_ == 0 ? end - 1 - s : begin + s, layer_.first_token[begin]);
      }
      pack_chunk(team, begin, end);
      team.wait();
      if (projected()) {
        pack_unprojected(team, begin, end);
        team.wait();
      }
      multiply_chunk(team, begin, end, i == 0 ? Into::kReplace : Into::kAdd);
      team.wait();
    }
    finish(team);
  }

 private:
  bool projected() const { return layer_.weights[direction_].projection != nullptr; }
  bool wants_bias() const { return wanted_.input_bias || wanted_.hidden_bias; }

  const Storage* gate_row(const void* weights, int64_t k, int64_t depth) const {
    const int64_t gate = k / walk_.units, unit = k % walk_.units;
    if (unit >= hidden_) return no_weights_;
    return static_cast<const Storage*>(weights) + (gate * hidden_ + unit) * depth;
  }

  // The gradient of a weight while it is summed: in place, where it has the type of the sums and
  // whole vectors.
  struct Sums {
    T* values = nullptr;
    int64_t stride = 0;
    bool in_place = false;
  };

  void reserve_sums(Workspace& space, void* wanted, int64_t rows, int64_t columns, int64_t stride,
                    Sums& sums) {
    if (!wanted) return;
    sums.in_place =
        std::is_same<T, Storage>::value && columns % Vec<T>::kWidth == 0 && walk_.units == hidden_;
    if (sums.in_place) {
      sums.values = static_cast<T*>(wanted);
      sums.stride = columns;
    } else {
      sums.stride = stride;
      space.reserve(&sums.values, rows * stride);
    }
  }

  static void copy_sums(const Sums& sums, int64_t from, int64_t columns, void* wanted, int64_t to) {
    if (!wanted || sums.in_place) return;
    convert_row(sums.values + from * sums.stride, columns,
                static_cast<Storage*>(wanted) + to * columns);
  }

  void prepare(Team team) {
    if (team.rank == 0) {
      for (int64_t i = 0; i < (inputs_ > outputs_ ? inputs_ : outputs_); ++i) {
        store(no_weights_ + i, T(0));
      }
    }
    if (walk_.units != hidden_) {
      const Range part = team.share(layer_.chunk_rows * walk_.gate_stride, 64);
      for (int64_t i = part.begin; i < part.end; ++i) store(gates_ + i, T(0));
      team.wait();
    }
    const LstmLayer::Weights& weights = layer_.weights[direction_];
    const Range outputs = team.share(outputs_, Tiling<T>::kPanel);
    pack_rows<F>([&](int64_t k) { return gate_row(weights.hidden, k, outputs_); }, walk_.gates,
                 outputs_, outputs.begin, outputs.end, hidden_panels_);
    if (call_.input_gradient) {
      const Range inputs = team.share(inputs_, Tiling<T>::kPanel);
      pack_rows<F>([&](int64_t k) { return gate_row(weights.input, k, inputs_); }, walk_.gates,
                   inputs_, inputs.begin, inputs.end, weight_panels_);
    }
    if (projected()) {
      const Storage* rows = static_cast<const Storage*>(weights.projection);
      const Range units = team.share(hidden_, Tiling<T>::kPanel);
      pack_rows<F>([&](int64_t k) { return rows + k * hidden_; }, outputs_, hidden_, units.begin,
                   units.end, projection_panels_);
      if (team.rank == 0) {
        fill_last_words(output_gradients_, layer_.chunk_rows, output_stride_, outputs_);
      }
    }
    const Range rows = team.share(layer_.batch);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t place = direction_ * layer_.batch + row;
      start_row(call_.final_hidden_gradient, place, outputs_,
                hidden_gradient_ + row * output_stride_);
      start_row(call_.final_cell_gradient, place, hidden_, cell_gradient_ + row * cell_stride_);
    }
  }

  static void start_row(const void* gradient, int64_t place, int64_t width, T* target) {
    if (gradient) {
      convert_row(static_cast<const Storage*>(gradient) + place * width, width, target);
    } else {
      for (int64_t i = 0; i < width; ++i) target[i] = 0;
    }
  }

  const Storage* output_gradient(int64_t token) const {
    if (!call_.output_gradient) return nullptr;
    return static_cast<const Storage*>(call_.output_gradient) +
           (token * layer_.directions + direction_) * outputs_;
  }

  void step(Team team, int64_t t, int64_t first_of_chunk) {
    constexpr int64_t kPanel = Tiling<T>::kPanel;
    const int64_t active = layer_.batch_sizes[t], first = layer_.first_token[t];
    const bool by_rows = walk_.shares_rows(team.size);
    const int64_t spacing = by_rows ? team.size : 1, start = by_rows ? team.rank : 0;
    const int64_t rows = active > start ? (active - start + spacing - 1) / spacing : 0;
    const Range units = by_rows ? Range{0, hidden_} : team.share(hidden_, kPanel);
    const Range columns = by_rows ? Range{0, outputs_} : team.share(outputs_, kPanel);
    const int64_t chunk_row = first - first_of_chunk;
    T* hidden_gradient = hidden_gradient_;
    int64_t hidden_gradient_stride = output_stride_;
    if (projected()) {
      F* totals = output_gradients_ + chunk_row * output_stride_;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = start + i * spacing;
        add_output_gradient(hidden_gradient_ + row * output_stride_, first + row, columns,
                            totals + row * output_stride_);
      }
      if (!by_rows) team.wait();
      multiply<F>({totals + start * output_stride_, spacing * output_stride_}, rows,
                  projection_panels_ + words_of<F>(outputs_) * units.begin, units.end - units.begin,
                  outputs_, unprojected_gradients_ + start * cell_stride_ + units.begin,
                  spacing * cell_stride_, Into::kReplace);
      hidden_gradient = unprojected_gradients_;
      hidden_gradient_stride = cell_stride_;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = start + i * spacing;
      step_cells(t, row, chunk_row + row, hidden_gradient + row * hidden_gradient_stride, units);
    }
    if (!by_rows) team.wait();
    multiply<F>({gates_ + (chunk_row + start) * walk_.gate_stride, spacing * walk_.gate_stride},
                rows, hidden_panels_ + words_of<F>(walk_.gates) * columns.begin,
                columns.end - columns.begin, walk_.gates,
                hidden_gradient_ + start * output_stride_ + columns.begin, spacing * output_stride_,
                Into::kReplace);
  }

  void add_output_gradient(const T* carried, int64_t token, Range columns, F* total) const {
    const Storage* outside = output_gradient(token);
    for (int64_t i = columns.begin; i < columns.end; ++i) {
      store(total + i, outside ? carried[i] + load(outside + i) : carried[i]);
    }
  }

  void step_cells(int64_t t, int64_t row, int64_t chunk_row, const T* hidden_gradient, Range part) {
    const int64_t token = layer_.first_token[t] + row, units = walk_.units;
    const int64_t place = direction_ * layer_.tokens + token;
    const Storage* gates =
        static_cast<const Storage*>(call_.saved_gates) + place * 4 * hidden_ + part.begin;
    const T* cells = static_cast<const T*>(call_.saved_cells);
    const T* cell_now = cells + place * hidden_ + part.begin;
    const int64_t earlier = earlier_token(t, row);
    const Storage* initial = static_cast<const Storage*>(layer_.initial_cell) +
                             (direction_ * layer_.batch + row) * hidden_ + part.begin;
    const T* cell_before =
        earlier < 0 ? nullptr
                    : cells + (direction_ * layer_.tokens + earlier) * hidden_ + part.begin;
    const Storage* outside = projected() ? nullptr : output_gradient(token);
    F* target = gates_ + chunk_row * walk_.gate_stride + part.begin;
    F* unprojected = projected() ? unprojected_ + chunk_row * cell_stride_ + part.begin : nullptr;
    T* cell_gradient_here = cell_gradient_ + row * cell_stride_ + part.begin;
    hidden_gradient += part.begin;
    if (outside) outside += part.begin;
    for_each_lanes<T>(part.end - part.begin, [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      const LstmGates<V> now{load_as<V>(gates + i), load_as<V>(gates + hidden_ + i),
                             load_as<V>(gates + 2 * hidden_ + i),
                             load_as<V>(gates + 3 * hidden_ + i)};
      V hidden = load_as<V>(hidden_gradient + i);
      if (outside) hidden = hidden + load_as<V>(outside + i);
      const V before = cell_before ? load_as<V>(cell_before + i) : load_as<V>(initial + i);
      const LstmCellGradient<V> gradient = cell_gradient<T>(
          now, before, load_as<V>(cell_now + i), hidden, load_as<V>(cell_gradient_here + i));
      store(target + i, gradient.pre.input);
      store(target + units + i, gradient.pre.forget);
      store(target + 2 * units + i, gradient.pre.cell);
      store(target + 3 * units + i, gradient.pre.output);
      store(cell_gradient_here + i, gradient.cell_before);
      if (unprojected) store(unprojected + i, gradient.hidden);
    });
  }

  // The token that the recurrence came from; -1 for the initial state.
  int64_t earlier_token(int64_t t, int64_t row) const {
    if (direction_ == 0) return t == 0 ? -1 : layer_.first_token[t - 1] + row;
    const bool is_last = t + 1 == layer_.steps || layer_.batch_sizes[t + 1] <= row;
    return is_last ? -1 : layer_.first_token[t + 1] + row;
  }

  const Storage* earlier_output(int64_t t, int64_t row) const {
    const int64_t token = earlier_token(t, row);
    if (token < 0) {
      return static_cast<const Storage*>(layer_.initial_hidden) +
             (direction_ * layer_.batch + row) * outputs_;
    }
    return static_cast<const Storage*>(call_.output) +
           (token * layer_.directions + direction_) * outputs_;
  }

  // What the gradients of the weights are products with: inputs and earlier outputs of a chunk.
  void pack_chunk(Team team, int64_t begin, int64_t end) {
    const int64_t first = layer_.first_token[begin], depth = layer_.first_token[end] - first;
    TokenCursor at{layer_, begin, 0};
    if (wanted_.input) {
      const Range part = team.share(inputs_, Tiling<T>::kPanel);
      const auto input = [&](int64_t k) {
        at.move_to(first + k);
        return walk_.template input_row<Storage>(at.t, at.row);
      };
      pack_rows<F>(input, depth, inputs_, part.begin, part.end, input_factors_);
    }
    if (wanted_.hidden) {
      const Range part = team.share(outputs_, Tiling<T>::kPanel);
      at.t = begin;
      const auto earlier = [&](int64_t k) {
        at.move_to(first + k);
        return earlier_output(at.t, at.row);
      };
      pack_rows<F>(earlier, depth, outputs_, part.begin, part.end, output_factors_);
    }
  }

  void pack_unprojected(Team team, int64_t begin, int64_t end) {
    const int64_t depth = layer_.first_token[end] - layer_.first_token[begin];
    const Range part = team.share(hidden_, Tiling<T>::kPanel);
    pack_rows<F>([&](int64_t k) { return unprojected_ + k * cell_stride_; }, depth, hidden_,
                 part.begin, part.end, unprojected_factors_);
  }

  void multiply_chunk(Team team, int64_t begin, int64_t end, Into into) {
    const int64_t first = layer_.first_token[begin], depth = layer_.first_token[end] - first;
    const Range part = team.share(walk_.gates, Tiling<T>::kTileRows);
    F* scratch = scratch_ + team.rank * scratch_size_;
    const auto add_products = [&](const F* rows, int64_t row_stride, Range mine, const T* factors,
                                  int64_t columns, const Sums& sums) {
      if (!sums.values) return;
      multiply_transposed<F>(rows + mine.begin, row_stride, mine.end - mine.begin, factors, columns,
                             depth, sums.values + mine.begin * sums.stride, sums.stride, into,
                             scratch);
    };
    add_products(gates_, walk_.gate_stride, part, input_factors_, inputs_, input_sums_);
    add_products(gates_, walk_.gate_stride, part, output_factors_, outputs_, hidden_sums_);
    if (projected()) {
      const Range outputs = team.share(outputs_, Tiling<T>::kTileRows);
      add_products(output_gradients_, output_stride_, outputs, unprojected_factors_, hidden_,
                   projection_sums_);
    }
    if (wants_bias()) add_biases(part, depth, into);
    if (!call_.input_gradient) return;
    const Range rows = team.share(depth);
    multiply<F>({gates_ + rows.begin * walk_.gate_stride, walk_.gate_stride}, rows.end - rows.begin,
                weight_panels_, inputs_, walk_.gates, input_gradients_ + rows.begin * input_stride_,
                input_stride_, Into::kReplace);
    Storage* target = static_cast<Storage*>(call_.input_gradient) +
                      (direction_ * layer_.tokens + first) * inputs_;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      convert_row(input_gradients_ + row * input_stride_, inputs_, target + row * inputs_);
    }
  }

  void add_biases(Range part, int64_t depth, Into into) {
    for_each_lanes<T>(part.end - part.begin, [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      T* target = bias_sums_ + part.begin + i;
      V sum = into == Into::kAdd ? load_as<V>(target) : V{};
      const F* column = gates_ + part.begin + i;
      for (int64_t k = 0; k < depth; ++k) sum = sum + load_as<V>(column + k * walk_.gate_stride);
      store(target, sum);
    });
  }

  void finish(Team team) {
    const Range gates = team.share(4 * hidden_);
    for (int64_t i = gates.begin; i < gates.end; ++i) {
      const int64_t padded = i / hidden_ * walk_.units + i % hidden_;
      copy_sums(input_sums_, padded, inputs_, wanted_.input, i);
      copy_sums(hidden_sums_, padded, outputs_, wanted_.hidden, i);
      for (void* bias : {wanted_.input_bias, wanted_.hidden_bias}) {
        if (bias) store(static_cast<Storage*>(bias) + i, bias_sums_[padded]);
      }
    }
    const Range outputs = projected() ? team.share(outputs_) : Range{0, 0};
    for (int64_t i = outputs.begin; i < outputs.end; ++i) {
      copy_sums(projection_sums_, i, hidden_, wanted_.projection, i);
    }
    const Range rows = team.share(layer_.batch);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t place = direction_ * layer_.batch + row;
      if (call_.initial_hidden_gradient) {
        convert_row(hidden_gradient_ + row * output_stride_, outputs_,
                    static_cast<Storage*>(call_.initial_hidden_gradient) + place * outputs_);
      }
      if (call_.initial_cell_gradient) {
        convert_row(cell_gradient_ + row * cell_stride_, hidden_,
                    static_cast<Storage*>(call_.initial_cell_gradient) + place * hidden_);
      }
    }
  }

  const LstmBackward& call_;
  const LstmLayer& layer_;
  const LstmWalk<T>& walk_;
  const int direction_;
  const LstmBackward::Weights& wanted_;
  const int64_t inputs_, outputs_, hidden_;
  int64_t input_stride_, output_stride_, cell_stride_;
  Storage* no_weights_;       // zeros: the rows of gates that only fill vectors up
  T* hidden_panels_;          // W_hh, of depth gates
  T* weight_panels_;          // W_ih, of depth gates
  T* projection_panels_;      // W_hr, of depth output_size
  F* gates_;                  // [chunk_rows, gates], gradients of the pre-activations
  T* input_gradients_;        // [chunk_rows, input_size]
  T* hidden_gradient_;        // [batch, output_size]
  T* cell_gradient_;          // [batch, units]
  F* output_gradients_;       // [chunk_rows, output_size], from outside and from later steps
  T* unprojected_gradients_;  // [batch, units]
  F* unprojected_;            // [chunk_rows, units]: o * tanh(c)
  T* input_factors_;          // panels of depth chunk rows: inputs, earlier outputs, o * tanh(c)
  T* output_factors_;
  T* unprojected_factors_;
  F* scratch_;  // [threads, scratch_size_]
  int64_t scratch_size_;
  Sums input_sums_;  // [gates, input_size]
  Sums hidden_sums_;
  Sums projection_sums_;  // [output_size, units]
  T* bias_sums_;
};

FASTOPT_END_NAMESPACE
