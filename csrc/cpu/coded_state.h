#pragma once

// The update of parameters whose state is not stored in their dtype: what a block of elements is
// made of is decoded, updated and encoded in registers.

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/rule_table.h"
#include "core/state_codes.h"
#include "cpu/optimizer_step.h"
#include "cpu/random.h"

FASTOPT_BEGIN_NAMESPACE

static_assert(kElementsOfGroup % kTile == 0 && kTile % kCodeBlock == 0);

// What the elements of a group draw in a step, as core/state_codes.h says.
struct Draws {
  alignas(64) uint32_t words[kRandomGroup];
  alignas(64) uint32_t roundings[2][kRandomGroup];  // of positive and of signed bytes

  void make(const StateCoding& coding, int64_t group) {
    const int64_t first = group * kRandomGroup;
    random_row(coding.seed, coding.number, coding.step, first, first + kRandomGroup, words);
    for (int64_t i = 0; i < kRandomGroup; ++i) {
      roundings[0][i] = ByteCode<false>::rounding(state_chance(words[i]));
      roundings[1][i] = ByteCode<true>::rounding(state_chance(words[i]));
    }
  }
};

// Of the elements from a place in the group, or in a block, on.
HOST_DEVICE Bits32 draws_at(const uint32_t* draws, int64_t place) {
  return load_bits(draws + (place & (kRandomGroup - 1)));
}

// The memory of kCodeBlock elements.
struct CodedBlock {
  void* operands[kOperands];
  float* largest[kMaxSlots];
  uint16_t* remainder;
  int64_t place;  // in the group
};

using Lane = Vec<float>;

// State of a block that is to be stored in bytes, once its largest magnitude is known: while the
// next block is updated, whose divisions leave the processor time for it.
struct Waiting {
  uint8_t* data[kMaxSlots];
  float scale[kMaxSlots];
  const Draws* draws;
  float* values[kMaxSlots];  // [kCodeBlock] each
};

// Vectors whose bytes store_bytes stores.
constexpr int kTogether = 4;

// Of a slot, from the i-th element on.
template <bool kPositive>
HOST_DEVICE void encode_together(const Waiting& block, int slot, int64_t i) {
  Bits32 codes[kTogether];
  FASTOPT_UNROLL
  for (int k = 0; k < kTogether; ++k, i += Lane::kWidth) {
    codes[k] =
        ByteCode<!kPositive>::encode(load_as<Lane>(block.values[slot] + i), block.scale[slot],
                                     draws_at(block.draws->roundings[!kPositive], i));
  }
  store_bytes(block.data[slot] + i - kTogether * Lane::kWidth, codes);
}

// How a state tensor is loaded and stored in a block.
template <SlotCode kCode, bool kPositive>
struct CodedSlot;

template <bool kPositive>
struct CodedSlot<SlotCode::kFloat32, kPositive> {
  float* data;

  CodedSlot(void* memory, float*) : data(static_cast<float*>(memory)) {}
  HOST_DEVICE Lane load(int64_t i) const { return load_as<Lane>(data + i); }
  HOST_DEVICE void store(int64_t i, Lane value, Bits32, float*, Bits32&) const {
    fastopt::store(data + i, value);
  }
};

template <bool kPositive>
struct CodedSlot<SlotCode::kBFloat16, kPositive> {
  BFloat16* data;

  CodedSlot(void* memory, float*) : data(static_cast<BFloat16*>(memory)) {}
  HOST_DEVICE Lane load(int64_t i) const { return load_as<Lane>(data + i); }
  HOST_DEVICE void store(int64_t i, Lane value, Bits32 word, float*, Bits32&) const {
    store_high_halves(data + i, near_bits(value, state_chance(word)));
  }
};

template <bool kPositive>
struct CodedSlot<SlotCode::kBlockwise8, kPositive> {
  using Code = ByteCode<!kPositive>;

  uint8_t* data;
  float* largest;
  float before;

  CodedSlot(void* memory, float* of_block)
      : data(static_cast<uint8_t*>(memory)), largest(of_block), before(*of_block) {}
  HOST_DEVICE Lane load(int64_t i) const {
    return Code::template decode<Lane>(load_bytes<!kPositive>(data + i), before);
  }
  // As bits, a NaN is larger than an infinity, and that than any number.
  HOST_DEVICE void store(int64_t i, Lane value, Bits32, float* values, Bits32& most) const {
    fastopt::store(values + i, value);
    const Bits32 bits = kPositive ? bits_of(value) : bits_of(magnitude(value));
    most = bits > most ? bits : most;
  }
  void leave(Waiting& block, int slot, Bits32 most) const {
    const float found = from_bits<float>(largest_lane(most));
    *largest = found + found * 0;  // NaN of an infinity
    block.data[slot] = data;
    block.scale[slot] = Code::scale(*largest);
  }
};

// A parameter in a block, with what belongs to it beside its own bits.
template <class Number, ParamCode kCode>
struct CodedParam {
  using Storage = Number;

  Storage* data;
  uint16_t* remainder;

  HOST_DEVICE Lane load(int64_t i) const {
    const Lane value = load_as<Lane>(data + i);
    if constexpr (kCode == ParamCode::kKahan) {
      const auto* const lost = reinterpret_cast<const BFloat16*>(remainder + i);
      return with_kahan_remainder(value, load_as<Lane>(lost));
    } else if constexpr (kCode == ParamCode::kMaster) {
      return with_master_remainder(value, widened(remainder + i));
    } else {
      return value;
    }
  }
  // `place` is that of a neighbour in the group, among the same 64.
  HOST_DEVICE void store(int64_t i, Lane value, Bits32 word, int64_t place) const {
    if constexpr (kCode == ParamCode::kRounded) {
      fastopt::store(data + i, value);
    } else if constexpr (kCode == ParamCode::kStochastic) {
      store_high_halves(data + i, near_bits(value, param_chance(word, place)));
    } else {
      const Bits32 near = near_bits(value);
      store_high_halves(data + i, near);
      if constexpr (kCode == ParamCode::kKahan) {
        store_high_halves(remainder + i, kahan_remainder(value, near));
      } else {
        store_low_halves(remainder + i, master_remainder(value, near));
      }
    }
  }
};

// Fetches what a few blocks later will be needed: among so much arithmetic the processor does not
// look far enough ahead. Beyond the end there is nothing to fetch, and no harm.
template <class Storage>
HOST_DEVICE void prefetch_together(const Storage* data) {
  constexpr int64_t kAhead = 4 * kCodeBlock, kLine = 64 / sizeof(Storage);
  FASTOPT_UNROLL
  for (int64_t i = 0; i < kTogether * Lane::kWidth; i += kLine) {
    __builtin_prefetch(data + kAhead + i);
  }
}

template <class Rule, int kSlot>
constexpr bool kIsPositive = (kPositiveSlotsOf<Rule> >> kSlot & 1) != 0;

template <class Rule, SlotCode kSlotCode, class Param, std::size_t... kSlots>
void update_block(const BoundRule& bound, const CodedBlock& block, const Draws& draws, Waiting& own,
                  const Waiting& previous, std::index_sequence<kSlots...>) {
  const Rule rule = *reinterpret_cast<const Rule*>(bound.functor);
  const float decay = static_cast<float>(bound.decay);
  const float sign = bound.maximize ? -1 : 1;
  using Storage = typename Param::Storage;
  const Param param{static_cast<Storage*>(block.operands[kParam]), block.remainder};
  const Storage* const grad = static_cast<const Storage*>(block.operands[kGrad]);
  const std::tuple<CodedSlot<kSlotCode, kIsPositive<Rule, kSlots>>...> slots{
      {block.operands[kFirstSlot + kSlots], block.largest[kSlots]}...};
  Bits32 most[kMaxSlots] = {};
  const int64_t place = block.place;
  const auto update = [&](auto kind) {
    for (int64_t first = 0; first < kCodeBlock; first += kTogether * Lane::kWidth) {
      prefetch_together(param.data + first);
      if (param.remainder) prefetch_together(param.remainder + first);
      prefetch_together(grad + first);
      (prefetch_together(std::get<kSlots>(slots).data + first), ...);
      for (int64_t i = first; i < first + kTogether * Lane::kWidth; i += Lane::kWidth) {
        Lane p = param.load(i);
        Lane values[kMaxSlots] = {std::get<kSlots>(slots).load(i)...};
        const Lane g = load_as<Lane>(grad + i);
        update_element<decltype(kind)::value>(rule, sign, decay, p, g, values);
        const Bits32 word = draws_at(draws.words, i);
        param.store(i, p, word, place + first);
        (std::get<kSlots>(slots).store(i, values[kSlots], word, own.values[kSlots], most[kSlots]),
         ...);
      }
      if constexpr (kSlotCode == SlotCode::kBlockwise8) {
        (encode_together<kIsPositive<Rule, kSlots>>(previous, kSlots, first), ...);
      }
    }
  };
  if (bound.weight_decay == WeightDecay::kL2) {
    update(std::integral_constant<WeightDecay, WeightDecay::kL2>());
  } else {
    update(std::integral_constant<WeightDecay, WeightDecay::kDecoupled>());
  }
  if constexpr (kSlotCode == SlotCode::kBlockwise8) {
    own.draws = &draws;
    (std::get<kSlots>(slots).leave(own, kSlots, most[kSlots]), ...);
  }
}

template <class Rule, SlotCode kSlotCode, std::size_t... kSlots>
void encode_block(const Waiting& block, std::index_sequence<kSlots...>) {
  if constexpr (kSlotCode == SlotCode::kBlockwise8) {
    for (int64_t i = 0; i < kCodeBlock; i += kTogether * Lane::kWidth) {
      (encode_together<kIsPositive<Rule, kSlots>>(block, kSlots, i), ...);
    }
  }
}

// The update of a block, which leaves its state in `own` and encodes that of the block before; and
// what encodes the last one.
struct CodedKernel {
  void (*update)(const BoundRule&, const CodedBlock&, const Draws&, Waiting& own,
                 const Waiting& previous);
  void (*encode)(const Waiting& block);
};

template <class Rule, SlotCode kSlotCode, class Param>
constexpr CodedKernel kCodedKernel = {
    [](const BoundRule& bound, const CodedBlock& block, const Draws& draws, Waiting& own,
       const Waiting& previous) {
      update_block<Rule, kSlotCode, Param>(bound, block, draws, own, previous,
                                           std::make_index_sequence<Rule::kSlots>());
    },
    [](const Waiting& block) {
      encode_block<Rule, kSlotCode>(block, std::make_index_sequence<Rule::kSlots>());
    }};

template <class Param, SlotCode kSlotCode, std::size_t... kIndices>
CodedKernel find_kernel(int rule, std::index_sequence<kIndices...>) {
  static constexpr CodedKernel kKernels[] = {
      kCodedKernel<RuleAt<float, kIndices>, kSlotCode, Param>...};
  return kKernels[rule];
}

template <class Param>
CodedKernel find_kernel(int rule, SlotCode code) {
  using Indices = std::make_index_sequence<kCodedRules>;
  return code == SlotCode::kFloat32    ? find_kernel<Param, SlotCode::kFloat32>(rule, Indices())
         : code == SlotCode::kBFloat16 ? find_kernel<Param, SlotCode::kBFloat16>(rule, Indices())
                                       : find_kernel<Param, SlotCode::kBlockwise8>(rule, Indices());
}

// By what a block holds: fp16 parameters and their gradients are brought to fp32.
inline CodedKernel find_kernel(int rule, DType dtype, const StateCoding& coding) {
  const SlotCode code = coding.slots[0];
  if (dtype != DType::kBFloat16) {
    return find_kernel<CodedParam<float, ParamCode::kRounded>>(rule, code);
  }
  switch (coding.param) {
    case ParamCode::kStochastic:
      return find_kernel<CodedParam<BFloat16, ParamCode::kStochastic>>(rule, code);
    case ParamCode::kKahan:
      return find_kernel<CodedParam<BFloat16, ParamCode::kKahan>>(rule, code);
    case ParamCode::kMaster:
      return find_kernel<CodedParam<BFloat16, ParamCode::kMaster>>(rule, code);
    case ParamCode::kRounded:
      break;
  }
  return find_kernel<CodedParam<BFloat16, ParamCode::kRounded>>(rule, code);
}

// The elements of a block that has fewer, or is not of a dtype that update_block knows: brought
// into a whole one of zeros, and back.
template <class Storage>
class BlockCopy {
 public:
  using Held = std::conditional_t<std::is_same_v<Storage, Half>, float, Storage>;

  BlockCopy(const CodedBlock& source, const StateCoding& coding, int slots, int64_t n)
      : source_(source), coding_(coding), slots_(slots), size_(n), block_(source) {
    for (int k : {kParam, kGrad}) {
      const Storage* from = static_cast<const Storage*>(source.operands[k]);
      for (int64_t i = 0; i < n; ++i) fastopt::store(values_[k] + i, fastopt::load(from + i));
      block_.operands[k] = values_[k];
    }
    for (int s = 0; s < slots; ++s) {
      memcpy(state_[s], source.operands[kFirstSlot + s], n * bytes_of(coding.slots[s]));
      block_.operands[kFirstSlot + s] = state_[s];
    }
    if (source.remainder) memcpy(remainder_, source.remainder, n * sizeof *remainder_);
    block_.remainder = remainder_;
  }

  const CodedBlock& block() const { return block_; }

  void store_back() {
    Storage* param = static_cast<Storage*>(source_.operands[kParam]);
    for (int64_t i = 0; i < size_; ++i) {
      fastopt::store(param + i, fastopt::load(values_[kParam] + i));
    }
    for (int s = 0; s < slots_; ++s) {
      memcpy(source_.operands[kFirstSlot + s], state_[s], size_ * bytes_of(coding_.slots[s]));
    }
    if (source_.remainder) memcpy(source_.remainder, remainder_, size_ * sizeof *remainder_);
  }

 private:
  const CodedBlock& source_;
  const StateCoding& coding_;
  int slots_;
  int64_t size_;
  CodedBlock block_;
  alignas(64) Held values_[2][kCodeBlock] = {};
  alignas(64) float state_[kMaxSlots][kCodeBlock] = {};
  alignas(64) uint16_t remainder_[kCodeBlock] = {};
};

// Updates one tile of a task after the other.
template <class Storage>
class CodedUpdate {
 public:
  CodedUpdate(const StepTask& task, const BoundRule& bound)
      : task_(task),
        coding_(*task.coding),
        bound_(bound),
        slots_(AllRules::kInfo[bound.rule].slots),
        kernel_(find_kernel(bound.rule, task.dtype, coding_)) {
    for (int k : {0, 1}) {
      for (int s = 0; s < kMaxSlots; ++s) waiting_[k].values[s] = values_[s][k];
    }
    wait_for_nothing();
  }
  ~CodedUpdate() { encode_last(); }

  // The elements [start, start + n); `grad` is that of the tile.
  void update(Storage* grad, int64_t start, int64_t n) {
    const int64_t group = start / kElementsOfGroup;
    Draws& draws = draws_[group % 2];
    if (group != group_) draws.make(coding_, group_ = group);
    for (int64_t place = 0; place < n; place += kCodeBlock) {
      const CodedBlock block = block_at(grad + place, start + place);
      const int64_t size = n - place < kCodeBlock ? n - place : kCodeBlock;
      if (size == kCodeBlock && !std::is_same_v<Storage, Half>) {
        update(block, draws);
      } else {
        encode_last();
        BlockCopy<Storage> copy(block, coding_, slots_, size);
        update(copy.block(), draws);
        encode_last();
        copy.store_back();
      }
    }
  }

 private:
  void update(const CodedBlock& block, const Draws& draws) {
    kernel_.update(bound_, block, draws, waiting_[own_], waiting_[!own_]);
    own_ = !own_;
  }

  void encode_last() {
    kernel_.encode(waiting_[!own_]);
    wait_for_nothing();
  }

  void wait_for_nothing() {
    Waiting& previous = waiting_[!own_];
    previous.draws = &draws_[0];
    for (int s = 0; s < slots_; ++s) previous.data[s] = nowhere_;
  }

  CodedBlock block_at(Storage* grad, int64_t first) const {
    CodedBlock block{};
    block.place = first % kElementsOfGroup;
    block.operands[kParam] = static_cast<Storage*>(task_.operands[kParam]) + first;
    block.operands[kGrad] = grad;
    if (coding_.remainder) block.remainder = static_cast<uint16_t*>(coding_.remainder) + first;
    for (int s = 0; s < slots_; ++s) {
      block.operands[kFirstSlot + s] =
          static_cast<char*>(task_.operands[kFirstSlot + s]) + first * bytes_of(coding_.slots[s]);
      if (coding_.largest[s]) block.largest[s] = coding_.largest[s] + first / kCodeBlock;
    }
    return block;
  }

  const StepTask& task_;
  const StateCoding& coding_;
  const BoundRule& bound_;
  int slots_;
  CodedKernel kernel_;
  int64_t group_ = -1;  // the last one that was drawn for
  bool own_ = false;    // the one of `waiting_` that the next block fills
  Waiting waiting_[2];
  // Those of two slots are 4 KB: were a load's address the same as a recent store's but for
  // multiples of that, the processor would let it wait.
  alignas(4096) float values_[kMaxSlots][2][kCodeBlock] = {};
  Draws draws_[2] = {};
  alignas(64) uint8_t nowhere_[kCodeBlock];  // for the block before the first one
};

FASTOPT_END_NAMESPACE
