#pragma once

#include <cstdint>

#include "cpu/simd.h"

FASTOPT_BEGIN_NAMESPACE

// C (+)= A * B with B packed: the scheme of BLIS (Van Zee and van de Geijn 2015). B's columns are
// cut into panels of two vectors, in which B's rows lie one after the other; a tile of C, up to
// kTileRows rows by one panel, stays in registers while A and the panel stream by. Each element of
// C is summed in the order of the depth, whatever the tiles: the bits do not depend on who computes
// which part.
template <class T>
struct Tiling {
  static constexpr int kWidth = Vec<T>::kWidth;
  static constexpr int kPanel = 2 * kWidth;
  // Accumulators, two vectors of B and one element of A have to fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kTileRows = 12;
#elif defined(__AVX2__)
  static constexpr int kTileRows = 6;
#else
  static constexpr int kTileRows = 4;
#endif
};

// Columns with those that fill the last vector up. Panel p begins at depth * p * kPanel, and the
// last one may be a single vector wide.
template <class T>
HOST_DEVICE int64_t padded_columns(int64_t columns) {
  return (columns + Tiling<T>::kWidth - 1) / Tiling<T>::kWidth * Tiling<T>::kWidth;
}

enum class Into { kReplace, kAdd };

// A: row r begins at rows + r * row_stride and is contiguous along the depth, or, transposed, lies
// packed as [depth][rows of the tile].
template <class T>
struct LeftOperand {
  const T* rows;
  int64_t row_stride;
};

template <class T, int kRows, int kVectors, bool kTransposed>
void multiply_tile(LeftOperand<T> a, const T* panel, int64_t depth, T* c, int64_t c_stride,
                   Into into) {
  constexpr int kWidth = Vec<T>::kWidth;
  Vec<T> sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[row][v] = Vec<T>{};
  }
  // Every third row has a pointer of its own, the others lie one and two strides behind.
  constexpr int kPointers = (kRows + 2) / 3;
  const T* pointers[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) pointers[i] = a.rows + 3 * i * a.row_stride;
  const T* packed = a.rows;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = load_as<Vec<T>>(panel + v * kWidth);
    panel += kVectors * kWidth;
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const T value = kTransposed ? packed[row] : pointers[row / 3][(row % 3) * a.row_stride + k];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[row][v].value += value * b[v].value;
    }
    if (kTransposed) packed += kRows;
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* target = c + row * c_stride + v * kWidth;
      store(target, into == Into::kAdd ? load_as<Vec<T>>(target) + sums[row][v] : sums[row][v]);
    }
  }
}

// One row by kRowPanels whole panels: a tile of one row would wait for its own two sums at each
// step.
constexpr int kRowPanels = 4;
template <class T>
void multiply_row(const T* a, const T* panels, int64_t depth, T* c, Into into) {
  constexpr int kWidth = Vec<T>::kWidth, kPanel = Tiling<T>::kPanel, kVectors = 2 * kRowPanels;
  Vec<T> sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const T* b = panels + (v / 2) * depth * kPanel + (v % 2) * kWidth;
      sums[v].value += a[k] * load_as<Vec<T>>(b + k * kPanel).value;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    T* target = c + v * kWidth;
    store(target, into == Into::kAdd ? load_as<Vec<T>>(target) + sums[v] : sums[v]);
  }
}

// The tile kernels by their number of rows.
template <class T, bool kTransposed>
struct TileKernels {
  using Kernel = void (*)(LeftOperand<T>, const T*, int64_t, T*, int64_t, Into);
  static constexpr int kMost = Tiling<T>::kTileRows;
  Kernel by_rows[2][kMost + 1] = {};

  constexpr TileKernels() { fill<1>(); }
  template <int kRows>
  constexpr void fill() {
    by_rows[0][kRows] = &multiply_tile<T, kRows, 1, kTransposed>;
    by_rows[1][kRows] = &multiply_tile<T, kRows, 2, kTransposed>;
    if constexpr (kRows < kMost) fill<kRows + 1>();
  }
};
template <class T, bool kTransposed>
inline constexpr TileKernels<T, kTransposed> kTileKernels{};

// Rows in tiles of nearly equal height.
HOST_DEVICE int64_t tile_height(int64_t rows, int64_t most) {
  const int64_t tiles = (rows + most - 1) / most;
  return tiles == 0 ? most : (rows + tiles - 1) / tiles;
}

// C[rows, columns] with whole vectors: c must have room for padded_columns(columns).
template <class T>
void multiply(LeftOperand<T> a, int64_t rows, const T* panels, int64_t columns, int64_t depth, T* c,
              int64_t c_stride, Into into) {
  constexpr int kPanel = Tiling<T>::kPanel;
  const int64_t height = tile_height(rows, Tiling<T>::kTileRows);
  int64_t column = 0;
  for (; rows == 1 && column + kRowPanels * kPanel <= columns; column += kRowPanels * kPanel) {
    multiply_row(a.rows, panels + depth * column, depth, c + column, into);
  }
  for (; column < columns; column += kPanel) {
    const int vectors = columns - column > Tiling<T>::kWidth ? 2 : 1;
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t count = rows - row < height ? rows - row : height;
      kTileKernels<T, false>.by_rows[vectors - 1][count](
          {a.rows + row * a.row_stride, a.row_stride}, panels + depth * column, depth,
          c + row * c_stride + column, c_stride, into);
    }
  }
}

// C[rows, columns] += A^T * B where A [depth, rows] is stored by its rows, `stride` apart.
// `scratch` has room for depth * rows.
template <class T>
void multiply_transposed(const T* a, int64_t stride, int64_t rows, const T* panels, int64_t columns,
                         int64_t depth, T* c, int64_t c_stride, T* scratch) {
  constexpr int kPanel = Tiling<T>::kPanel;
  const int64_t height = tile_height(rows, Tiling<T>::kTileRows);
  for (int64_t k = 0; k < depth; ++k) {
    const T* source = a + k * stride;
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t count = rows - row < height ? rows - row : height;
      T* target = scratch + depth * row + k * count;
      for (int64_t i = 0; i < count; ++i) target[i] = source[row + i];
    }
  }
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int vectors = columns - column > Tiling<T>::kWidth ? 2 : 1;
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t count = rows - row < height ? rows - row : height;
      kTileKernels<T, true>.by_rows[vectors - 1][count](
          {scratch + depth * row, 1}, panels + depth * column, depth, c + row * c_stride + column,
          c_stride, Into::kAdd);
    }
  }
}

// Packs columns [begin, end) of B [depth, columns], begin at a panel's edge. row_of(k) is where B's
// row k begins.
template <class T, class RowOf>
void pack_rows(const RowOf& row_of, int64_t depth, int64_t columns, int64_t begin, int64_t end,
               T* panels) {
  constexpr int kPanel = Tiling<T>::kPanel;
  for (int64_t k = 0; k < depth; ++k) {
    const auto* row = row_of(k);
    for (int64_t column = begin; column < end; column += kPanel) {
      const int64_t left = columns - column;
      const int64_t width = left > Tiling<T>::kWidth ? kPanel : Tiling<T>::kWidth;
      T* target = panels + depth * column + k * width;
      int64_t i = 0;
      if (left >= width) {
        for (; i < width; i += Vec<T>::kWidth) store(target + i, load_as<Vec<T>>(row + column + i));
      } else {
        for (; i < left; ++i) target[i] = load(row + column + i);
        for (; i < width; ++i) target[i] = 0;
      }
    }
  }
}

// A square of vectors, transposed: log2 of the width rounds in which halves are interleaved.
template <class T>
HOST_DEVICE void transpose(Vec<T>* rows) {
  constexpr int kWidth = Vec<T>::kWidth;
  typename Vec<T>::Mask low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / 2 + (i % 2) * kWidth;
    high[i] = low[i] + kWidth / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
    Vec<T> next[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i].value = __builtin_shuffle(rows[i].value, rows[i + kWidth / 2].value, low);
      next[2 * i + 1].value = __builtin_shuffle(rows[i].value, rows[i + kWidth / 2].value, high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// Packs columns [begin, end) of B [depth, columns], begin at a panel's edge, where B's column n is
// contiguous and begins at column_of(n).
template <class T, class ColumnOf>
void pack_columns(const ColumnOf& column_of, int64_t depth, int64_t columns, int64_t begin,
                  int64_t end, T* panels) {
  constexpr int kPanel = Tiling<T>::kPanel, kWidth = Vec<T>::kWidth;
  for (int64_t column = begin; column < end; column += kPanel) {
    const int64_t left = columns - column;
    const int64_t width = left > kWidth ? kPanel : kWidth;
    for (int64_t half = 0; half < width; half += kWidth) {
      T* target = panels + depth * column + half;
      const int64_t there = left - half < kWidth ? left - half : kWidth;
      int64_t k = 0;
      for (; k + kWidth <= depth; k += kWidth) {
        Vec<T> square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          square[i] = i < there ? load_as<Vec<T>>(column_of(column + half + i) + k) : Vec<T>{};
        }
        transpose(square);
        for (int i = 0; i < kWidth; ++i) store(target + (k + i) * width, square[i]);
      }
      for (; k < depth; ++k) {
        for (int64_t i = 0; i < kWidth; ++i) {
          target[k * width + i] = i < there ? load(column_of(column + half + i) + k) : T(0);
        }
      }
    }
  }
}

FASTOPT_END_NAMESPACE
