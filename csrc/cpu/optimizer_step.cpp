// One loop for every optimizer: values are widened to the arithmetic type in registers, a rule of
// core/update_rules.h runs over them, and what it changed is rounded and stored. Operands that lie
// in another order than the parameter are gathered into tiles first.

#include "cpu/optimizer_step.h"

#include <utility>

#include "core/rule_table.h"
#include "cpu/coded_state.h"
#include "cpu/portions.h"
#include "cpu/simd.h"

FASTOPT_BEGIN_NAMESPACE

namespace {

template <class Storage>
struct Tile {
  Storage* operands[kOperands];
  int64_t size;
};

template <class Rule, WeightDecay kWeightDecay, class Storage>
void apply_rule(const BoundRule& bound, const Tile<Storage>& tile) {
  using T = ComputeType<Storage>;
  const Rule rule = *reinterpret_cast<const Rule*>(bound.functor);
  const T decay = static_cast<T>(bound.decay);
  const T sign = static_cast<T>(bound.maximize ? -1 : 1);
  Storage* const param = tile.operands[kParam];
  const Storage* const grad = tile.operands[kGrad];
  Storage* slots[kMaxSlots];
  for (int s = 0; s < Rule::kSlots; ++s) slots[s] = tile.operands[kFirstSlot + s];
  for_each_lanes<T>(tile.size, [&](int64_t i, auto lanes) {
    using V = decltype(lanes);
    V p = load_as<V>(param + i);
    V slot[kMaxSlots];
#pragma GCC unroll 4
    for (int s = 0; s < Rule::kSlots; ++s) slot[s] = load_as<V>(slots[s] + i);
    update_element<kWeightDecay>(rule, sign, decay, p, load_as<V>(grad + i), slot);
    store(param + i, p);
#pragma GCC unroll 4
    for (int s = 0; s < Rule::kSlots; ++s) store(slots[s] + i, slot[s]);
  });
}

template <class Storage>
using ApplyRule = void (*)(const BoundRule& bound, const Tile<Storage>& tile);

template <class Storage, WeightDecay kWeightDecay, std::size_t... kIndices>
ApplyRule<Storage> find_apply(int rule, std::index_sequence<kIndices...>) {
  static constexpr ApplyRule<Storage> kApply[] = {
      apply_rule<RuleAt<ComputeType<Storage>, kIndices>, kWeightDecay, Storage>...};
  return kApply[rule];
}

template <class Storage>
void apply_bound(const BoundRule& bound, const Tile<Storage>& tile) {
  const auto apply = bound.weight_decay == WeightDecay::kL2
                         ? find_apply<Storage, WeightDecay::kL2>(bound.rule, RuleIndices{})
                         : find_apply<Storage, WeightDecay::kDecoupled>(bound.rule, RuleIndices{});
  apply(bound, tile);
}

template <class Storage>
void clip_tile(Storage* grad, int64_t n, const Tail& tail) {
  using T = ComputeType<Storage>;
  const T scale = static_cast<T>(tail.grad_scale);
  const Clamp<T> clamp(tail.clip_value);
  for_each_lanes<T>(n, [&](int64_t i, auto lanes) {
    store(grad + i, clamp(scale * load_as<decltype(lanes)>(grad + i)));
  });
}

template <class Storage>
void average_tile(Storage* average, const Storage* param, int64_t n, double weight) {
  if (weight == 1) {  // the sum would make a NaN of an infinity
    memcpy(average, param, n * sizeof(Storage));
    return;
  }
  using T = ComputeType<Storage>;
  const Lerp<T> lerp(weight);
  for_each_lanes<T>(n, [&](int64_t i, auto lanes) {
    using V = decltype(lanes);
    store(average + i, lerp(load_as<V>(average + i), load_as<V>(param + i)));
  });
}

// A tile stays in the L1 cache from its first operation to its last: only the first costs memory.
template <class Storage>
void run_tile(const StepTask& task, const BoundRule* bound, const Tail& tail, int64_t start) {
  OperandTile<Storage> operands[kOperands];
  Tile<Storage> tile;
  tile.size = task.numel - start < kTile ? task.numel - start : kTile;
  for (int k = 0; k < kOperands; ++k) {
    if (!task.operands[k]) continue;
    tile.operands[k] = operands[k].load_tile(task.operands[k], task.walk, k, start, tile.size);
  }
  if (bound) {
    if (tail.changes_gradients()) clip_tile(tile.operands[kGrad], tile.size, tail);
    apply_bound(*bound, tile);
    operands[kParam].store_tile();
    for (int k = kFirstSlot; k < kOperands && task.operands[k]; ++k) operands[k].store_tile();
    if (tail.zero_grad) memset(tile.operands[kGrad], 0, tile.size * sizeof(Storage));
    if (tail.zero_grad || tail.changes_gradients()) operands[kGrad].store_tile();
  }
  if (task.operands[kAverage]) {
    average_tile(tile.operands[kAverage], tile.operands[kParam], tile.size, tail.average_weight);
    operands[kAverage].store_tile();
  }
}

template <class Storage>
void run_plain_tiles(const StepTask& task, const BoundRule* bound, const Tail& tail, int64_t begin,
                     int64_t end) {
  for (; begin < end; ++begin) run_tile<Storage>(task, bound, tail, begin * kTile);
}

// The same for what is stored otherwise than in the parameter's dtype.
template <class Storage>
void run_coded_tiles(const StepTask& task, const BoundRule* bound, const Tail& tail, int64_t begin,
                     int64_t end) {
  CodedUpdate<Storage> coded(task, *bound);
  for (; begin < end; ++begin) {
    const int64_t start = begin * kTile;
    const int64_t size = task.numel - start < kTile ? task.numel - start : kTile;
    OperandTile<Storage> operand;
    Storage* const grad = operand.load_tile(task.operands[kGrad], task.walk, kGrad, start, size);
    if (tail.changes_gradients()) clip_tile(grad, size, tail);
    coded.update(grad, start, size);
    if (tail.zero_grad) memset(grad, 0, size * sizeof(Storage));
    if (tail.zero_grad || tail.changes_gradients()) operand.store_tile();
    if (task.operands[kAverage]) {
      OperandTile<Storage> averages;
      Storage* const average =
          averages.load_tile(task.operands[kAverage], task.walk, kAverage, start, size);
      average_tile(average, static_cast<const Storage*>(task.operands[kParam]) + start, size,
                   tail.average_weight);
      averages.store_tile();
    }
  }
}

// The processor's own prefetcher starts anew with every tensor, a few misses late.
void prefetch_start(const StepTask& task) {
  constexpr int kLines = 4;
  for (void* operand : task.operands) {
    for (int line = 0; line < kLines && operand; ++line) {
      __builtin_prefetch(static_cast<const char*>(operand) + 64 * line, 1);
    }
  }
}

void run_tiles(const StepBatch& batch, int64_t begin, int64_t end) {
  using Run = void (*)(const StepTask&, const BoundRule*, const Tail&, int64_t, int64_t);
  static constexpr Run kRunPlain[kDTypes] = {run_plain_tiles<float>, run_plain_tiles<double>,
                                             run_plain_tiles<BFloat16>, run_plain_tiles<Half>};
  // Parameters in double precision have no coded state.
  static constexpr Run kRunCoded[kDTypes] = {run_coded_tiles<float>, nullptr,
                                             run_coded_tiles<BFloat16>, run_coded_tiles<Half>};
  for (const StepTask* task = task_at(batch, begin); begin < end; ++task) {
    const int64_t behind = task->first_tile + tiles_of(task->numel);
    const int64_t last = end < behind ? end : behind;
    const BoundRule* bound = task->operands[kGrad] ? batch.rules + task->bound_rule : nullptr;
    const bool coded = bound && task->coding;
    const Run run = (coded ? kRunCoded : kRunPlain)[static_cast<int>(task->dtype)];
    if (begin + 1 < end && task + 1 < batch.tasks + batch.task_count) prefetch_start(task[1]);
    if (begin < last) {
      run(*task, bound, batch.tail, begin - task->first_tile, last - task->first_tile);
      begin = last;
    }
  }
}

void step(const StepBatch& batch) {
  for_each_portion(useful_threads(batch.tile_count, batch.threads), batch.tile_count,
                   [&](int64_t begin, int64_t end) { run_tiles(batch, begin, end); });
}

void bind(BoundRule& bound, DType dtype, const double* hyperparameters, const Progress& progress) {
  const auto bind_functor =
      dtype == DType::kFloat64 ? AllRules::bind<double> : AllRules::bind<float>;
  bind_functor(bound.rule, bound.functor, hyperparameters, progress);
}

}  // namespace

extern const OptimizerKernels kOptimizerKernels;
const OptimizerKernels kOptimizerKernels = {AllRules::kInfo, static_cast<int>(kRules), bind, step};

FASTOPT_END_NAMESPACE
