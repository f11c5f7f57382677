#include "kernel_calls.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/norm_orders.h"
#include "cpu/lstm_schedule.h"

using namespace fastopt;

namespace {

constexpr DType kAllDTypes[kDTypes] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                       DType::kFloat16};
constexpr const char* kDTypeNames[kDTypes] = {"fp32", "fp64", "bf16", "fp16"};

std::string named(const std::string& name, DType dtype) {
  return name + " " + kDTypeNames[static_cast<int>(dtype)];
}

DType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// A parameter of rows and columns whose gradient is transposed, the rest dense.
constexpr int64_t kRows = 150, kColumns = 201;

Walk transposed_gradient() {
  Walk walk{};
  walk.dims = 2;
  walk.sizes[0] = kRows;
  walk.sizes[1] = kColumns;
  for (auto& strides : walk.strides) {
    strides[0] = kColumns;
    strides[1] = 1;
  }
  walk.strides[kGrad][0] = 1;
  walk.strides[kGrad][1] = kRows;
  return walk;
}

const std::vector<int64_t> kNumels = {1, 513, 60001, kRows * kColumns};

// What is read before a step and written by it.
struct StepProblem {
  std::vector<StepTask> tasks;
  std::vector<StateCoding> codings;
  Walk walk = transposed_gradient();
  int64_t tiles = 0;
  Tail tail;

  void run(const InstructionSet& set, int rule, int threads) const {
    const double hyperparameters[kMaxHyperparameters] = {0.01, 0.9, 0.99, 1e-3, 0.1, 0.9, 1};
    std::vector<BoundRule> rules(tasks.size());
    for (size_t i = 0; i < tasks.size(); ++i) {
      rules[i].rule = rule;
      rules[i].weight_decay = i % 2 ? WeightDecay::kL2 : WeightDecay::kDecoupled;
      rules[i].decay = i % 2 ? 0.1 : 0.999;
      rules[i].maximize = i % 2;
      set.optimizer->bind(rules[i], tasks[i].dtype, hyperparameters, {3, 0.9});
    }
    const StepBatch batch{
        tasks.data(), static_cast<int64_t>(tasks.size()), tiles, rules.data(), tail, threads};
    if (set.optimizer->rules[rule].layerwise) {
      std::vector<Squares> squares(tiles);
      set.layerwise->fold_squares(batch, rules.data(), squares.data());
    }
    set.optimizer->step(batch);
  }
};

std::shared_ptr<StepProblem> step_problem(Memory& memory, DType dtype, int slots,
                                          const StateCoding* coding) {
  auto problem = std::make_shared<StepProblem>();
  problem->codings.reserve(kNumels.size());
  for (int64_t numel : kNumels) {
    StepTask task{};
    task.numel = numel;
    task.dtype = dtype;
    task.first_tile = problem->tiles;
    task.bound_rule = static_cast<int>(problem->tasks.size());
    task.walk = numel == kRows * kColumns ? &problem->walk : nullptr;
    for (int k : {kParam, kGrad, kAverage}) task.operands[k] = memory.draw(dtype, numel);
    if (coding) {
      StateCoding& own = problem->codings.emplace_back(*coding);
      own.number = task.bound_rule;
      own.remainder = memory.zeros<uint16_t>(numel);
      for (int s = 0; s < slots; ++s) {
        task.operands[kFirstSlot + s] = memory.zeros<char>(numel * bytes_of(own.slots[s]));
        own.largest[s] = memory.zeros<float>(numel / kCodeBlock + 1);
      }
      task.coding = &own;
    } else {
      for (int s = 0; s < slots; ++s) {
        task.operands[kFirstSlot + s] = memory.draw(dtype, numel, 0.1, 1);
      }
    }
    problem->tiles += tiles_of(numel);
    problem->tasks.push_back(task);
  }
  problem->tail = {0.5, 0.4, true, 0.1};
  return problem;
}

void add_steps(std::vector<KernelCase>& cases) {
  const OptimizerKernels& kernels = *instruction_sets()[0].optimizer;
  for (int rule = 0; rule < kernels.rule_count; ++rule) {
    for (DType dtype : kAllDTypes) {
      cases.push_back({named(std::string("step ") + kernels.rules[rule].name, dtype),
                       [rule, dtype, slots = kernels.rules[rule].slots](KernelCall& call) {
                         const auto problem = step_problem(call.memory, dtype, slots, nullptr);
                         call.run = [problem, rule](const InstructionSet& set, int threads) {
                           problem->run(set, rule, threads);
                         };
                       }});
    }
  }
}

void add_coded_steps(std::vector<KernelCase>& cases) {
  const OptimizerKernels& kernels = *instruction_sets()[0].optimizer;
  const struct {
    const char* name;
    DType dtype;
    SlotCode slot;
    ParamCode param;
  } codes[] = {
      {"8bit", DType::kFloat32, SlotCode::kBlockwise8, ParamCode::kRounded},
      {"bf16", DType::kFloat32, SlotCode::kBFloat16, ParamCode::kRounded},
      {"8bit", DType::kFloat16, SlotCode::kBlockwise8, ParamCode::kRounded},
      {"8bit stochastic", DType::kBFloat16, SlotCode::kBlockwise8, ParamCode::kStochastic},
      {"bf16 kahan", DType::kBFloat16, SlotCode::kBFloat16, ParamCode::kKahan},
      {"fp32 master", DType::kBFloat16, SlotCode::kFloat32, ParamCode::kMaster},
  };
  for (int rule = 0; rule < kernels.rule_count; ++rule) {
    if (!kernels.rules[rule].takes_codes) continue;
    for (const auto& code : codes) {
      StateCoding coding{};
      std::fill(coding.slots, coding.slots + kMaxSlots, code.slot);
      coding.param = code.param;
      coding.seed = 7;
      coding.step = 3;
      const std::string name = std::string("step ") + kernels.rules[rule].name + ", " + code.name;
      cases.push_back(
          {named(name, code.dtype),
           [rule, coding, dtype = code.dtype, slots = kernels.rules[rule].slots](KernelCall& call) {
             const auto problem = step_problem(call.memory, dtype, slots, &coding);
             call.run = [problem, rule](const InstructionSet& set, int threads) {
               problem->run(set, rule, threads);
             };
           }});
    }
  }
}

struct NormProblem {
  std::vector<GradTask> tasks;
  Walk walk = transposed_gradient();
  int64_t chunks = 0;
  double* partials;
  double* norm;

  GradBatch batch(int threads) const {
    return {tasks.data(), static_cast<int64_t>(tasks.size()), chunks, threads};
  }
};

std::shared_ptr<NormProblem> norm_problem(Memory& memory, DType dtype) {
  auto problem = std::make_shared<NormProblem>();
  for (int64_t numel : kNumels) {
    const Walk* walk = numel == kRows * kColumns ? &problem->walk : nullptr;
    problem->tasks.push_back({memory.draw(dtype, numel), walk, numel, problem->chunks, dtype});
    problem->chunks += problem->tasks.back().chunks();
  }
  problem->partials = memory.zeros<double>(problem->chunks);
  problem->norm = memory.zeros<double>(1);
  return problem;
}

void add_norms(std::vector<KernelCase>& cases) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::pair<const char*, double> orders[] = {
      {"0", 0}, {"1", 1}, {"2", 2}, {"3", 3}, {"inf", kInfinity}, {"-inf", -kInfinity}};
  for (DType dtype : kAllDTypes) {
    for (const auto& [name, order] : orders) {
      cases.push_back({named(std::string("grad norm ") + name, dtype),
                       [dtype, order = order](KernelCall& call) {
                         const auto problem = norm_problem(call.memory, dtype);
                         call.run = [problem, order](const InstructionSet& set, int threads) {
                           *problem->norm = set.grad_norm->norm(problem->batch(threads), order,
                                                                problem->partials);
                         };
                       }});
    }
    cases.push_back({named("clip", dtype), [dtype](KernelCall& call) {
                       const auto problem = norm_problem(call.memory, dtype);
                       call.run = [problem](const InstructionSet& set, int threads) {
                         set.grad_norm->clip(problem->batch(threads), 0.5, 0.3);
                       };
                     }});
  }
}

struct LstmShape {
  const char* name;
  std::vector<int64_t> batch_sizes;
  int64_t input_size, hidden_size, output_size;
  int directions;
  bool packed;  // the tokens of the input
};

std::vector<LstmShape> lstm_shapes() {
  std::vector<int64_t> shrinking(40);
  for (int64_t t = 0; t < 40; ++t) shrinking[t] = 27 - t / 3;
  return {
      {"one sequence", std::vector<int64_t>(9, 1), 5, 41, 41, 1, false},
      {"few units", std::vector<int64_t>(4, 3), 3, 1, 1, 2, false},
      {"two chunks", std::vector<int64_t>(37, 17), 33, 40, 40, 1, false},
      {"projected both ways", shrinking, 19, 37, 13, 2, true},
  };
}

struct LstmProblem {
  LstmSchedule schedule;
  LstmForward forward{};
  LstmBackward backward{};
  char* packed = nullptr;
};

std::shared_ptr<LstmProblem> lstm_problem(Memory& memory, DType dtype, const LstmShape& shape) {
  auto problem = std::make_shared<LstmProblem>(LstmProblem{LstmSchedule(shape.batch_sizes)});
  const LstmSchedule& schedule = problem->schedule;
  LstmLayer layer{};
  layer.dtype = dtype;
  layer.directions = shape.directions;
  layer.steps = static_cast<int64_t>(schedule.batch_sizes.size());
  layer.batch = schedule.batch_sizes[0];
  layer.tokens = schedule.first_token.back();
  layer.batch_sizes = schedule.batch_sizes.data();
  layer.first_token = schedule.first_token.data();
  layer.chunks = schedule.chunks.data();
  layer.chunk_count = static_cast<int64_t>(schedule.chunks.size()) - 1;
  layer.chunk_rows = schedule.chunk_rows;
  layer.input_size = shape.input_size;
  layer.hidden_size = shape.hidden_size;
  layer.output_size = shape.output_size;
  layer.packed_input = shape.packed;
  layer.input_row_stride = shape.input_size;
  layer.input_step_stride = shape.packed ? 0 : layer.batch * shape.input_size;
  const int64_t gates = 4 * shape.hidden_size, directions = shape.directions;
  const int64_t of_outputs = directions * layer.batch * shape.output_size;
  const int64_t of_cells = directions * layer.batch * shape.hidden_size;
  layer.input = memory.draw(dtype, layer.tokens * shape.input_size);
  layer.initial_hidden = memory.draw(dtype, of_outputs);
  layer.initial_cell = memory.draw(dtype, of_cells);
  LstmBackward& backward = problem->backward;
  for (int d = 0; d < shape.directions; ++d) {
    const auto draw = [&](int64_t rows, int64_t columns) {
      return memory.draw(dtype, rows * columns, -0.3, 0.3);
    };
    const bool projected = shape.output_size != shape.hidden_size;
    layer.weights[d] = {draw(gates, shape.input_size), draw(gates, shape.output_size),
                        draw(gates, 1), draw(gates, 1),
                        projected ? draw(shape.output_size, shape.hidden_size) : nullptr};
    backward.weights[d] = {draw(gates, shape.input_size), draw(gates, shape.output_size),
                           draw(gates, 1), draw(gates, 1),
                           projected ? draw(shape.output_size, shape.hidden_size) : nullptr};
  }
  const int64_t outputs = layer.tokens * directions * shape.output_size;
  const int64_t cells = directions * layer.tokens * shape.hidden_size;
  LstmForward& forward = problem->forward;
  forward.layer = layer;
  forward.output = memory.draw(dtype, outputs);
  forward.final_hidden = memory.draw(dtype, of_outputs);
  forward.final_cell = memory.draw(dtype, of_cells);
  forward.saved_gates = memory.draw(dtype, 4 * cells, 0.1, 0.9);
  forward.saved_cells = memory.draw(compute_dtype(dtype), cells);
  backward.layer = layer;
  backward.output = forward.output;
  backward.saved_gates = forward.saved_gates;
  backward.saved_cells = forward.saved_cells;
  backward.output_gradient = memory.draw(dtype, outputs);
  backward.final_hidden_gradient = memory.draw(dtype, of_outputs);
  backward.final_cell_gradient = memory.draw(dtype, of_cells);
  backward.input_gradient = memory.draw(dtype, directions * layer.tokens * shape.input_size);
  backward.initial_hidden_gradient = memory.draw(dtype, of_outputs);
  backward.initial_cell_gradient = memory.draw(dtype, of_cells);
  return problem;
}

void add_lstm(std::vector<KernelCase>& cases) {
  for (const LstmShape& shape : lstm_shapes()) {
    for (DType dtype : kAllDTypes) {
      cases.push_back({named(std::string("lstm forward, ") + shape.name, dtype),
                       [shape, dtype](KernelCall& call) {
                         const auto problem = lstm_problem(call.memory, dtype, shape);
                         call.run = [problem](const InstructionSet& set, int threads) {
                           LstmForward pass = problem->forward;
                           pass.layer.threads = threads;
                           set.lstm->forward(pass);
                         };
                       }});
      cases.push_back({named(std::string("lstm forward of packed weights, ") + shape.name, dtype),
                       [shape, dtype](KernelCall& call) {
                         const auto problem = lstm_problem(call.memory, dtype, shape);
                         call.run = [problem](const InstructionSet& set, int threads) {
                           LstmForward pass = problem->forward;
                           pass.layer.threads = threads;
                           const int64_t bytes = set.lstm->packed_bytes(pass.layer);
                           const std::unique_ptr<char, decltype(&std::free)> packed(
                               static_cast<char*>(std::aligned_alloc(
                                   64, (bytes * pass.layer.directions + 63) / 64 * 64)),
                               std::free);
                           set.lstm->pack(pass.layer, packed.get());
                           pass.packed = packed.get();
                           pass.saved_gates = pass.saved_cells = nullptr;
                           set.lstm->forward(pass);
                         };
                       }});
      cases.push_back({named(std::string("lstm backward, ") + shape.name, dtype),
                       [shape, dtype](KernelCall& call) {
                         const auto problem = lstm_problem(call.memory, dtype, shape);
                         call.run = [problem](const InstructionSet& set, int threads) {
                           LstmBackward pass = problem->backward;
                           pass.layer.threads = threads;
                           set.lstm->backward(pass);
                         };
                       }});
    }
  }
}

struct AttentionShape {
  const char* name;
  int64_t batch, heads, key_heads, queries, keys, features, value_features;
  std::function<void(AttentionLayer& layer, Memory& memory)> options;
  bool biased = false;     // by [heads, queries, keys], shared by the batch
  bool sequences = false;  // of different lengths, one of them empty
};

std::vector<AttentionShape> attention_shapes() {
  const auto plain = [](AttentionLayer&, Memory&) {};
  const auto causal = [](AttentionLayer& layer, Memory&) {
    layer.right = 0;
    layer.bottom_right = true;
  };
  const auto everything = [](AttentionLayer& layer, Memory& memory) {
    layer.left = 90;
    layer.right = 3;
    layer.softcap = 3;
    layer.dropout = 0.2;
    layer.seed = 11;
    layer.slopes = static_cast<const float*>(memory.draw(DType::kFloat32, layer.heads, 0, 1));
    layer.sinks = memory.draw(compute_dtype(layer.dtype), layer.heads);
  };
  const auto masked = [](AttentionLayer& layer, Memory& memory) {
    auto* allowed = memory.zeros<uint8_t>(layer.queries * layer.keys);
    for (int64_t i = 0; i < layer.queries * layer.keys; ++i) allowed[i] = i % 3 != 0;
    layer.allowed = allowed;
    layer.mask_strides[2] = layer.keys;
  };
  return {
      {"plain", 2, 3, 3, 67, 131, 33, 20, plain},
      {"split keys", 1, 1, 1, 65, 520, 32, 24, causal},
      {"groups", 2, 6, 2, 70, 90, 24, 24, causal},
      {"masked", 2, 2, 2, 61, 75, 40, 40, masked},
      {"shared bias", 3, 2, 2, 50, 140, 24, 40, everything, true},
      {"sequences", 4, 2, 1, 80, 150, 24, 32, causal, false, true},
      {"one query", 2, 4, 2, 1, 1100, 64, 70, plain},
  };
}

AttentionTensor tensor_of(void* data, int64_t heads, int64_t rows, int64_t features, bool packed) {
  if (packed) return {data, 0, features, heads * features};
  return {data, heads * rows * features, rows * features, features};
}

struct AttentionProblem {
  AttentionForward forward{};
  AttentionBackward backward{};
};

std::shared_ptr<AttentionProblem> attention_problem(Memory& memory, DType dtype,
                                                    const AttentionShape& shape) {
  auto problem = std::make_shared<AttentionProblem>();
  AttentionLayer layer{};
  layer.dtype = dtype;
  layer.batch = shape.batch;
  layer.heads = shape.heads;
  layer.key_heads = shape.key_heads;
  layer.queries = layer.query_rows = shape.queries;
  layer.keys = layer.key_rows = shape.keys;
  layer.features = shape.features;
  layer.value_features = shape.value_features;
  layer.scale = 0.2;
  layer.left = layer.right = -1;
  const bool packed = shape.sequences;
  if (packed) {
    layer.query_rows = 2 * shape.queries;
    layer.key_rows = 2 * shape.keys;
    const auto starts = [&](int64_t longest) {
      const int32_t n = static_cast<int32_t>(longest);
      return memory.copy<int32_t>({0, n, n, n + n / 3, 2 * n});
    };
    layer.query_starts = starts(shape.queries);
    layer.key_starts = starts(shape.keys);
  }
  const int64_t batch = packed ? 1 : shape.batch;
  const auto tensor = [&](DType type, int64_t heads, int64_t rows, int64_t features) {
    return tensor_of(memory.draw(type, batch * heads * rows * features), heads, rows, features,
                     packed);
  };
  const auto of_queries = [&](int64_t features) {
    return tensor(dtype, shape.heads, layer.query_rows, features);
  };
  const auto of_keys = [&](int64_t features) {
    return tensor(dtype, shape.key_heads, layer.key_rows, features);
  };
  layer.query = of_queries(shape.features);
  layer.key = of_keys(shape.features);
  layer.value = of_keys(shape.value_features);
  shape.options(layer, memory);
  AttentionBackward& backward = problem->backward;
  if (shape.biased) {
    const int64_t count = shape.heads * shape.queries * shape.keys;
    layer.bias = memory.draw(dtype, count);
    layer.mask_strides[1] = backward.bias_gradient_strides[1] = shape.queries * shape.keys;
    layer.mask_strides[2] = backward.bias_gradient_strides[2] = shape.keys;
    backward.bias_gradient = memory.draw(compute_dtype(dtype), count);
  }
  if (layer.sinks) {
    backward.sink_gradient = memory.draw(compute_dtype(dtype), shape.batch * shape.heads);
  }
  const int64_t rows = layer.query_rows;
  void* sums = memory.draw(compute_dtype(dtype), batch * shape.heads * rows, 3, 4);
  const AttentionTensor logsumexp = packed ? AttentionTensor{sums, 0, 1, shape.heads}
                                           : AttentionTensor{sums, shape.heads * rows, rows, 1};
  problem->forward = {layer, of_queries(shape.value_features), logsumexp, false};
  backward.layer = layer;
  backward.output = problem->forward.output;
  backward.logsumexp = logsumexp;
  backward.output_gradient = of_queries(shape.value_features);
  backward.query_gradient = of_queries(shape.features);
  backward.key_gradient = of_keys(shape.features);
  backward.value_gradient = of_keys(shape.value_features);
  return problem;
}

void add_attention(std::vector<KernelCase>& cases) {
  for (const AttentionShape& shape : attention_shapes()) {
    for (DType dtype : kAllDTypes) {
      for (bool inference : {false, true}) {
        const char* pass = inference ? "attention inference, " : "attention forward, ";
        cases.push_back({named(std::string(pass) + shape.name, dtype),
                         [shape, dtype, inference](KernelCall& call) {
                           const auto problem = attention_problem(call.memory, dtype, shape);
                           call.run = [problem, inference](const InstructionSet& set, int threads) {
                             AttentionForward forward = problem->forward;
                             forward.layer.threads = threads;
                             forward.inference = inference;
                             set.attention->forward(forward);
                           };
                         }});
      }
      cases.push_back({named(std::string("attention backward, ") + shape.name, dtype),
                       [shape, dtype](KernelCall& call) {
                         const auto problem = attention_problem(call.memory, dtype, shape);
                         call.run = [problem](const InstructionSet& set, int threads) {
                           AttentionBackward backward = problem->backward;
                           backward.layer.threads = threads;
                           set.attention->backward(backward);
                         };
                       }});
    }
  }
}

void add_cross_entropy(std::vector<KernelCase>& cases) {
  constexpr int64_t kExamples = 61, kClasses = 1003;
  for (DType dtype : kAllDTypes) {
    for (const char* targets : {"indices", "smoothed indices", "probabilities"}) {
      const std::string kind = targets;
      cases.push_back({named("cross-entropy of " + kind, dtype), [dtype, kind](KernelCall& call) {
                         Memory& memory = call.memory;
                         const DType precise = compute_dtype(dtype);
                         CrossEntropyCall rows{};
                         rows.dtype = dtype;
                         rows.rows = kExamples;
                         rows.classes = rows.row_stride = kClasses;
                         rows.logits = memory.draw(dtype, kExamples * kClasses, -4, 4);
                         if (kind == "probabilities") {
                           rows.probabilities = memory.draw(precise, kExamples * kClasses, 0, 1);
                           rows.class_weights = memory.draw(precise, kClasses, 0, 1);
                         } else {
                           std::vector<int64_t> classes(kExamples);
                           for (int64_t i = 0; i < kExamples; ++i) classes[i] = i * 16;
                           classes[3] = rows.ignore_index = -100;
                           rows.targets = memory.copy(classes);
                         }
                         rows.label_smoothing = kind == "indices" ? 0 : 0.1;
                         rows.softcap = kind == "indices" ? 0 : 5;
                         rows.loss_scale = memory.draw(precise, kExamples);
                         rows.z_scale = memory.draw(precise, kExamples);
                         rows.losses = memory.draw(precise, kExamples);
                         rows.logsumexps = memory.draw(precise, kExamples);
                         call.run = [rows](const InstructionSet& set, int threads) {
                           set.cross_entropy->rows(rows, threads);
                         };
                       }});
    }
  }
}

}  // namespace

std::vector<KernelCase> kernel_cases() {
  std::vector<KernelCase> cases;
  add_steps(cases);
  add_coded_steps(cases);
  add_norms(cases);
  add_lstm(cases);
  add_attention(cases);
  add_cross_entropy(cases);
  return cases;
}
