#pragma once

#include <cstdint>

#include "core/platform.h"

FASTOPT_BEGIN_NAMESPACE

struct Range {
  int64_t begin, end;
};

HOST_DEVICE int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

HOST_DEVICE int64_t rounded_down(int64_t value, int64_t grain) { return value / grain * grain; }
HOST_DEVICE int64_t rounded_up(int64_t value, int64_t grain) {
  return (value + grain - 1) / grain * grain;
}

// What two ranges have in common; nothing is {place, place}.
HOST_DEVICE Range common(Range left, Range right, int64_t place = 0) {
  const int64_t begin = left.begin > right.begin ? left.begin : right.begin;
  const int64_t end = left.end < right.end ? left.end : right.end;
  return begin < end ? Range{begin, end} : Range{place, place};
}

FASTOPT_END_NAMESPACE
