// AdaLoRA (Zhang et al., 2023): the term that keeps A and B orthogonal, and the pruning after an update.
#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "threads.h"

namespace {

using mindpeft::Arguments;
using mindpeft::Matrix;

// The A (room, width) or B (width, room) of a layer, of which the first `rank` rows, or columns, are in use.
struct Factor {
  const float* data;
  bool is_a;
  int64_t rank, room, width;

  // Tensors are A and B in turn.
  Factor(const Arguments& arguments, int tensor, float rank)
      : data(arguments.at(tensor)), is_a(tensor % 2 == 0), rank(static_cast<int64_t>(rank)),
        room(arguments.axis(tensor, is_a ? 0 : 1)), width(arguments.axis(tensor, is_a ? 1 : 0)) {}

  // A, or the transpose of B: (rank, width)
  Matrix rows() const { return Matrix(data, is_a ? width : room, !is_a); }
  Matrix columns() const { return Matrix(data, is_a ? width : room, is_a); }

  // A A^T or B^T B, less the identity.
  std::vector<float> difference() const {
    std::vector<float> square(rank * rank);
    if (rank > 0) mindpeft::multiply(rank, rank, width, 1.0f, rows(), columns(), 0.0f, square.data(), rank);
    for (int64_t i = 0; i < rank; ++i) square[i * rank + i] -= 1.0f;
    return square;
  }
};

float norm_of(const std::vector<float>& values) {
  double sum = 0;
  for (const float value : values) sum += double(value) * double(value);
  return static_cast<float>(std::sqrt(sum));
}

// The gradient of the norm of a factor's difference, times `scale`; zeros for what is not in use.
void norm_gradient(const Factor& factor, float scale, float* result) {
  std::fill(result, result + factor.room * factor.width, 0.0f);
  const std::vector<float> difference = factor.difference();
  const float norm = norm_of(difference);
  if (norm == 0.0f) return;
  const int64_t rank = factor.rank, width = factor.width;
  const Matrix square(difference.data(), rank);
  if (factor.is_a) {
    mindpeft::multiply(rank, width, rank, 2.0f * scale / norm, square, factor.rows(), 0.0f, result, width);
  } else {
    mindpeft::multiply(width, rank, rank, 2.0f * scale / norm, factor.columns(), square, 0.0f, result, factor.room);
  }
}

}  // namespace

// A and B of n layers in turn, settings (1 + n: weight, ranks in use) -> the sum of their distances from
// orthogonality, times weight (1)
MINDPEFT_KERNEL(adalora_penalty) {
  const int factors = arguments.count() - 2;
  const float* settings = arguments.at(factors);
  std::vector<float> norms(factors);
  mindpeft::run_tasks(factors, [&](int64_t i) {
    norms[i] = norm_of(Factor(arguments, i, settings[1 + i / 2]).difference());
  });
  double sum = 0;
  for (const float norm : norms) sum += norm;
  *arguments.at(factors + 1) = static_cast<float>(sum * settings[0]);
}

// The same inputs, the gradient of the sum (1) -> those of all As and Bs
MINDPEFT_KERNEL(adalora_penalty_grad) {
  const int factors = arguments.count() / 2 - 1;
  const float* settings = arguments.at(factors);
  const float scale = settings[0] * *arguments.at(factors + 1);
  mindpeft::run_tasks(factors, [&](int64_t i) {
    norm_gradient(Factor(arguments, i, settings[1 + i / 2]), scale, arguments.at(factors + 2 + i));
  });
}

namespace {

// How much the importance of one number, |value * gradient|, is smoothed, and its uncertainty; whether at all.
struct Smoothing {
  float beta1, beta2, factor;
  bool counts;

  // Returns the score.
  float operator()(float value, float gradient, float* importance, float* uncertainty) const {
    if (counts) {
      const float now = std::fabs(value * gradient * factor);
      *importance = *importance * beta1 + now * (1.0f - beta1);
      *uncertainty = *uncertainty * beta2 + std::fabs(now - *importance) * (1.0f - beta2);
    }
    return *importance * *uncertainty;
  }
};

// Where the tensors of a layer are: A (room, in), E (room, 1), B (out, room), and what is kept of them, which has
// room for the ranks in use alone.
struct Layer {
  const float *a, *b, *da, *de, *db;
  float *e, *importance, *uncertainty;
  int64_t rank, room, in, out;

  int64_t size() const { return rank * (in + 1 + out); }

  // The scores of the triplets: of A's row on the average, of E, of B's column on the average.
  void score(const Smoothing& smooth, float* scores) const {
    int64_t place = 0;
    for (int64_t i = 0; i < rank; ++i) scores[i] = 0.0f;
    for (int64_t i = 0; i < rank; ++i) {
      double sum = 0;
      for (int64_t j = i * in; j < (i + 1) * in; ++j, ++place) {
        sum += smooth(a[j], da[j], importance + place, uncertainty + place);
      }
      scores[i] += static_cast<float>(sum / in);
    }
    std::vector<double> sums(rank, 0.0);
    float *values = importance + place + rank, *spreads = uncertainty + place + rank;
    for (int64_t row = 0; row < out; ++row) {
      for (int64_t i = 0; i < rank; ++i, ++values, ++spreads) {
        sums[i] += smooth(b[row * room + i], db[row * room + i], values, spreads);
      }
    }
    for (int64_t i = 0; i < rank; ++i, ++place) {
      scores[i] += static_cast<float>(sums[i] / out);
      scores[i] += smooth(e[i], de[i], importance + place, uncertainty + place);
    }
  }
};

// 1 for each triplet but the `number` least important ones.
void choose(const std::vector<float>& scores, int64_t number, float* kept) {
  std::vector<float> ordered = scores;
  if (number > 0) std::nth_element(ordered.begin(), ordered.begin() + number - 1, ordered.end());
  for (size_t i = 0; i < scores.size(); ++i) {
    kept[i] = number <= 0 || scores[i] > ordered[number - 1] ? 1.0f : 0.0f;
  }
}

}  // namespace

// The gradients of n layers' A, E and B, these themselves, importances (all numbers in use), uncertainties (the same),
// kept (triplets), triplets to prune (updates up to the last pruning, from 0; int32, -1: no pruning), update (int32),
// the norm and the factor that clips of `adamw`, settings (2 + n: both betas, ranks in use) -> the norm (1).
// E, importances, uncertainties and kept are written where they are, unknown to MindSpore.
MINDPEFT_KERNEL(adalora_prune) {
  const int layers = (arguments.count() - 9) / 6, rest = 6 * layers;
  float *kept = arguments.at(rest + 2), norm = *arguments.at(rest + 5);
  const float* settings = arguments.at(rest + 7);
  *arguments.at(rest + 8) = norm;
  if (!std::isfinite(norm)) return;
  const int64_t last = arguments.size(rest + 3) - 1, update = *arguments.at<int32_t>(rest + 4);
  const int64_t number = arguments.at<int32_t>(rest + 3)[std::min(update, last)];
  const Smoothing smooth{settings[0], settings[1], *arguments.at(rest + 6), update < last};

  std::vector<Layer> all;
  std::vector<int64_t> starts{0};
  int64_t place = 0;
  for (int i = 0; i < layers; ++i) {
    const int mine = 3 * i, values = 3 * (layers + i);
    all.push_back({arguments.at(values), arguments.at(values + 2), arguments.at(mine), arguments.at(mine + 1),
                   arguments.at(mine + 2), arguments.at(values + 1), arguments.at(rest) + place,
                   arguments.at(rest + 1) + place, static_cast<int64_t>(settings[2 + i]),
                   arguments.axis(values, 0), arguments.axis(values, 1), arguments.axis(values + 2, 0)});
    place += all.back().size();
    starts.push_back(starts.back() + all.back().rank);
  }
  std::vector<float> scores(starts.back());
  mindpeft::run_tasks(layers, [&](int64_t i) { all[i].score(smooth, scores.data() + starts[i]); });
  if (number < 0) return;
  if (update <= last || kept[0] < 0) choose(scores, number, kept);
  for (int i = 0; i < layers; ++i) {
    for (int64_t j = 0; j < all[i].rank; ++j) all[i].e[j] *= kept[starts[i] + j];
  }
}
