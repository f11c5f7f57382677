#include "bindings/group_rules.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace fastopt {

namespace {

int find_rule(const UpdateRuleInfo* table, int count, py::handle name) {
  const char* wanted = PyUnicode_AsUTF8(name.ptr());
  if (!wanted) throw py::error_already_set();
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(table[i].name, wanted) == 0) return i;
  }
  throw std::invalid_argument(std::string("no update rule is called ") + wanted);
}

}  // namespace

std::vector<GroupRule> parse_rules(py::tuple rules, size_t groups, const UpdateRuleInfo* table,
                                   int count) {
  if (rules.size() != groups) throw std::invalid_argument("one rule per group");
  std::vector<GroupRule> result;
  result.reserve(rules.size());
  for (py::handle item : rules) {
    py::tuple fields = py::reinterpret_borrow<py::tuple>(item);
    GroupRule& rule = result.emplace_back();
    rule.rule = find_rule(table, count, fields[0]);
    rule.weight_decay = static_cast<WeightDecay>(py::cast<int>(fields[1]));
    rule.decay = fields[2];
    rule.maximize = py::cast<bool>(fields[3]);
    for (py::handle value : py::reinterpret_borrow<py::tuple>(fields[4])) {
      rule.hyperparameters.push_back(py::reinterpret_borrow<py::object>(value));
    }
    if (static_cast<int>(rule.hyperparameters.size()) != table[rule.rule].hyperparameters) {
      throw std::invalid_argument("a rule takes another number of hyperparameters");
    }
  }
  return result;
}

py::dict describe_rules(const UpdateRuleInfo* table, int count) {
  py::dict rules;
  for (int i = 0; i < count; ++i) {
    rules[table[i].name] =
        py::make_tuple(table[i].slots, table[i].hyperparameters, table[i].positive_slots);
  }
  return rules;
}

}  // namespace fastopt
