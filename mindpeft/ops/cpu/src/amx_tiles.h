// The registers of the matrix units (AMX), and how numbers are packed for them.
#pragma once

#if defined(__AVX512F__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MINDPEFT_AMX

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "amx.h"

namespace mindpeft::amx {

// A tile register holds 16 rows of 64 bytes: 16 x 16 floats of a sum, 16 rows of a with 32 columns each, or 32 rows
// of b with 16 columns each, where two rows that follow each other are interlaced.
constexpr int64_t kSide = 16, kDepth = 32, kTile = kSide * kDepth;
static_assert(kPanel == 2 * kSide);

// All registers as large as they can be, for as long as this lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

using Words = __m512i;  // 16 pairs of bfloat16s

// The transpose of 16 x 16 words.
inline void transpose(Words* rows) {
  Words other[kSide];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
  }
}

// The first `count` of 16 numbers.
inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kSide)) - 1u);
}

// Two times 16 floats become a line of bfloat16s, one after the other or interlaced: rounded, or as many lines as they
// have parts, each what the ones before it leave; three hold every bit. Returns whether all of them are finite; if they are only rounded, no one needs to know.
template <int kParts>
inline bool to_line(__m512 left, __m512 right, bool interlaced, Words* line) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  constexpr int kNoNumber = 0x99;  // infinities, and what is not a number
  const Words half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const auto rounded = [&](__m512 x) { return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper); };
  bool finite = true;
  for (int i = 0; i < kParts; ++i) {
    const Words a = rounded(left), b = rounded(right);
    if (i == 0) {  // a number near the largest may be rounded to infinity
      finite = (_mm512_fpclass_ps_mask(_mm512_castsi512_ps(a), kNoNumber) |
                _mm512_fpclass_ps_mask(_mm512_castsi512_ps(b), kNoNumber)) == 0;
    }
    line[i] = interlaced ? _mm512_or_si512(_mm512_srli_epi32(a, 16), b)
                         : _mm512_permutex2var_epi16(a, _mm512_load_si512(kUpper), b);
    left = _mm512_sub_ps(left, _mm512_castsi512_ps(a));
    right = _mm512_sub_ps(right, _mm512_castsi512_ps(b));
  }
  return finite;
}

template <>
inline bool to_line<1>(__m512 left, __m512 right, bool interlaced, Words* line) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(line[0]) : "v"(left), "v"(right));
  if (interlaced) line[0] = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), line[0]);
  return true;
}

// What is packed: rows of a or columns of b, `across` apart in memory, and their depth, `along` apart; one is 1.
struct Side {
  const void* data;
  int64_t across, along;
  bool bfloat;

  template <typename Number>
  const Number* at(int64_t place, int64_t depth) const {
    return static_cast<const Number*>(data) + place * across + depth * along;
  }
};

// One line of a tile as it lies in memory, in each of its parts; returns whether all are finite.
template <int kParts>
inline bool read_deep(const Side& side, int64_t place, int64_t depth, int64_t deep, Words* line) {
  if (side.bfloat) {
    const auto mask = static_cast<__mmask32>((uint64_t{1} << std::min(deep, kDepth)) - 1);
    line[0] = _mm512_maskz_loadu_epi16(mask, side.at<bfloat16>(place, depth));
    return true;
  }
  const float* from = side.at<float>(place, depth);
  return to_line<kParts>(_mm512_maskz_loadu_ps(first(deep), from),
                         _mm512_maskz_loadu_ps(first(deep - kSide), from + kSide), false, line);
}

template <int kParts>
inline bool read_wide(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, Words* line) {
  const __mmask16 even = deep > 0 ? first(wide) : 0, odd = deep > 1 ? first(wide) : 0;
  if (side.bfloat) {
    const bfloat16* from = side.at<bfloat16>(place, depth);
    const Words low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from));
    const Words high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + side.along));
    line[0] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    return true;
  }
  const float* from = side.at<float>(place, depth);
  return to_line<kParts>(_mm512_maskz_loadu_ps(even, from), _mm512_maskz_loadu_ps(odd, from + side.along), true, line);
}

// Packs `wide` rows of a (or columns of b) from `place` on, and `deep` of their depth; what the tile has more is
// zero. `lines` tells that a tile's rows are those of a, rather than interlaced rows of b.
template <int kParts>
bool pack_tile(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, bool lines,
               bfloat16* to, int64_t part_step) {
  Words rows[kParts][kSide];
  bool finite = true;
  const bool contiguous = side.along == 1;
  for (int64_t i = 0; i < kSide; ++i) {
    Words line[kParts] = {};
    if (contiguous) {
      if (i < wide) finite &= read_deep<kParts>(side, place + i, depth, deep, line);
    } else if (2 * i < deep) {
      finite &= read_wide<kParts>(side, place, wide, depth + 2 * i, deep - 2 * i, line);
    }
    for (int part = 0; part < kParts; ++part) rows[part][i] = line[part];
  }
  for (int part = 0; part < kParts; ++part) {
    if (contiguous != lines) transpose(rows[part]);
    for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(to + part * part_step + i * kDepth, rows[part][i]);
  }
  return finite;
}

inline Side side_of_a(const Matrix& a) {
  return {a.data, a.transposed ? 1 : a.stride, a.transposed ? a.stride : 1, a.bfloat};
}

inline Side side_of_b(const Matrix& b) {
  return {b.data, b.transposed ? b.stride : 1, b.transposed ? 1 : b.stride, b.bfloat};
}

}  // namespace mindpeft::amx

#endif
