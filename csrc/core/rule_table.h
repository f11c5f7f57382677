#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/layerwise_rules.h"
#include "core/update_rules.h"

FASTOPT_BEGIN_NAMESPACE

// Every rule there is: kernels instantiate this list, and the position in it is the rule's number.
// First come those whose state may be stored in codes, see core/state_codes.h.
constexpr int kCodedRules = 6;

template <class T>
using UpdateRules =
    std::tuple<Sgd<T>, Momentum<T, false>, Momentum<T, true>, Adam<T, false>, Adam<T, true>,
               Lion<T>, Adagrad<T>, RmsProp<T, false, false>, RmsProp<T, false, true>,
               RmsProp<T, true, false>, RmsProp<T, true, true>, Adamax<T>, RAdam<T>, NAdam<T>,
               ScheduleFreeAdamW<T>, Lamb<T, true>, Lamb<T, false>>;

template <class T, std::size_t kIndex>
using RuleAt = std::tuple_element_t<kIndex, UpdateRules<T>>;

constexpr std::size_t kRules = std::tuple_size<UpdateRules<float>>::value;
using RuleIndices = std::make_index_sequence<kRules>;

template <class Rule>
HOST_DEVICE typename Rule::Hyperparameters hyperparameters_of(const double* values) {
  typename Rule::Hyperparameters h;
  static_assert(sizeof h <= kMaxHyperparameters * sizeof(double), "raise kMaxHyperparameters");
  memcpy(&h, values, sizeof h);
  return h;
}

// Folds hyperparameters, in the order of the rule's own struct, and the parameter's progress.
template <class Rule>
HOST_DEVICE void bind_rule(void* functor, const double* hyperparameters, const Progress& progress) {
  static_assert(sizeof(Rule) <= kFunctorBytes, "raise kFunctorBytes");
  new (functor) Rule(hyperparameters_of<Rule>(hyperparameters), progress);
}

template <class Rule>
HOST_DEVICE double factor(const double* hyperparameters, double step) {
  return Rule::factor(hyperparameters_of<Rule>(hyperparameters), step);
}

using Factor = double (*)(const double* hyperparameters, double step);
using BindRule = void (*)(void* functor, const double* hyperparameters, const Progress& progress);

template <class Rule, class = void>
constexpr bool kHasFactor = false;
template <class Rule>
constexpr bool kHasFactor<Rule, std::void_t<decltype(&Rule::factor)>> = true;

template <class Rule>
constexpr Factor factor_of() {
  if constexpr (kHasFactor<Rule>) return factor<Rule>;
  return nullptr;
}

template <class Rule, class = void>
constexpr unsigned kPositiveSlotsOf = 0;
template <class Rule>
constexpr unsigned kPositiveSlotsOf<Rule, std::void_t<decltype(Rule::kPositiveSlots)>> =
    Rule::kPositiveSlots;

template <class Rule, class = void>
constexpr bool kIsLayerwise = false;
template <class Rule>
constexpr bool kIsLayerwise<Rule, std::void_t<decltype(Rule::kLayerwise)>> = Rule::kLayerwise;

template <class Indices>
struct RuleTable;

template <std::size_t... kIndices>
struct RuleTable<std::index_sequence<kIndices...>> {
  static constexpr UpdateRuleInfo kInfo[] = {
      {RuleAt<float, kIndices>::kName, RuleAt<float, kIndices>::kSlots,
       static_cast<int>(sizeof(typename RuleAt<float, kIndices>::Hyperparameters) / sizeof(double)),
       factor_of<RuleAt<float, kIndices>>(), kPositiveSlotsOf<RuleAt<float, kIndices>>,
       kIsLayerwise<RuleAt<float, kIndices>>, kIndices < kCodedRules}...};

  // Binds the rule for the arithmetic type T.
  template <class T>
  static void bind(int rule, void* functor, const double* hyperparameters,
                   const Progress& progress) {
    static constexpr BindRule kBind[] = {bind_rule<RuleAt<T, kIndices>>...};
    kBind[rule](functor, hyperparameters, progress);
  }
};

using AllRules = RuleTable<RuleIndices>;

FASTOPT_END_NAMESPACE
