#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <tuple>
#include <utility>

#include "core/update_rules.h"

FASTOPT_BEGIN_NAMESPACE

template <class T, std::size_t kIndex>
using RuleAt = std::tuple_element_t<kIndex, UpdateRules<T>>;

constexpr std::size_t kRules = std::tuple_size<UpdateRules<float>>::value;
using RuleIndices = std::make_index_sequence<kRules>;

// Folds hyperparameters, in the order of the rule's own struct, and the number of the step.
template <class Rule>
HOST_DEVICE void bind_rule(void* functor, const double* hyperparameters, double step) {
  static_assert(sizeof(Rule) <= kFunctorBytes, "raise kFunctorBytes");
  typename Rule::Hyperparameters h;
  static_assert(sizeof h <= kMaxHyperparameters * sizeof(double), "raise kMaxHyperparameters");
  memcpy(&h, hyperparameters, sizeof h);
  new (functor) Rule(h, step);
}

using BindRule = void (*)(void* functor, const double* hyperparameters, double step);

template <class Indices>
struct RuleTable;

template <std::size_t... kIndices>
struct RuleTable<std::index_sequence<kIndices...>> {
  static constexpr UpdateRuleInfo kInfo[] = {
      {RuleAt<float, kIndices>::kName, RuleAt<float, kIndices>::kSlots,
       static_cast<int>(sizeof(typename RuleAt<float, kIndices>::Hyperparameters) /
                        sizeof(double))}...};

  // Binds the rule for the arithmetic type T.
  template <class T>
  static void bind(int rule, void* functor, const double* hyperparameters, double step) {
    static constexpr BindRule kBind[] = {bind_rule<RuleAt<T, kIndices>>...};
    kBind[rule](functor, hyperparameters, step);
  }
};

using AllRules = RuleTable<RuleIndices>;

FASTOPT_END_NAMESPACE
