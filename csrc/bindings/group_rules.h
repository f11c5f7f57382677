#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/update_rules.h"

namespace fastopt {

// A tuple UpdateRule of the Python side, with its rule found among a module's.
struct GroupRule {
  int rule;
  WeightDecay weight_decay;
  pybind11::object decay;
  bool maximize;
  std::vector<pybind11::object> hyperparameters;
};

// One for each parameter group. Throws std::invalid_argument for what does not fit `table`.
std::vector<GroupRule> parse_rules(pybind11::tuple rules, size_t groups,
                                   const UpdateRuleInfo* table, int count);

// name: (state slots, hyperparameters)
pybind11::dict describe_rules(const UpdateRuleInfo* table, int count);

}  // namespace fastopt
