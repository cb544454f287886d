// softmax(scale q k^T + mask) v, some queries and keys at a time, so that the scores are never all in memory
// (Dao et al., 2022). Several heads of queries may share one of keys and values.
//
// q (batch, heads, length, size); k, v (batch, key heads, keys, size or value size); mask (1 or batch, 1 or
// heads, 1 or length, keys), added to the scores; settings (2): scale, and the scores' bound or 0; noise (4) for
// dropout of the weights. What comes out is (batch, length, heads * value size).
//
// A mask hides a key by a number so low that a score added to it makes no difference. A row all of whose keys
// are hidden then weighs those alike that are hidden least, as the composition of plain operators does; where
// all are hidden by -infinity, all keys. Where a whole block is hidden for a few queries, nothing is computed for it.
#include "attention.h"

#include <cmath>

#include "buffers.h"
#include "elementwise.h"
#include "lanes.h"

namespace {

using mindpeft::Block;
using mindpeft::kHidden;
using mindpeft::kKeys;
using mindpeft::kQueries;
using mindpeft::Matrix;
using mindpeft::multiply;
using mindpeft::Problem;

// Takes a row's scores into its running maximum and sum; they become weights. Returns what all that came
// before is to be multiplied by.
float take_in(float* row, int64_t count, float& most, float& sum) {
  float higher = most;
#pragma omp simd reduction(max : higher)
  for (int64_t j = 0; j < count; ++j) higher = row[j] > higher ? row[j] : higher;
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    // Equal infinities would give NaN; a score that is NaN itself must.
    row[j] = row[j] == higher ? 1.0f : mindpeft::exponential(row[j] - higher);
  }
  // Infinity: as if it had been subtracted from itself.
  const float mine = higher == INFINITY ? NAN : mindpeft::sum(row, count);
  const float kept = most == higher ? 1.0f : most == -INFINITY ? 0.0f : mindpeft::exponential(most - higher);
  most = higher;
  sum = sum * kept + mine;
  return kept;
}

// What the backward pass needs of a query: its highest score, -infinity if it saw no key, and the logarithm of the sum
// of exponentials beyond that. Added up they would lose digits where scores are high. Returns whether it saw no key.
bool note(const Problem& problem, float most, float sum, float* logs) {
  const bool blind = most < kHidden && sum == sum;
  logs[0] = blind ? -INFINITY : sum == sum ? most : NAN;
  logs[problem.all_queries()] = std::log(sum);
  return blind;
}

void scale_row(float* row, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) row[i] *= factor;
}

// The blocks of keys that some queries see; all of them if every block is hidden from one of the queries.
template <typename Visit>
void seen_blocks(const Problem& problem, Block block, bool skip, const Visit& visit) {
  for (block.key = 0; block.key < problem.keys; block.key += kKeys) {
    block.keys = std::min(kKeys, problem.keys - block.key);
    if (!skip) {
      visit(block);
    } else if (const Block near = block.near(problem); !hidden(problem, near)) {
      visit(near);
    }
  }
}

// One block of queries; `out` and `logs` are those of its first. Returns whether a query saw no key.
bool attend(const Problem& problem, Block block, bool skip, float* out, int64_t out_step, float* logs) {
  float* scores = mindpeft::scratch(0, kQueries * kKeys);
  float* mixed = mindpeft::scratch(1, kQueries * problem.value_size);
  float most[kQueries], sums[kQueries];
  std::fill(most, most + block.queries, -INFINITY);
  std::fill(sums, sums + block.queries, 0.0f);
  std::fill(mixed, mixed + block.queries * problem.value_size, 0.0f);
  seen_blocks(problem, block, skip, [&](const Block& some) {
    score(problem, some, scores, nullptr);
    for (int64_t i = 0; i < some.queries; ++i) {
      const float kept = take_in(scores + i * kKeys, some.keys, most[i], sums[i]);
      if (kept != 1.0f) scale_row(mixed + i * problem.value_size, problem.value_size, kept);
    }
    drop(problem, some, scores);
    multiply(some.queries, problem.value_size, some.keys, 1.0f, Matrix(scores, kKeys),
             Matrix(problem.values_of(some.text, some.head, some.key), problem.value_size), 1.0f, mixed,
             problem.value_size);
  });
  bool blind = false;
  for (int64_t i = 0; i < block.queries; ++i) {
    for (int64_t j = 0; j < problem.value_size; ++j) {
      out[i * out_step + j] = mixed[i * problem.value_size + j] / sums[i];
    }
    blind |= note(problem, most[i], sums[i], logs + i);
  }
  return blind;
}

// A single query, as when a text is written: products of one row, of the keys alone that it sees.
void attend_with_one(const Problem& problem, int64_t text, int64_t head, float* out, float* logs) {
  float* scores = mindpeft::scratch(0, problem.keys);
  const float *query = problem.queries(text, head, 0), *keys = problem.keys_of(text, head, 0);
  const float* values = problem.values_of(text, head, 0);
  float* room = mindpeft::scratch(6, problem.keys);
  const float* mask = problem.mask.any() ? problem.mask.row(text, head, 0, 0, problem.keys, room) : nullptr;
  for (int64_t j = 0; j < problem.keys; ++j) {
    if (mask != nullptr && mask[j] < kHidden) {  // most of a cache is empty
      scores[j] = mask[j];
      continue;
    }
    scores[j] = mindpeft::dot(query, keys + j * problem.size, problem.size) * problem.scale;
    if (problem.cap > 0.0f) scores[j] = problem.cap * mindpeft::hyperbolic_tangent(scores[j] / problem.cap);
    if (mask != nullptr) scores[j] += mask[j];
  }
  float most = -INFINITY, sum = 0;
  take_in(scores, problem.keys, most, sum);
  std::fill(out, out + problem.value_size, 0.0f);
  const uint32_t mine = problem.noise_row(text, head, 0);
  for (int64_t j = 0; j < problem.keys; ++j) {
    const float share = scores[j] / sum * (problem.noise.any() ? problem.noise.factor(mine, j) : 1.0f);
    if (share == 0.0f) continue;
    for (int64_t i = 0; i < problem.value_size; ++i) out[i] += share * values[j * problem.value_size + i];
  }
  note(problem, most, sum, logs);
}

void attend_all(const Problem& problem, float* out, float* logs) {
  const int64_t blocks = (problem.length + kQueries - 1) / kQueries, row = problem.heads * problem.value_size;
  mindpeft::run_tasks(problem.batch * problem.heads * blocks, [&](int64_t task) {
    const int64_t query = task % blocks * kQueries, head = task / blocks % problem.heads;
    const int64_t text = task / blocks / problem.heads;
    float* to = out + (text * problem.length + query) * row + head * problem.value_size;
    float* log = logs + (text * problem.heads + head) * problem.length + query;
    if (problem.length == 1) return attend_with_one(problem, text, head, to, log);
    const Block block{text, head, query, std::min(kQueries, problem.length - query), 0, 0};
    if (attend(problem, block, true, to, row, log)) attend(problem, block, false, to, row, log);
  });
}

// q, k, v and what comes out are kept for the backward pass, if the call asks for it: as outputs more, in bfloat16s. Of
// what comes out one number is, where the backward pass reads none.
void forward(const mindpeft::Arguments& arguments, int settings, int mask) {
  const int outputs = settings + 2;
  attend_all(Problem(arguments, settings, mask), arguments.at(outputs), arguments.at(outputs + 1));
  if (arguments.count() == outputs + 2) return;
  int kept = outputs + 2;
  for (const int tensor : {0, 1, 2, outputs}) {
    const int64_t count = std::min(arguments.size(tensor), arguments.size(kept));
    mindpeft::keep(count, arguments.at(tensor), arguments.at<mindpeft::bfloat16>(kept++));
  }
}

// Puts new rows of each head, (batch * heads, count, size), into a cache, (batch * heads, room, size).
void put(const float* fresh, int64_t heads, int64_t count, int64_t size, float* cache, int64_t room, int64_t place) {
  const int64_t fitting = std::clamp<int64_t>(room - place, 0, count);
  for (int64_t head = 0; head < heads; ++head) {
    std::copy_n(fresh + head * count * size, fitting * size, cache + (head * room + place) * size);
  }
}

// q, k, v, mask, settings, noise, key cache, value cache, and place or none: the caches hold (batch * key heads
// * room, size). What is written to them MindSpore does not know of; nobody else may, in the same graph.
void forward_with_cache(const mindpeft::Arguments& arguments, bool first, int out) {
  const Problem problem(arguments, 4, 3);
  const int64_t heads = problem.batch * problem.key_heads, room = arguments.rows(6) / std::max<int64_t>(heads, 1);
  const int64_t place = first ? 0 : *arguments.at<int32_t>(8);
  put(problem.k, heads, problem.keys, problem.size, arguments.at(6), room, place);
  put(problem.v, heads, problem.keys, problem.value_size, arguments.at(7), room, place);
  const mindpeft::Shared logs(2 * problem.all_queries());
  attend_all(first ? problem : problem.on(arguments.at(6), arguments.at(7), room), arguments.at(out), logs.data());
}

}  // namespace

// q, k, v, settings, noise -> out, logs (2, batch, heads, length): each query's highest score, and the logarithm of the
// sum of exponentials of the scores' distances to it; and q, k, v and out to be kept
MINDPEFT_KERNEL(attention) { forward(arguments, 3, -1); }
// q, k, v, mask, settings, noise -> the same
MINDPEFT_KERNEL(masked_attention) { forward(arguments, 4, 3); }
// The first tokens of a text, which see each other -> out
MINDPEFT_KERNEL(attention_beginning_cache) { forward_with_cache(arguments, true, 8); }
// Later ones, which see all that is in the cache, where they stand from `place` on -> out
MINDPEFT_KERNEL(attention_with_cache) { forward_with_cache(arguments, false, 9); }
