#include "cpu/attention.h"

#include <type_traits>

#include "cpu/attention_backward.h"
#include "cpu/attention_decode.h"
#include "cpu/attention_forward.h"
#include "cpu/threads.h"

FASTOPT_BEGIN_NAMESPACE

namespace {

template <class Pass>
void run(Pass&& pass) {
  const auto body = [](void* context, int rank, int size) {
    const SubnormalsFlushed flushed;
    static_cast<std::remove_reference_t<Pass>*>(context)->run(rank, size);
  };
  parallel_team(pass.threads(), body, &pass);
}

template <class Storage>
void run_forward(const AttentionForward& call) {
  using Decode = AttentionDecodePass<Storage>;
  if (Decode::takes(call)) return run(Decode(call));
  run(AttentionForwardPass<Storage>(call));
}

template <class Storage>
void run_backward(const AttentionBackward& call) {
  run(AttentionBackwardPass<Storage>(call));
}

void forward(const AttentionForward& call) {
  static void (*const kRun[kDTypes])(const AttentionForward&) = {
      run_forward<float>, run_forward<double>, run_forward<BFloat16>, run_forward<Half>};
  kRun[static_cast<int>(call.layer.dtype)](call);
}

void backward(const AttentionBackward& call) {
  static void (*const kRun[kDTypes])(const AttentionBackward&) = {
      run_backward<float>, run_backward<double>, run_backward<BFloat16>, run_backward<Half>};
  kRun[static_cast<int>(call.layer.dtype)](call);
}

void random_words(uint64_t seed, int64_t head, int64_t first_row, int64_t rows, int64_t keys,
                  uint32_t* words) {
  for (int64_t row = 0; row < rows; ++row) {
    random_row(seed, head, first_row + row, 0, keys, words + row * keys);
  }
}

}  // namespace

extern const AttentionKernels kAttentionKernels;
const AttentionKernels kAttentionKernels = {forward, backward, random_words};

FASTOPT_END_NAMESPACE
