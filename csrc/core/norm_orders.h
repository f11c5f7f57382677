#pragma once

#include <cmath>

#include "core/platform.h"
#include "core/update_rules.h"

FASTOPT_BEGIN_NAMESPACE

// The norm (sum |x|^order)^(1/order) as a reduction: `add` takes the next element in, `join` puts
// two results together, and all begin with kStart. V is double or a vector of doubles.
struct Sum {
  static constexpr double kStart = 0;

  template <class V>
  HOST_DEVICE V join(V left, V right) const {
    return left + right;
  }
};

struct SumOfSquares : Sum {
  template <class V>
  HOST_DEVICE V add(V sum, V x) const {
    return sum + x * x;
  }
  HOST_DEVICE double root(double sum) const { return std::sqrt(sum); }
};

struct SumOfMagnitudes : Sum {
  template <class V>
  HOST_DEVICE V add(V sum, V x) const {
    return sum + magnitude(x);
  }
  HOST_DEVICE double root(double sum) const { return sum; }
};

struct SumOfPowers : Sum {
  double order;

  template <class V>
  HOST_DEVICE V add(V sum, V x) const {
    return sum + power(magnitude(x), order);
  }
  HOST_DEVICE double root(double sum) const { return std::pow(sum, 1 / order); }
};

// Order 0, of one tensor.
struct CountOfNonzeros : Sum {
  template <class V>
  HOST_DEVICE V add(V sum, V x) const {
    return sum + is_nonzero(x);
  }
  HOST_DEVICE double root(double sum) const { return sum; }
};

// Order inf.
struct Largest {
  static constexpr double kStart = 0;

  template <class V>
  HOST_DEVICE V add(V largest, V x) const {
    return maximum(largest, magnitude(x));
  }
  template <class V>
  HOST_DEVICE V join(V left, V right) const {
    return maximum(left, right);
  }
  HOST_DEVICE double root(double largest) const { return largest; }
};

// Order -inf.
struct Smallest {
  static constexpr double kStart = INFINITY;

  template <class V>
  HOST_DEVICE V add(V smallest, V x) const {
    return minimum(smallest, magnitude(x));
  }
  template <class V>
  HOST_DEVICE V join(V left, V right) const {
    return minimum(left, right);
  }
  HOST_DEVICE double root(double smallest) const { return smallest; }
};

// visit(reduction) for the reduction of an order other than 0.
template <class Visitor>
auto with_norm_order(double order, const Visitor& visit) {
  if (order == 2) return visit(SumOfSquares{});
  if (order == 1) return visit(SumOfMagnitudes{});
  if (order == INFINITY) return visit(Largest{});
  if (order == -INFINITY) return visit(Smallest{});
  return visit(SumOfPowers{{}, order});
}

FASTOPT_END_NAMESPACE
