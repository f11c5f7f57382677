#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#include "cpu/team.h"

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
  // Rows of a transposed A that are packed at a time: with 512 of depth, a fifth of an L2 cache.
  static constexpr int kBlockRows = 8 * kTileRows;
};

// What A and B are made of, F, and a word: the factors of one lane in one step of the depth. A word
// is held in the bits of the type of the sums, so that panels of words look all alike. One factor
// is a word, unless an instruction multiplies more of them.
template <class F>
struct Factors {
  using Sum = F;
  static constexpr int kInWord = 1;

  static HOST_DEVICE Vec<F> add_product(Vec<F> sum, F a, Vec<F> b) {
    return {sum.value + a * b.value};
  }
  // Words of neighbouring columns, whose factors lie in kInWord rows.
  template <class Storage>
  static HOST_DEVICE Vec<F> joined(const Storage* const* rows, int64_t column) {
    return load_as<Vec<F>>(rows[0] + column);
  }
  template <class Storage>
  static HOST_DEVICE F joined_word(const Storage* const* rows, int64_t column) {
    return load(rows[0] + column);
  }
  // Words that follow each other in one column, and the last one of a column of `left` factors.
  template <class Storage>
  static HOST_DEVICE Vec<F> along(const Storage* column) {
    return load_as<Vec<F>>(column);
  }
  template <class Storage>
  static HOST_DEVICE F word_along(const Storage* column, int64_t) {
    return load(column);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Factors<BFloat16> {
  using Sum = float;
  static constexpr int kInWord = 2;

  static HOST_DEVICE Vec<float> add_product(Vec<float> sum, float a, Vec<float> b) {
    const __m512bh pair = (__m512bh)_mm512_set1_ps(a);
    return {(Vec<float>::Native)_mm512_dpbf16_ps((__m512)sum.value, pair, (__m512bh)b.value)};
  }
  // A row that is not there is nullptr.
  static HOST_DEVICE Vec<float> joined(const BFloat16* const* rows, int64_t column) {
    Bits32 bits = widened(rows[0] + column);
    if (rows[1]) bits |= widened(rows[1] + column) << 16;
    return {(Vec<float>::Native)bits};
  }
  static HOST_DEVICE float joined_word(const BFloat16* const* rows, int64_t column) {
    const uint32_t high = rows[1] ? rows[1][column].bits : 0;
    return float_from_bits(rows[0][column].bits | high << 16);
  }
  static HOST_DEVICE Vec<float> along(const BFloat16* column) {
    Vec<float> words;
    memcpy(&words, column, sizeof words);
    return words;
  }
  static HOST_DEVICE float word_along(const BFloat16* column, int64_t left) {
    const uint32_t high = left > 1 ? column[1].bits : 0;
    return float_from_bits(column[0].bits | high << 16);
  }
};
#endif

template <class F>
using SumOf = typename Factors<F>::Sum;

// The factors that products of a storage type are made of.
template <class Storage>
struct FactorOf {
  using type = ComputeType<Storage>;
};
#if defined(__AVX512BF16__)
template <>
struct FactorOf<BFloat16> {
  using type = BFloat16;
};
#endif

// Words along a depth. The last one is filled up with zeros.
template <class F>
HOST_DEVICE int64_t words_of(int64_t depth) {
  return (depth + Factors<F>::kInWord - 1) / Factors<F>::kInWord;
}

template <class F>
HOST_DEVICE SumOf<F> load_word(const F* factors) {
  SumOf<F> word;
  memcpy(&word, factors, sizeof word);
  return word;
}

// Columns with those that fill the last vector up. Panel p begins at words_of(depth) * p * kPanel,
// and the last one may be a single vector wide.
template <class T>
HOST_DEVICE int64_t padded_columns(int64_t columns) {
  return (columns + Tiling<T>::kWidth - 1) / Tiling<T>::kWidth * Tiling<T>::kWidth;
}

enum class Into { kReplace, kAdd };

// A: row r begins at rows + r * row_stride, a multiple of a word's factors, and is contiguous along
// the depth, of whole words; or, transposed, its words lie packed as [depth][rows of the tile].
template <class F>
struct LeftOperand {
  const F* rows;
  int64_t row_stride;
};

// kVectors of the columns of a panel, whose words are `panel_width` apart.
template <class F, int kRows, int kVectors, bool kTransposed>
void multiply_tile(LeftOperand<F> a, const SumOf<F>* panel, int64_t panel_width, int64_t words,
                   SumOf<F>* c, int64_t c_stride, Into into) {
  using T = SumOf<F>;
  constexpr int kWidth = Vec<T>::kWidth, kInWord = Factors<F>::kInWord;
  Vec<T> sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[row][v] = Vec<T>{};
  }
  // Every third row has a pointer of its own, the others lie one and two strides behind.
  constexpr int kPointers = (kRows + 2) / 3;
  const F* pointers[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) pointers[i] = a.rows + 3 * i * a.row_stride;
  const F* packed = a.rows;
  for (int64_t k = 0; k < words; ++k) {
    Vec<T> b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = load_as<Vec<T>>(panel + v * kWidth);
    panel += panel_width;
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const F* place = kTransposed ? packed + row * kInWord
                                   : pointers[row / 3] + (row % 3) * a.row_stride + k * kInWord;
      const T word = load_word(place);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = Factors<F>::add_product(sums[row][v], word, b[v]);
      }
    }
    if (kTransposed) packed += kRows * kInWord;
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
template <class F>
void multiply_row(const F* a, const SumOf<F>* panels, int64_t panel_words, int64_t words,
                  SumOf<F>* c, Into into) {
  using T = SumOf<F>;
  constexpr int kWidth = Vec<T>::kWidth, kPanel = Tiling<T>::kPanel, kVectors = 2 * kRowPanels;
  Vec<T> sums[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] = Vec<T>{};
  for (int64_t k = 0; k < words; ++k) {
    const T word = load_word(a + k * Factors<F>::kInWord);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const T* b = panels + (v / 2) * panel_words * kPanel + (v % 2) * kWidth;
      sums[v] = Factors<F>::add_product(sums[v], word, load_as<Vec<T>>(b + k * kPanel));
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    T* target = c + v * kWidth;
    store(target, into == Into::kAdd ? load_as<Vec<T>>(target) + sums[v] : sums[v]);
  }
}

// The tile kernels by their number of rows.
template <class F, bool kTransposed>
struct TileKernels {
  using T = SumOf<F>;
  using Kernel = void (*)(LeftOperand<F>, const T*, int64_t, int64_t, T*, int64_t, Into);
  static constexpr int kMost = Tiling<T>::kTileRows;
  Kernel by_rows[2][kMost + 1] = {};

  constexpr TileKernels() { fill<1>(); }
  template <int kRows>
  constexpr void fill() {
    by_rows[0][kRows] = &multiply_tile<F, kRows, 1, kTransposed>;
    by_rows[1][kRows] = &multiply_tile<F, kRows, 2, kTransposed>;
    if constexpr (kRows < kMost) fill<kRows + 1>();
  }
};
template <class F, bool kTransposed>
inline constexpr TileKernels<F, kTransposed> kTileKernels{};

// Rows in tiles of nearly equal height.
HOST_DEVICE int64_t tile_height(int64_t rows, int64_t most) {
  const int64_t tiles = (rows + most - 1) / most;
  return tiles == 0 ? most : (rows + tiles - 1) / tiles;
}

// What is taken of packed columns: words [first, first + words) of panels of `panel_words`.
struct Depth {
  int64_t panel_words, first, words;
};

// C[rows, columns] with whole vectors: c must have room for padded_columns(columns). There may be
// more packed columns; how many they are says how wide the last panel is.
template <class F>
void multiply(LeftOperand<F> a, int64_t rows, const SumOf<F>* panels, int64_t packed_columns,
              int64_t columns, Depth depth, SumOf<F>* c, int64_t c_stride, Into into) {
  using T = SumOf<F>;
  constexpr int kPanel = Tiling<T>::kPanel, kWidth = Tiling<T>::kWidth;
  const int64_t words = depth.words, height = tile_height(rows, Tiling<T>::kTileRows);
  int64_t column = 0;
  for (; rows == 1 && column + kRowPanels * kPanel <= columns; column += kRowPanels * kPanel) {
    multiply_row<F>(a.rows, panels + depth.panel_words * column + depth.first * kPanel,
                    depth.panel_words, words, c + column, into);
  }
  for (; column < columns; column += kPanel) {
    const int vectors = columns - column > kWidth ? 2 : 1;
    const int64_t width = packed_columns - column > kWidth ? kPanel : kWidth;
    const T* panel = panels + depth.panel_words * column + depth.first * width;
    for (int64_t row = 0; row < rows; row += height) {
      const int64_t count = rows - row < height ? rows - row : height;
      kTileKernels<F, false>.by_rows[vectors - 1][count](
          {a.rows + row * a.row_stride, a.row_stride}, panel, width, words,
          c + row * c_stride + column, c_stride, into);
    }
  }
}

// Over all of the depth that was packed.
template <class F>
void multiply(LeftOperand<F> a, int64_t rows, const SumOf<F>* panels, int64_t columns,
              int64_t depth, SumOf<F>* c, int64_t c_stride, Into into) {
  const int64_t words = words_of<F>(depth);
  multiply<F>(a, rows, panels, columns, columns, Depth{words, 0, words}, c, c_stride, into);
}

// The rows of B [depth, ...] that make its word k; row_of(i) is where row i begins. Rows are asked
// for in their order.
template <class F, class RowOf, class Row>
HOST_DEVICE void rows_of_word(const RowOf& row_of, int64_t k, int64_t depth, Row* rows) {
  for (int i = 0; i < Factors<F>::kInWord; ++i) {
    const int64_t row = k * Factors<F>::kInWord + i;
    rows[i] = row < depth ? row_of(row) : nullptr;
  }
}

// Factors that multiply_transposed needs as its scratch.
template <class F>
HOST_DEVICE int64_t transposed_scratch(int64_t depth) {
  constexpr int kWidth = Vec<SumOf<F>>::kWidth, kBlockRows = Tiling<SumOf<F>>::kBlockRows;
  return (words_of<F>(depth) * kBlockRows + kWidth) * Factors<F>::kInWord;
}

// C[rows, columns] (+)= A^T * B where A [depth, rows] is stored by its rows, `stride` apart and
// readable for a vector beyond `rows`. words_for(row, count) says which words of the depth are of
// interest to a tile of rows: elsewhere A is zero.
template <class F, class WordsFor>
void multiply_transposed(const F* a, int64_t stride, int64_t rows, const SumOf<F>* panels,
                         int64_t columns, int64_t depth, SumOf<F>* c, int64_t c_stride, Into into,
                         F* scratch, const WordsFor& words_for) {
  using T = SumOf<F>;
  constexpr int kPanel = Tiling<T>::kPanel, kInWord = Factors<F>::kInWord;
  const int64_t words = words_of<F>(depth);
  for (int64_t block = 0; block < rows; block += Tiling<T>::kBlockRows) {
    const int64_t left = rows - block;
    const int64_t block_rows = left < Tiling<T>::kBlockRows ? left : Tiling<T>::kBlockRows;
    const int64_t height = tile_height(block_rows, Tiling<T>::kTileRows);
    for (int64_t row = 0; row < block_rows; row += height) {
      const int64_t count = block_rows - row < height ? block_rows - row : height;
      const Range span = words_for(block + row, count);
      F* target = scratch + (words * row + span.begin * count) * kInWord;
      for (int64_t k = span.begin; k < span.end; ++k, target += count * kInWord) {
        const F* source[kInWord];
        rows_of_word<F>([=](int64_t i) { return a + i * stride; }, k, depth, source);
        // What a vector writes beyond the tile's rows, the next word or tile overwrites.
        for (int64_t i = 0; i < count; i += Vec<T>::kWidth) {
          const Vec<T> joined = Factors<F>::joined(source, block + row + i);
          memcpy(static_cast<void*>(target + i * kInWord), &joined, sizeof joined);
        }
      }
    }
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int vectors = columns - column > Tiling<T>::kWidth ? 2 : 1;
      const int64_t width = vectors * Tiling<T>::kWidth;
      for (int64_t row = 0; row < block_rows; row += height) {
        const int64_t count = block_rows - row < height ? block_rows - row : height;
        const Range span = words_for(block + row, count);
        kTileKernels<F, true>.by_rows[vectors - 1][count](
            {scratch + (words * row + span.begin * count) * kInWord, 1},
            panels + words * column + span.begin * width, width, span.end - span.begin,
            c + (block + row) * c_stride + column, c_stride, into);
      }
    }
  }
}

// Over all of the depth.
template <class F>
void multiply_transposed(const F* a, int64_t stride, int64_t rows, const SumOf<F>* panels,
                         int64_t columns, int64_t depth, SumOf<F>* c, int64_t c_stride, Into into,
                         F* scratch) {
  const int64_t words = words_of<F>(depth);
  multiply_transposed<F>(a, stride, rows, panels, columns, depth, c, c_stride, into, scratch,
                         [=](int64_t, int64_t) { return Range{0, words}; });
}

// Packs columns [begin, end) of B [depth, columns], begin at a panel's edge. row_of(k) is where B's
// row k begins; rows are asked for in their order.
template <class F, class RowOf>
void pack_rows(const RowOf& row_of, int64_t depth, int64_t columns, int64_t begin, int64_t end,
               SumOf<F>* panels) {
  using T = SumOf<F>;
  constexpr int kPanel = Tiling<T>::kPanel;
  const int64_t words = words_of<F>(depth);
  for (int64_t k = 0; k < words; ++k) {
    decltype(row_of(k)) rows[Factors<F>::kInWord];
    rows_of_word<F>(row_of, k, depth, rows);
    for (int64_t column = begin; column < end; column += kPanel) {
      const int64_t left = columns - column;
      const int64_t width = left > Tiling<T>::kWidth ? kPanel : Tiling<T>::kWidth;
      T* target = panels + words * column + k * width;
      int64_t i = 0;
      if (left >= width) {
        for (; i < width; i += Vec<T>::kWidth) {
          store(target + i, Factors<F>::joined(rows, column + i));
        }
      } else {
        for (; i < left; ++i) target[i] = Factors<F>::joined_word(rows, column + i);
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
template <class F, class ColumnOf>
void pack_columns(const ColumnOf& column_of, int64_t depth, int64_t columns, int64_t begin,
                  int64_t end, SumOf<F>* panels) {
  using T = SumOf<F>;
  constexpr int kPanel = Tiling<T>::kPanel, kWidth = Vec<T>::kWidth, kInWord = Factors<F>::kInWord;
  const int64_t words = words_of<F>(depth), whole = depth / kInWord / kWidth * kWidth;
  for (int64_t column = begin; column < end; column += kPanel) {
    const int64_t left = columns - column;
    const int64_t width = left > kWidth ? kPanel : kWidth;
    for (int64_t half = 0; half < width; half += kWidth) {
      T* target = panels + words * column + half;
      const int64_t there = left - half < kWidth ? left - half : kWidth;
      int64_t k = 0;
      for (; k < whole; k += kWidth) {
        Vec<T> square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          square[i] =
              i < there ? Factors<F>::along(column_of(column + half + i) + k * kInWord) : Vec<T>{};
        }
        transpose(square);
        for (int i = 0; i < kWidth; ++i) store(target + (k + i) * width, square[i]);
      }
      for (; k < words; ++k) {
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t first = k * kInWord;
          target[k * width + i] =
              i < there
                  ? Factors<F>::word_along(column_of(column + half + i) + first, depth - first)
                  : T(0);
        }
      }
    }
  }
}

FASTOPT_END_NAMESPACE
