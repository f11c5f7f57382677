// The loop of optimizer_step.cu for state that is stored otherwise than in the parameter's dtype: a
// warp takes one block of elements that share a scale after the other. The parameter is dense and
// its state lies as it does; the gradient may lie otherwise.

#include <stdexcept>

#include "cuda/coded_state.cuh"
#include "cuda/step_update.cuh"

namespace fastopt::cuda {

namespace {

// At least: with 80 registers for a thread instead of 128, AdamW spills.
constexpr int kBlocksPerMultiprocessor = 2;

// Of a chunk, which draws one group of random words, each warp has some blocks.
constexpr int64_t kShareOfWarp = kChunk / (kStepThreads / kWarp);
static_assert(kChunk == kElementsOfGroup && kShareOfWarp % kCodeBlock == 0);

// A block of an operand that may lie in another order than the parameter: then a copy in the warp's
// tile. Made and finished by whole warps.
template <class Storage>
struct WalkedBlock {
  Storage* data;  // [size]
  bool is_aligned;

  __device__ WalkedBlock(void* address, const DeviceTask& task, int operand, int64_t start,
                         int size, Storage* tile)
      : data(task.walk ? tile : static_cast<Storage*>(address) + start),
        is_aligned(cuda::is_aligned<kQuad>(data)),
        address_(static_cast<Storage*>(address)),
        walk_(task.walk),
        operand_(operand),
        start_(start),
        size_(size) {
    for_each_walked([&](Storage& outside, Storage& inside) { inside = outside; });
  }

  __device__ void write_back() const {
    for_each_walked([&](Storage& outside, Storage& inside) { outside = inside; });
  }

 private:
  template <class Visitor>
  __device__ void for_each_walked(const Visitor& visit) const {
    if (!walk_) return;
    __syncwarp();
#pragma unroll 1  // it is long
    for (int i = lane_of_warp(); i < size_; i += kWarp) {
      visit(address_[offset_of(*walk_, operand_, start_ + i)], data[i]);
    }
    __syncwarp();
  }

  Storage* address_;
  const Walk* walk_;
  int operand_;
  int64_t start_;
  int size_;
};

// Elements [start, start + size) of a parameter, a block of those that share a scale, by a warp.
// `words` are the group's; the tile has room for a block.
template <SlotCode kCode, class Rule, class Storage>
__device__ void step_block(const Update<Rule, float>& update, const DeviceTask& task, Storage* grad,
                           int64_t start, int size, const uint32_t* words, Storage* tile) {
  int firsts[kQuads];
  LaneRange ranges[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    firsts[q] = (q * kWarp + lane_of_warp()) * kQuad;
    ranges[q] = {0, size - firsts[q] < kQuad ? size - firsts[q] : kQuad};
  }
  const CodedParam<Storage> coded_param(task, start);
  float params[kQuads][kQuad];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) coded_param.load(firsts[q], ranges[q], params[q]);
  if (grad) {
    using Slot = CodedSlot<kCode>;
    const auto slot_at = [&](int s) {
      return Slot(task, s, kPositiveSlotsOf<Rule> >> s & 1, start);
    };
    const WalkedBlock<Storage> gradient(grad, task, kGrad, start, size, tile);
    float grads[kQuads][kQuad], slots[kMaxSlots][kQuads][kQuad];
    typename Slot::Storage stored[kMaxSlots][kQuads][kQuad];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      load_lanes<kQuad>(gradient.data + firsts[q], gradient.is_aligned, ranges[q], grads[q]);
      coded_param.join(firsts[q], ranges[q], params[q]);
#pragma unroll
      for (int s = 0; s < Rule::kSlots; ++s) slot_at(s).read(firsts[q], ranges[q], stored[s][q]);
    }
#pragma unroll
    for (int s = 0; s < Rule::kSlots; ++s) {
      const float before = slot_at(s).before();
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          slots[s][q][i] = slot_at(s).decoded(stored[s][q][i], before);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      update.template change<Storage>(grads[q]);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        float slot[kMaxSlots];
#pragma unroll
        for (int s = 0; s < Rule::kSlots; ++s) slot[s] = slots[s][q][i];
        update.step(params[q][i], grads[q][i], slot);
#pragma unroll
        for (int s = 0; s < Rule::kSlots; ++s) slots[s][q][i] = slot[s];
        if (update.zero_grad) grads[q][i] = 0;
      }
      const int64_t place = (start + firsts[q]) % kElementsOfGroup;
      coded_param.store(firsts[q], ranges[q], words, place, params[q]);
      if (update.writes_gradients()) {
        store_lanes<kQuad>(gradient.data + firsts[q], gradient.is_aligned, ranges[q], grads[q]);
      }
    }
    if (update.writes_gradients()) gradient.write_back();
#pragma unroll
    for (int s = 0; s < Rule::kSlots; ++s) slot_at(s).store(slots[s], firsts, ranges, words);
  }
  if (task.operands[kAverage] && update.moves_average) {
    const WalkedBlock<Storage> average(task.operands[kAverage], task, kAverage, start, size, tile);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      Storage* const at = average.data + firsts[q];
      float averages[kQuad];
      load_lanes<kQuad>(at, average.is_aligned, ranges[q], averages);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) averages[i] = update.averaged(averages[i], params[q][i]);
      store_lanes<kQuad>(at, average.is_aligned, ranges[q], averages);
    }
    average.write_back();
  }
}

template <class Rule, class Storage, SlotCode kCode>
__global__ void __launch_bounds__(kStepThreads, kBlocksPerMultiprocessor)
    coded_step_kernel(const __grid_constant__ StepArguments args,
                      const __grid_constant__ GradAddresses<kCodedTensors> grads,
                      const int64_t host_step) {
  __shared__ __align__(16) Storage tiles[kStepThreads / kWarp][kCodeBlock];
  visit_share<Storage>(args, grads, [&](const Share& share, const DeviceTask& task, Storage* grad) {
    const Update<Rule, float> update(args, share.task);
    const int64_t step = task.step.data ? static_cast<int64_t>(current(task.step)) : host_step;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    uint32_t words[kQuad];
    draw(*task.coding, step, share.start / kElementsOfGroup, words);
    const int64_t start = share.start + warp * kShareOfWarp;
    for (int64_t first = start; first < share.end && first < start + kShareOfWarp;
         first += kCodeBlock) {
      const int64_t left = share.end - first;
      step_block<kCode>(update, task, grad, first,
                        static_cast<int>(left < kCodeBlock ? left : kCodeBlock), words,
                        tiles[warp]);
    }
  });
}

using Kernel = void (*)(StepArguments, GradAddresses<kCodedTensors>, int64_t);

// None where nothing would be coded: fp32 state of fp32 parameters, and where there is no state but
// the first code, which stands for all.
template <class Rule, class Storage, SlotCode kCode>
constexpr Kernel kernel() {
  constexpr bool kIsFloat32 = kCode == SlotCode::kFloat32;
  if constexpr (Rule::kSlots == 0 ? kIsFloat32 : !(kIsFloat32 && std::is_same_v<Storage, float>)) {
    return coded_step_kernel<Rule, Storage, kCode>;
  } else {
    return nullptr;
  }
}

template <class Storage, SlotCode kCode, std::size_t... kIndices>
Kernel kernel_at(int rule, std::index_sequence<kIndices...>) {
  static constexpr Kernel kKernels[] = {kernel<RuleAt<float, kIndices>, Storage, kCode>()...};
  return rule < kCodedRules ? kKernels[rule] : nullptr;
}

template <class Storage>
Kernel kernel_for(SlotCode slots, int rule) {
  constexpr std::make_index_sequence<kCodedRules> kRules{};
  switch (slots) {
    case SlotCode::kBFloat16:
      return kernel_at<Storage, SlotCode::kBFloat16>(rule, kRules);
    case SlotCode::kBlockwise8:
      return kernel_at<Storage, SlotCode::kBlockwise8>(rule, kRules);
    default:
      return kernel_at<Storage, SlotCode::kFloat32>(rule, kRules);
  }
}

Kernel find_kernel(DType dtype, SlotCode slots, int rule) {
  switch (dtype) {
    case DType::kFloat32:
      return kernel_for<float>(slots, rule);
    case DType::kBFloat16:
      return kernel_for<BFloat16>(slots, rule);
    case DType::kFloat16:
      return kernel_for<Half>(slots, rule);
    case DType::kFloat64:
      break;
  }
  return nullptr;
}

}  // namespace

void load_coded_kernels(DType dtype, SlotCode slots, int device) {
#if !defined(FASTOPT_HOST_SIM)
  const DeviceGuard guard(device);
#else
  (void)device;
#endif
  for (int rule = 0; rule < kCodedRules; ++rule) {
    if (const Kernel found = find_kernel(dtype, slots, rule)) load_kernel(found);
  }
}

void launch_coded_step(const TaskRange& range, SlotCode slots, const StepRule& rule,
                       const DeviceTail& tail, const Stream& stream) {
  const Kernel found = find_kernel(range.dtype, slots, rule.rule);
  if (!found) throw std::invalid_argument("no kernel has this rule with state stored so");
  GradAddresses<kCodedTensors> grads = {};
  std::copy(range.grads, range.grads + (range.end - range.begin), grads.at);
  launch(kernel_name("coded_step_kernel", rule.rule).c_str(), stream,
         {range.chunk_end - range.first_chunk, kStepThreads}, found,
         step_arguments(range, rule, tail), grads, static_cast<int64_t>(rule.progress.step));
}

}  // namespace fastopt::cuda
