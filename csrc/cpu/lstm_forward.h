#pragma once

#include "cpu/lstm_walk.h"

FASTOPT_BEGIN_NAMESPACE

// The forward pass of one direction.
template <class Storage>
class LstmForwardPass {
 public:
  using T = ComputeType<Storage>;              // of the arithmetic
  using F = typename FactorOf<Storage>::type;  // of what is multiplied

  LstmForwardPass(const LstmForward& call, const LstmWalk<T>& walk, int direction)
      : call_(call), layer_(call.layer), walk_(walk), direction_(direction) {}

  void reserve(Workspace& space) {
    const int64_t inputs = layer_.input_size, outputs = layer_.output_size;
    input_stride_ = inputs + LstmWalk<T>::kSkew;
    hidden_stride_ = padded_columns<T>(outputs) + LstmWalk<T>::kSkew;
    cell_stride_ = walk_.units + LstmWalk<T>::kSkew;
    if (call_.packed) {
      packed_ = static_cast<const T*>(call_.packed) + direction_ * packed_count();
    } else {
      space.reserve(&own_packed_, packed_count());
    }
    space.reserve(&inputs_, layer_.chunk_rows * input_stride_);
    space.reserve(&gates_, layer_.chunk_rows * walk_.gate_stride);
    space.reserve(&hidden_[0], layer_.batch * hidden_stride_);
    space.reserve(&hidden_[1], layer_.batch * hidden_stride_);
    space.reserve(&cells_, layer_.batch * cell_stride_);
    if (projected()) {
      space.reserve(&unprojected_, layer_.batch * cell_stride_);
      space.reserve(&projections_, layer_.batch * hidden_stride_);
    }
  }

  // Words in the packed weights of one direction: input_panels, hidden_panels, the sum of the
  // biases and projection_panels, one after the other.
  int64_t packed_count() const {
    const int64_t projection =
        projected() ? words_of<F>(layer_.hidden_size) * padded_columns<T>(layer_.output_size) : 0;
    const int64_t rows = words_of<F>(layer_.input_size) + words_of<F>(layer_.output_size) + 1;
    return rows * walk_.gates + projection;
  }

  void run(Team team) {
    if (!call_.packed) pack(team, own_packed_);
    start_states(team);
    team.wait();
    const int64_t chunk_count = layer_.chunk_count;
    int parity = 0;
    for (int64_t i = 0; i < chunk_count; ++i) {
      const int64_t chunk = direction_ == 0 ? i : chunk_count - 1 - i;
      const int64_t begin = layer_.chunks[chunk], end = layer_.chunks[chunk + 1];
      multiply_inputs(team, begin, end);
      team.wait();
      for (int64_t s = 0; s < end - begin; ++s) {
        const int64_t t = direction_ == 0 ? begin + s : end - 1 - s;
        step(team, t, layer_.first_token[begin], parity);
        parity ^= 1;
      }
      team.wait();
    }
    write_final_states(team);
  }

  void pack(Team team, T* packed) const {
    const LstmLayer::Weights& weights = layer_.weights[direction_];
    const int64_t hidden = layer_.hidden_size, outputs = layer_.output_size;
    T* hidden_panels = packed + words_of<F>(layer_.input_size) * walk_.gates;
    T* bias = hidden_panels + words_of<F>(outputs) * walk_.gates;
    const Range part = team.share(hidden, Tiling<T>::kPanel);
    pack_gate_columns<F, Storage>(weights.input, layer_.input_size, hidden, walk_.units, part,
                                  packed);
    pack_gate_columns<F, Storage>(weights.hidden, outputs, hidden, walk_.units, part,
                                  hidden_panels);
    if (projected()) {
      const Storage* rows = static_cast<const Storage*>(weights.projection);
      const Range columns = team.share(outputs, Tiling<T>::kPanel);
      pack_columns<F>([=](int64_t n) { return rows + n * hidden; }, hidden, outputs, columns.begin,
                      columns.end, bias + walk_.gates);
    }
    if (team.rank == 0) {
      for (int64_t i = 0; i < walk_.gates; ++i) {
        const int64_t unit = i % walk_.units, place = i / walk_.units * hidden + unit;
        bias[i] = 0;
        if (unit >= hidden || !weights.input_bias) continue;
        bias[i] = load(static_cast<const Storage*>(weights.input_bias) + place) +
                  load(static_cast<const Storage*>(weights.hidden_bias) + place);
      }
    }
  }

 private:
  bool projected() const { return layer_.weights[direction_].projection != nullptr; }

  const T* input_panels() const { return call_.packed ? packed_ : own_packed_; }
  const T* hidden_panels() const {
    return input_panels() + words_of<F>(layer_.input_size) * walk_.gates;
  }
  const T* bias() const { return hidden_panels() + words_of<F>(layer_.output_size) * walk_.gates; }
  const T* projection_panels() const { return bias() + walk_.gates; }

  void start_states(Team team) {
    const int64_t hidden = layer_.hidden_size, outputs = layer_.output_size;
    const Range rows = team.share(layer_.batch);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t place = direction_ * layer_.batch + row;
      const auto* h = static_cast<const Storage*>(layer_.initial_hidden) + place * outputs;
      const auto* c = static_cast<const Storage*>(layer_.initial_cell) + place * hidden;
      convert_row(h, outputs, hidden_[0] + row * hidden_stride_);
      convert_row(h, outputs, hidden_[1] + row * hidden_stride_);
      convert_row(c, hidden, cells_ + row * cell_stride_);
    }
    for (F* states : hidden_) {
      fill_last_words(states + rows.begin * hidden_stride_, rows.end - rows.begin, hidden_stride_,
                      outputs);
    }
    if (projected()) {
      fill_last_words(unprojected_ + rows.begin * cell_stride_, rows.end - rows.begin, cell_stride_,
                      hidden);
    }
  }

  // Pre-activations of all steps of a chunk, as far as the input makes them.
  void multiply_inputs(Team team, int64_t begin, int64_t end) {
    const int64_t first = layer_.first_token[begin];
    const Range rows = team.share(layer_.first_token[end] - first);
    TokenCursor at{layer_, begin, 0};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      at.move_to(first + row);
      convert_row(walk_.template input_row<Storage>(at.t, at.row), layer_.input_size,
                  inputs_ + row * input_stride_);
      convert_row(bias(), walk_.gates, gates_ + row * walk_.gate_stride);
    }
    fill_last_words(inputs_ + rows.begin * input_stride_, rows.end - rows.begin, input_stride_,
                    layer_.input_size);
    for (int gate = 0; gate < 4; ++gate) {
      multiply<F>({inputs_ + rows.begin * input_stride_, input_stride_}, rows.end - rows.begin,
                  input_panels() + words_of<F>(layer_.input_size) * gate * walk_.units,
                  layer_.hidden_size, layer_.input_size,
                  gates_ + rows.begin * walk_.gate_stride + gate * walk_.units, walk_.gate_stride,
                  Into::kAdd);
    }
  }

  void step(Team team, int64_t t, int64_t first_of_chunk, int parity) {
    const int64_t active = layer_.batch_sizes[t];
    const int64_t first = layer_.first_token[t];
    const F* before = hidden_[parity];
    F* after = hidden_[parity ^ 1];
    T* gates = gates_ + (first - first_of_chunk) * walk_.gate_stride;
    const bool by_rows = walk_.shares_rows(team.size);
    // A thread's rows lie team.size apart: when sequences end, all lose rows alike.
    const int64_t spacing = by_rows ? team.size : 1, start = by_rows ? team.rank : 0;
    const int64_t rows = active > start ? (active - start + spacing - 1) / spacing : 0;
    const Range units =
        by_rows ? Range{0, layer_.hidden_size} : team.share(layer_.hidden_size, Tiling<T>::kPanel);
    constexpr int64_t kPanel = Tiling<T>::kPanel;
    F* cell_outputs = projected() ? unprojected_ : after;
    const int64_t cell_output_stride = projected() ? cell_stride_ : hidden_stride_;
    // With many rows, the gates of a panel's units are still in the L1 cache for the cells.
    const int64_t block = rows > 1 ? kPanel : units.end - units.begin;
    for (int64_t unit = units.begin; unit < units.end; unit += block) {
      const int64_t width = units.end - unit < block ? units.end - unit : block;
      for (int gate = 0; gate < 4; ++gate) {
        multiply<F>({before + start * hidden_stride_, spacing * hidden_stride_}, rows,
                    hidden_panels() + words_of<F>(layer_.output_size) * (gate * walk_.units + unit),
                    width, layer_.output_size,
                    gates + start * walk_.gate_stride + gate * walk_.units + unit,
                    spacing * walk_.gate_stride, Into::kAdd);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = start + i * spacing;
        advance_cells(gates + row * walk_.gate_stride + unit, cells_ + row * cell_stride_ + unit,
                      cell_outputs + row * cell_output_stride + unit, first + row, unit, width);
      }
    }
    if (projected()) {
      if (!by_rows) team.wait();
      const Range columns =
          by_rows ? Range{0, layer_.output_size} : team.share(layer_.output_size, kPanel);
      multiply<F>({unprojected_ + start * cell_stride_, spacing * cell_stride_}, rows,
                  projection_panels() + words_of<F>(layer_.hidden_size) * columns.begin,
                  columns.end - columns.begin, layer_.hidden_size,
                  projections_ + start * hidden_stride_ + columns.begin, spacing * hidden_stride_,
                  Into::kReplace);
      const int64_t width = columns.end - columns.begin;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = start + i * spacing;
        const int64_t place = row * hidden_stride_ + columns.begin;
        convert_row(projections_ + place, width, after + place);
        convert_row(projections_ + place, width, output_row(first + row) + columns.begin);
      }
    }
    if (!by_rows) team.wait();
  }

  void advance_cells(T* gates, T* cells, F* outputs, int64_t token, int64_t unit, int64_t width) {
    const int64_t place = direction_ * layer_.tokens + token, hidden = layer_.hidden_size;
    Storage* saved_gates = static_cast<Storage*>(call_.saved_gates);
    T* saved_cells = static_cast<T*>(call_.saved_cells);
    if (saved_gates) saved_gates += place * 4 * hidden + unit;
    if (saved_cells) saved_cells += place * hidden + unit;
    Storage* output = projected() ? nullptr : output_row(token) + unit;
    for_each_lanes<T>(width, [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      const T* pre = gates + i;
      const int64_t units = walk_.units;
      const LstmGates<V> now =
          activated<T>(LstmGates<V>{load_as<V>(pre), load_as<V>(pre + units),
                                    load_as<V>(pre + 2 * units), load_as<V>(pre + 3 * units)});
      const V cell = next_cell(now, load_as<V>(cells + i));
      store(cells + i, cell);
      const V state = hidden_of<T>(now, cell);
      store(outputs + i, state);
      if (output) store(output + i, state);
      if (!saved_gates) return;
      store(saved_gates + i, now.input);
      store(saved_gates + hidden + i, now.forget);
      store(saved_gates + 2 * hidden + i, now.cell);
      store(saved_gates + 3 * hidden + i, now.output);
      store(saved_cells + i, cell);
    });
  }

  Storage* output_row(int64_t token) const {
    return static_cast<Storage*>(call_.output) +
           (token * layer_.directions + direction_) * layer_.output_size;
  }

  void write_final_states(Team team) {
    const Range rows = team.share(layer_.batch);
    const int64_t outputs = layer_.output_size;
    int64_t last = layer_.steps - 1;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      while (layer_.batch_sizes[last] <= row) --last;
      const int64_t token = direction_ == 0 ? layer_.first_token[last] + row : row;
      const int64_t place = direction_ * layer_.batch + row;
      const Storage* source = output_row(token);
      Storage* h = static_cast<Storage*>(call_.final_hidden) + place * outputs;
      for (int64_t i = 0; i < outputs; ++i) h[i] = source[i];
      convert_row(cells_ + row * cell_stride_, layer_.hidden_size,
                  static_cast<Storage*>(call_.final_cell) + place * layer_.hidden_size);
    }
  }

  const LstmForward& call_;
  const LstmLayer& layer_;
  const LstmWalk<T>& walk_;
  const int direction_;
  int64_t input_stride_, hidden_stride_, cell_stride_;
  const T* packed_;  // the caller's, or own_packed_
  T* own_packed_;
  F* inputs_;       // [chunk_rows, input_size]
  T* gates_;        // [chunk_rows, gates]
  F* hidden_[2];    // [batch, output_size], of even and of odd steps
  T* cells_;        // [batch, units]
  F* unprojected_;  // [batch, units]
  T* projections_;  // [batch, output_size]
};

FASTOPT_END_NAMESPACE
