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

// Bits 16 to 31 of two times 16 floats, one after the other or interlaced: bfloat16s nearer to zero.
inline Words cut(Words left, Words right, bool interlaced) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  if (!interlaced) return _mm512_permutex2var_epi16(left, _mm512_load_si512(kUpper), right);
  constexpr int kFirstOrBoth = 0xf8;
  const Words upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(left, 16), right, upper, kFirstOrBoth);
}

// The same numbers rounded.
inline Words rounded(Words left, Words right, bool interlaced) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Words line;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(line) : "v"(left), "v"(right));
  return interlaced ? _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), line) : line;
}

// What cutting leaves of 16 floats.
inline Words rest(Words floats) {
  const Words upper = _mm512_and_si512(floats, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(floats), _mm512_castsi512_ps(upper)));
}

// Two times 16 floats become a line of bfloat16s in each of its parts: each holds eight bits of what the ones before
// it leave, the last is rounded. Three hold every bit; of an infinity, and of what is no number, one is no number.
template <int kParts>
inline void to_line(Words left, Words right, bool interlaced, Words* line) {
  for (int part = 0; part < kParts - 1; ++part) {
    line[part] = cut(left, right, interlaced);
    left = rest(left);
    right = rest(right);
  }
  line[kParts - 1] = kParts < 3 ? rounded(left, right, interlaced) : cut(left, right, interlaced);
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

// 16 x 16 floats as they lie in memory, zeros behind the end: a vector is one place's depths if kAlong, or else one
// depth's places.
template <bool kAlong>
inline void read_square(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, Words* rows) {
  const int64_t count = kAlong ? wide : deep;
  const __mmask16 mask = first(kAlong ? deep : wide);
  const float* from = side.at<float>(place, depth);
  for (int64_t i = 0; i < kSide; ++i, from += kAlong ? side.across : side.along) {
    rows[i] = i < count ? _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, from)) : _mm512_setzero_si512();
  }
}

template <int kParts, bool kLines, bool kAlong>
void pack_floats(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, bfloat16* to,
                 int64_t part_step) {
  Words floats[2 * kSide];
  for (int64_t half = 0; half < 2; ++half) {
    read_square<kAlong>(side, place, wide, depth + half * kSide, deep - half * kSide, floats + half * kSide);
    if (kAlong != kLines) transpose(floats + half * kSide);
  }
  for (int64_t i = 0; i < kSide; ++i) {
    Words line[kParts];
    const int64_t left = kLines ? i : 2 * i, right = kLines ? kSide + i : 2 * i + 1;
    to_line<kParts>(floats[left], floats[right], !kLines, line);
    for (int part = 0; part < kParts; ++part) _mm512_store_si512(to + part * part_step + i * kDepth, line[part]);
  }
}

// One line of a tile of bfloat16s as it lies in memory.
inline Words read_deep(const Side& side, int64_t place, int64_t depth, int64_t deep) {
  const auto mask = static_cast<__mmask32>((uint64_t{1} << std::min(deep, kDepth)) - 1);
  return _mm512_maskz_loadu_epi16(mask, side.at<bfloat16>(place, depth));
}

// Two depths of it, interlaced.
inline Words read_wide(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep) {
  const __mmask16 even = first(wide), odd = deep > 1 ? first(wide) : 0;
  const bfloat16* from = side.at<bfloat16>(place, depth);
  const Words low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, from));
  const Words high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, from + side.along));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

template <bool kLines, bool kAlong>
void pack_bfloats(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, bfloat16* to) {
  Words rows[kSide] = {};
  for (int64_t i = 0; i < kSide; ++i) {
    if (kAlong && i < wide) rows[i] = read_deep(side, place + i, depth, deep);
    if (!kAlong && 2 * i < deep) rows[i] = read_wide(side, place, wide, depth + 2 * i, deep - 2 * i);
  }
  if (kAlong != kLines) transpose(rows);
  for (int64_t i = 0; i < kSide; ++i) _mm512_store_si512(to + i * kDepth, rows[i]);
}

// Packs `wide` rows of a (or columns of b) from `place` on, and `deep` of their depth; what the tile has more is
// zero. kLines tells that a tile's rows are those of a, rather than interlaced rows of b.
template <int kParts, bool kLines>
void pack_tile(const Side& side, int64_t place, int64_t wide, int64_t depth, int64_t deep, bfloat16* to,
               int64_t part_step) {
  const bool along = side.along == 1;
  if (side.bfloat) {
    (along ? pack_bfloats<kLines, true> : pack_bfloats<kLines, false>)(side, place, wide, depth, deep, to);
  } else {
    (along ? pack_floats<kParts, kLines, true> : pack_floats<kParts, kLines, false>)(side, place, wide, depth, deep,
                                                                                     to, part_step);
  }
}

inline Side side_of_a(const Matrix& a) {
  return {a.data, a.transposed ? 1 : a.stride, a.transposed ? a.stride : 1, a.bfloat};
}

inline Side side_of_b(const Matrix& b) {
  return {b.data, b.transposed ? b.stride : 1, b.transposed ? 1 : b.stride, b.bfloat};
}

}  // namespace mindpeft::amx

#endif
