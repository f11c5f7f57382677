// One loop for every optimizer: values are widened to the arithmetic type in registers, a rule of
// core/update_rules.h runs over them, and what it changed is rounded and stored. Operands that lie
// in another order than the parameter are gathered into tiles first.

#include "cpu/optimizer_step.h"

#include <atomic>
#include <new>
#include <utility>

#include "cpu/simd.h"
#include "cpu/threads.h"

FASTOPT_BEGIN_NAMESPACE

namespace {

constexpr int kParam = 0;
constexpr int kGrad = 1;
constexpr int kFirstSlot = 2;

template <class Storage>
struct Tile {
  Storage* operands[kOperands];
  int64_t size;
};

// n elements of one operand, from the `start`-th of the walk on, as contiguous runs:
// visit(offset of the first element, stride, elements).
template <class Visitor>
void for_each_run(const Walk& walk, int operand, int64_t start, int64_t n, Visitor visit) {
  const int64_t* strides = walk.strides[operand];
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = walk.dims - 1; d >= 0; --d) {
    index[d] = start % walk.sizes[d];
    start /= walk.sizes[d];
    offset += index[d] * strides[d];
  }
  const int inner = walk.dims - 1;
  while (n > 0) {
    const int64_t left = walk.sizes[inner] - index[inner];
    const int64_t run = n < left ? n : left;
    visit(offset, strides[inner], run);
    n -= run;
    offset += run * strides[inner];
    index[inner] += run;
    for (int d = inner; d > 0 && index[d] == walk.sizes[d]; --d) {
      offset += strides[d - 1] - index[d] * strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// One operand's share of a tile: its own memory where that is contiguous, otherwise a copy.
template <class Storage>
class OperandTile {
 public:
  Storage* load_tile(const StepTask& task, int operand, int64_t start, int64_t n) {
    data_ = static_cast<Storage*>(task.operands[operand]);
    walk_ = task.walk;
    operand_ = operand;
    start_ = start;
    size_ = n;
    if (!walk_) return data_ + start;
    Storage* target = buffer_;
    for_each_run(*walk_, operand, start, n, [&](int64_t offset, int64_t stride, int64_t run) {
      for (int64_t i = 0; i < run; ++i) target[i] = data_[offset + i * stride];
      target += run;
    });
    return buffer_;
  }

  void store_tile() {
    if (!walk_) return;
    const Storage* source = buffer_;
    for_each_run(*walk_, operand_, start_, size_, [&](int64_t offset, int64_t stride, int64_t run) {
      for (int64_t i = 0; i < run; ++i) data_[offset + i * stride] = source[i];
      source += run;
    });
  }

 private:
  alignas(64) Storage buffer_[kTile];
  Storage* data_;
  const Walk* walk_;
  int operand_;
  int64_t start_, size_;
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
    V g = sign * load_as<V>(grad + i);
    if (kWeightDecay == WeightDecay::kL2) {
      g = g + decay * p;
    } else {
      p = decay * p;
    }
    V slot[kMaxSlots];
#pragma GCC unroll 4
    for (int s = 0; s < Rule::kSlots; ++s) slot[s] = load_as<V>(slots[s] + i);
    rule(p, g, slot);
    store(param + i, p);
#pragma GCC unroll 4
    for (int s = 0; s < Rule::kSlots; ++s) store(slots[s] + i, slot[s]);
  });
}

using BindRule = void (*)(void* functor, const double* hyperparameters, double step);
template <class Storage>
using ApplyRule = void (*)(const BoundRule& bound, const Tile<Storage>& tile);

template <class Rule>
void bind_rule(void* functor, const double* hyperparameters, double step) {
  static_assert(sizeof(Rule) <= sizeof(BoundRule::functor), "enlarge BoundRule::functor");
  typename Rule::Hyperparameters h;
  static_assert(sizeof h <= kMaxHyperparameters * sizeof(double), "raise kMaxHyperparameters");
  memcpy(&h, hyperparameters, sizeof h);
  new (functor) Rule(h, step);
}

template <class Rules, class Indices>
struct RuleTable;

template <class... Rules, std::size_t... kIndices>
struct RuleTable<std::tuple<Rules...>, std::index_sequence<kIndices...>> {
  template <class T, std::size_t kIndex>
  using RuleAt = std::tuple_element_t<kIndex, UpdateRules<T>>;

  template <class T>
  static BindRule bind(int rule) {
    static constexpr BindRule kBind[] = {bind_rule<RuleAt<T, kIndices>>...};
    return kBind[rule];
  }
  template <class Storage, WeightDecay kWeightDecay>
  static ApplyRule<Storage> apply(int rule) {
    static constexpr ApplyRule<Storage> kApply[] = {
        apply_rule<RuleAt<ComputeType<Storage>, kIndices>, kWeightDecay, Storage>...};
    return kApply[rule];
  }
  static constexpr UpdateRuleInfo kInfo[] = {
      {Rules::kName, Rules::kSlots,
       static_cast<int>(sizeof(typename Rules::Hyperparameters) / sizeof(double))}...};
  static constexpr int kCount = sizeof...(Rules);
};

using Table = RuleTable<UpdateRules<float>,
                        std::make_index_sequence<std::tuple_size<UpdateRules<float>>::value>>;

template <class Storage>
void unscale_tile(Storage* grad, int64_t n, double factor) {
  using T = ComputeType<Storage>;
  const T scale = static_cast<T>(factor);
  for_each_lanes<T>(n, [&](int64_t i, auto lanes) {
    store(grad + i, scale * load_as<decltype(lanes)>(grad + i));
  });
}

template <class Storage>
void run_tile(const StepTask& task, const BoundRule& bound, int64_t index) {
  OperandTile<Storage> operands[kOperands];
  const int used = kFirstSlot + Table::kInfo[bound.rule].slots;
  const int64_t start = index * kTile;
  Tile<Storage> tile;
  tile.size = task.numel - start < kTile ? task.numel - start : kTile;
  for (int k = 0; k < used; ++k) {
    tile.operands[k] = operands[k].load_tile(task, k, start, tile.size);
  }
  if (bound.unscale != 1) {
    unscale_tile(tile.operands[kGrad], tile.size, bound.unscale);
    operands[kGrad].store_tile();
  }
  const auto apply = bound.weight_decay == WeightDecay::kL2
                         ? Table::apply<Storage, WeightDecay::kL2>(bound.rule)
                         : Table::apply<Storage, WeightDecay::kDecoupled>(bound.rule);
  apply(bound, tile);
  operands[kParam].store_tile();
  for (int k = kFirstSlot; k < used; ++k) operands[k].store_tile();
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
  static void (*const kRunTile[kDTypes])(const StepTask&, const BoundRule&, int64_t) = {
      run_tile<float>, run_tile<double>, run_tile<BFloat16>, run_tile<Half>};
  int64_t low = 0, high = batch.task_count;  // the last task that starts at or before `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (batch.tasks[middle].first_tile <= begin ? low : high) = middle;
  }
  for (const StepTask* task = batch.tasks + low; begin < end; ++task) {
    const int64_t tiles = (task->numel + kTile - 1) / kTile;
    const BoundRule& bound = batch.rules[task->bound_rule];
    if (begin + 1 < end && task + 1 < batch.tasks + batch.task_count) prefetch_start(task[1]);
    for (; begin < end && begin - task->first_tile < tiles; ++begin) {
      kRunTile[static_cast<int>(task->dtype)](*task, bound, begin - task->first_tile);
    }
  }
}

struct SharedBatch {
  const StepBatch* batch;
  std::atomic<int64_t> next;
  int64_t grain;
};

// Threads take portions as they come, so that one that loses its core does not hold up the rest.
void take_portions(void* context) {
  SharedBatch& shared = *static_cast<SharedBatch*>(context);
  const int64_t count = shared.batch->tile_count;
  for (;;) {
    const int64_t begin = shared.next.fetch_add(shared.grain, std::memory_order_relaxed);
    if (begin >= count) return;
    run_tiles(*shared.batch, begin, begin + shared.grain < count ? begin + shared.grain : count);
  }
}

void step(const StepBatch& batch) {
  // Waking a thread costs about as much as 32 tiles of AdamW, 16K elements.
  constexpr int64_t kTilesPerThread = 32;
  const int64_t useful = batch.tile_count / kTilesPerThread;
  const int threads = useful < batch.threads ? static_cast<int>(useful) : batch.threads;
  if (threads <= 1) {
    run_tiles(batch, 0, batch.tile_count);
    return;
  }
  constexpr int64_t kPortionsPerThread = 8;
  SharedBatch shared{&batch, {0}, batch.tile_count / (threads * kPortionsPerThread) + 1};
  parallel_run(threads, take_portions, &shared);
}

void bind(BoundRule& bound, DType dtype, const double* hyperparameters, double step_number) {
  const BindRule bind_functor =
      dtype == DType::kFloat64 ? Table::bind<double>(bound.rule) : Table::bind<float>(bound.rule);
  bind_functor(bound.functor, hyperparameters, step_number);
}

}  // namespace

extern const OptimizerKernels kOptimizerKernels;
const OptimizerKernels kOptimizerKernels = {Table::kInfo, Table::kCount, bind, step};

FASTOPT_END_NAMESPACE
