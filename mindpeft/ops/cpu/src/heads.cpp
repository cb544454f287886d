// Splitting rows into heads, with a rotary position embedding or without, and merging them again.
#include <algorithm>
#include <vector>

#include "arguments.h"
#include "threads.h"

namespace {

// The angles of a pair of columns: tables (batch, 1 or more, length, size), where each column has its own
// cosine and sine; mindpeft.nn.rotary makes the first sine of each pair negative.
struct Angles {
  const float *cos, *sin;
  int64_t size;        // columns that are turned
  int64_t batch_step;  // from one text's table to the next's, 0 if all have the same
  bool neighbours;     // pairs are neighbours; else halves
};

// One head's columns at one place. `back` turns the other way: what a column gave its pair comes back to it.
void turn(const float* __restrict in, float* __restrict out, int64_t width, const float* cos, const float* sin,
          const Angles& angles, bool back) {
  const int64_t size = angles.size, half = size / 2, apart = angles.neighbours ? 1 : half;
  const float *to_first = back ? sin + apart : sin, *to_second = back ? sin : sin + apart;
  if (angles.neighbours) {
    for (int64_t i = 0; i < size; i += 2) {
      const float first = in[i], second = in[i + 1];
      out[i] = first * cos[i] + second * to_first[i];
      out[i + 1] = second * cos[i + 1] + first * to_second[i];
    }
  } else {
    for (int64_t i = 0; i < half; ++i) {
      const float first = in[i], second = in[i + half];
      out[i] = first * cos[i] + second * to_first[i];
      out[i + half] = second * cos[i + half] + first * to_second[i];
    }
  }
  std::copy(in + size, in + width, out + size);
}

// Copies between (batch, length, heads * size) and (batch, heads, length, size).
template <typename Copy>
void between(int64_t batch, int64_t heads, int64_t length, int64_t size, const float* from, float* to, bool split,
             const Copy& copy) {
  mindpeft::in_parallel(batch * length, 8192 / (heads * size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t text = row / length, place = row % length;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t joined = row * heads * size + head * size;
        const int64_t apart = ((text * heads + head) * length + place) * size;
        copy(from + (split ? joined : apart), to + (split ? apart : joined), text, place);
      }
    }
  });
}

Angles angles_of(const mindpeft::Arguments& arguments, int cos, bool neighbours) {
  const int64_t length = arguments.axis(cos, -2), size = arguments.width(cos);
  const int64_t heads = arguments.axis(cos, 1);
  const int64_t step = arguments.axis(cos, 0) == 1 ? 0 : heads * length * size;
  return {arguments.at(cos), arguments.at(cos + 1), size, step, neighbours};
}

// The tensor apart tells batch, heads, length and size.
void turn_all(const mindpeft::Arguments& arguments, int apart, bool neighbours, bool split) {
  const Angles angles = angles_of(arguments, 1, neighbours);
  const int64_t size = arguments.axis(apart, 3);
  between(arguments.axis(apart, 0), arguments.axis(apart, 1), arguments.axis(apart, 2), size, arguments.at(0),
          arguments.at(3), split, [&](const float* in, float* out, int64_t text, int64_t place) {
            const int64_t at = text * angles.batch_step + place * angles.size;
            turn(in, out, size, angles.cos + at, angles.sin + at, angles, !split);
          });
}

void copy_all(const mindpeft::Arguments& arguments, int apart, bool split) {
  const int64_t size = arguments.axis(apart, 3);
  between(arguments.axis(apart, 0), arguments.axis(apart, 1), arguments.axis(apart, 2), size, arguments.at(0),
          arguments.at(1), split,
          [=](const float* in, float* out, int64_t, int64_t) { std::copy(in, in + size, out); });
}

}  // namespace

// (batch, length, heads * size) -> (batch, heads, length, size)
MINDPEFT_KERNEL(split_heads) { copy_all(arguments, 1, true); }

// (batch, heads, length, size) -> (batch, length, heads * size)
MINDPEFT_KERNEL(merge_heads) { copy_all(arguments, 0, false); }

// x, cos, sin -> the same as split_heads, turned; for pairs of halves, and of neighbours
MINDPEFT_KERNEL(split_and_turn) { turn_all(arguments, 3, false, true); }
MINDPEFT_KERNEL(split_and_turn_neighbours) { turn_all(arguments, 3, true, true); }

// dy (batch, heads, length, size), cos, sin -> dx (batch, length, heads * size)
MINDPEFT_KERNEL(split_and_turn_grad) { turn_all(arguments, 0, false, false); }
MINDPEFT_KERNEL(split_and_turn_neighbours_grad) { turn_all(arguments, 0, true, false); }
