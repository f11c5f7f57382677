#include "cpu/lstm.h"

#include <chrono>
#include <vector>

#include "cpu/lstm_backward.h"
#include "cpu/lstm_forward.h"

FASTOPT_BEGIN_NAMESPACE

namespace {

template <class Storage, template <class> class Pass, class Call>
void run_pass(const Call& call) {
  using T = ComputeType<Storage>;
  const LstmWalk<T> walk(call.layer);
  std::vector<Pass<Storage>> passes;
  passes.reserve(kMaxDirections);
  Workspace space;
  for (int direction = 0; direction < call.layer.directions; ++direction) {
    passes.emplace_back(call, walk, direction).reserve(space);
  }
  space.allocate();
  run_directions(call.layer.threads, call.layer.directions,
                 [&](int direction, Team team) { passes[direction].run(team); });
}

template <template <class> class Pass, class Call>
void run_in_dtype(const Call& call) {
  switch (call.layer.dtype) {
    case DType::kFloat32:
      return run_pass<float, Pass>(call);
    case DType::kFloat64:
      return run_pass<double, Pass>(call);
    case DType::kBFloat16:
      return run_pass<BFloat16, Pass>(call);
    case DType::kFloat16:
      return run_pass<Half, Pass>(call);
  }
}

void forward(const LstmForward& call) { run_in_dtype<LstmForwardPass>(call); }

void backward(const LstmBackward& call) { run_in_dtype<LstmBackwardPass>(call); }

template <class Storage>
int64_t packed_bytes_of(const LstmLayer& layer) {
  using T = ComputeType<Storage>;
  const LstmForward call{layer, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const LstmWalk<T> walk(layer);
  return LstmForwardPass<Storage>(call, walk, 0).packed_count() * sizeof(T);
}

template <class Storage>
void pack_weights(const LstmLayer& layer, void* packed) {
  using T = ComputeType<Storage>;
  const LstmForward call{layer, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const LstmWalk<T> walk(layer);
  run_directions(layer.threads, layer.directions, [&](int direction, Team team) {
    const LstmForwardPass<Storage> pass(call, walk, direction);
    pass.pack(team, static_cast<T*>(packed) + direction * pass.packed_count());
  });
}

int64_t packed_bytes(const LstmLayer& layer) {
  static int64_t (*const kBytes[kDTypes])(const LstmLayer&) = {
      packed_bytes_of<float>, packed_bytes_of<double>, packed_bytes_of<BFloat16>,
      packed_bytes_of<Half>};
  return kBytes[static_cast<int>(layer.dtype)](layer);
}

void pack(const LstmLayer& layer, void* packed) {
  static void (*const kPack[kDTypes])(const LstmLayer&, void*) = {
      pack_weights<float>, pack_weights<double>, pack_weights<BFloat16>, pack_weights<Half>};
  kPack[static_cast<int>(layer.dtype)](layer, packed);
}

template <class T>
void activate(char function, const T* x, T* y, int64_t count) {
  for_each_lanes<T>(count, [&](int64_t i, auto lanes) {
    const auto value = load_as<decltype(lanes)>(x + i);
    store(y + i, function == 'e'   ? exponential<T>(value)
                 : function == 's' ? sigmoid<T>(value)
                                   : hyperbolic_tangent<T>(value));
  });
}

double fma_rate(int threads) {
  constexpr int kRows = Tiling<float>::kTileRows, kDepth = 64, kRepeats = 20000;
  struct Shared {
    Barrier barrier;
    double rate;
  } shared{{}, 0};
  const auto run = [](void* context, int rank, int size) {
    Shared& mine = *static_cast<Shared*>(context);
    alignas(64) float a[kRows * kDepth] = {}, panel[Tiling<float>::kPanel * kDepth] = {};
    alignas(64) float c[kRows * Tiling<float>::kPanel] = {};
    mine.barrier.wait(size);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kRepeats; ++i) {
      asm volatile("" : : "r"(a), "r"(panel), "r"(c) : "memory");  // they may have changed
      multiply_tile<float, kRows, 2, true>({a, 1}, panel, Tiling<float>::kPanel, kDepth, c,
                                           Tiling<float>::kPanel, Into::kAdd);
    }
    mine.barrier.wait(size);
    const auto end = std::chrono::steady_clock::now();
    if (rank != 0) return;
    mine.rate = 2.0 * kRows * Tiling<float>::kPanel * kDepth * kRepeats * size /
                std::chrono::duration<double>(end - start).count();
  };
  parallel_team(threads, run, &shared);
  return shared.rate;
}

}  // namespace

extern const LstmKernels kLstmKernels;
const LstmKernels kLstmKernels = {forward,         packed_bytes,     pack,    backward,
                                  activate<float>, activate<double>, fma_rate};

FASTOPT_END_NAMESPACE
