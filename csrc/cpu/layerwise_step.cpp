// The pass before the step of rules that hang on the whole parameter: it reads what the step is
// going to read, and writes nothing but sums.

#include "cpu/layerwise_step.h"

#include <utility>

#include "core/rule_table.h"
#include "core/with_storage.h"
#include "cpu/portions.h"
#include "cpu/simd.h"

FASTOPT_BEGIN_NAMESPACE

namespace {

// In double precision: squares of floats overflow where their root does not.
template <class T>
class SumOfSquares {
 public:
  void add(Vec<T> values) {
    Vec<double> wide[kDoubles<T>];
    widen(values, wide);
#pragma GCC unroll 2
    for (int k = 0; k < kDoubles<T>; ++k) lanes_[k] = lanes_[k] + wide[k] * wide[k];
  }
  void add(T value) { rest_ += static_cast<double>(value) * static_cast<double>(value); }
  double total() const {
    double sum = rest_;
    for (const Vec<double>& lanes : lanes_) sum += sum_of_lanes(lanes);
    return sum;
  }

 private:
  Vec<double> lanes_[kDoubles<T>] = {};
  double rest_ = 0;
};

// As it is once stored in the gradient.
template <class Storage, class V>
V rounded(V value) {
  constexpr int kLanes = sizeof(V) / sizeof(ComputeType<Storage>);
  Storage stored[kLanes];
  store(stored, value);
  return load_as<V>(stored);
}

template <class Rule, WeightDecay kWeightDecay, class Storage>
Squares measure_tile(const StepTask& task, const BoundRule& bound, const Tail& tail,
                     int64_t index) {
  using T = ComputeType<Storage>;
  OperandTile<Storage> operands[kOperands];
  const int64_t start = index * kTile;
  const int64_t size = task.numel - start < kTile ? task.numel - start : kTile;
  const auto tile = [&](int k) -> const Storage* {
    return operands[k].load_tile(task.operands[k], task.walk, k, start, size);
  };
  const Storage* const param = tile(kParam);
  const Storage* const grad = tile(kGrad);
  const Storage* slots[kMaxSlots];
  for (int s = 0; s < Rule::kSlots; ++s) slots[s] = tile(kFirstSlot + s);

  const Rule rule = *reinterpret_cast<const Rule*>(bound.functor);
  const T decay = static_cast<T>(bound.decay);
  const T sign = static_cast<T>(bound.maximize ? -1 : 1);
  const T scale = static_cast<T>(tail.grad_scale);
  const Clamp<T> clamp(tail.clip_value);
  SumOfSquares<T> params, directions;
  const auto add = [&](auto p, auto direction) {
    params.add(p);
    directions.add(direction);
  };
  const Measured<Rule, decltype(add)> measured{rule, add};
  for_each_lanes<T>(size, [&](int64_t i, auto lanes) {
    using V = decltype(lanes);
    V p = load_as<V>(param + i), g = load_as<V>(grad + i), slot[kMaxSlots];
    if (tail.changes_gradients()) g = rounded<Storage>(clamp(scale * g));
#pragma GCC unroll 4
    for (int s = 0; s < Rule::kSlots; ++s) slot[s] = load_as<V>(slots[s] + i);
    update_element<kWeightDecay>(measured, sign, decay, p, g, slot);
  });
  return {params.total(), directions.total()};
}

using Measure = Squares (*)(const StepTask&, const BoundRule&, const Tail&, int64_t);
using Fold = void (*)(BoundRule&, const Squares&);

// What is done for one of the rules in one dtype; nothing where a rule is not layer-wise.
template <class Storage, std::size_t kIndex>
struct OfRule {
  using Rule = RuleAt<ComputeType<Storage>, kIndex>;

  static constexpr Measure measure(bool is_l2) {
    if constexpr (kIsLayerwise<Rule>) {
      return is_l2 ? measure_tile<Rule, WeightDecay::kL2, Storage>
                   : measure_tile<Rule, WeightDecay::kDecoupled, Storage>;
    }
    return nullptr;
  }
  static void fold(BoundRule& bound, const Squares& squares) {
    if constexpr (kIsLayerwise<Rule>) {
      reinterpret_cast<Rule*>(bound.functor)->fold_squares(squares);
    }
  }
};

template <class Storage, std::size_t... kIndices>
Measure find_measure(const BoundRule& bound, std::index_sequence<kIndices...>) {
  static constexpr Measure kL2[] = {OfRule<Storage, kIndices>::measure(true)...};
  static constexpr Measure kDecoupled[] = {OfRule<Storage, kIndices>::measure(false)...};
  return (bound.weight_decay == WeightDecay::kL2 ? kL2 : kDecoupled)[bound.rule];
}

template <class Storage, std::size_t... kIndices>
Fold find_fold(const BoundRule& bound, std::index_sequence<kIndices...>) {
  static constexpr Fold kFold[] = {OfRule<Storage, kIndices>::fold...};
  return kFold[bound.rule];
}

void measure_tiles(const StepBatch& batch, Squares* squares, int64_t begin, int64_t end) {
  for (const StepTask* task = task_at(batch, begin); begin < end; ++task) {
    const BoundRule& bound = batch.rules[task->bound_rule];
    const Measure measure = with_storage(task->dtype, [&](auto storage) {
      return find_measure<decltype(storage)>(bound, RuleIndices{});
    });
    const int64_t tiles = tiles_of(task->numel);
    for (; begin < end && begin - task->first_tile < tiles; ++begin) {
      squares[begin] = measure(*task, bound, batch.tail, begin - task->first_tile);
    }
  }
}

void fold_squares(const StepBatch& batch, BoundRule* rules, Squares* squares) {
  for_each_portion(useful_threads(batch.tile_count, batch.threads), batch.tile_count,
                   [&](int64_t begin, int64_t end) { measure_tiles(batch, squares, begin, end); });
  for (const StepTask* task = batch.tasks; task < batch.tasks + batch.task_count; ++task) {
    Squares sum;
    for (int64_t t = 0; t < tiles_of(task->numel); ++t) {
      sum.param += squares[task->first_tile + t].param;
      sum.direction += squares[task->first_tile + t].direction;
    }
    BoundRule& bound = rules[task->bound_rule];
    const Fold fold = with_storage(task->dtype, [&](auto storage) {
      return find_fold<decltype(storage)>(bound, RuleIndices{});
    });
    fold(bound, sum);
  }
}

}  // namespace

extern const LayerwiseKernels kLayerwiseKernels;
const LayerwiseKernels kLayerwiseKernels = {fold_squares};

FASTOPT_END_NAMESPACE
