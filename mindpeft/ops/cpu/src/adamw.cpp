// One update of all trained parameters: the gradients' norm, clipping, AdamW (Loshchilov and Hutter, 2019).
#include <cmath>
#include <vector>

#include "arguments.h"
#include "threads.h"

namespace {

constexpr int64_t kPiece = 16384;
constexpr float kClipEps = 1e-6f;  // which torch adds to the norm

// A piece of one parameter, and where it is among all of them.
struct Piece {
  int parameter;
  int64_t begin, end, place;
};

std::vector<Piece> pieces_of(const mindpeft::Arguments& arguments, int parameters) {
  std::vector<Piece> pieces;
  int64_t place = 0;
  for (int i = 0; i < parameters; ++i) {
    const int64_t size = arguments.size(i);
    for (int64_t begin = 0; begin < size; begin += kPiece) {
      pieces.push_back({i, begin, std::min(size, begin + kPiece), place + begin});
    }
    place += size;
  }
  return pieces;
}

double norm_of(const mindpeft::Arguments& arguments, const std::vector<Piece>& pieces) {
  std::vector<double> squares(pieces.size());
  mindpeft::run_tasks(pieces.size(), [&](int64_t number) {
    const Piece& piece = pieces[number];
    const float* gradient = arguments.at(piece.parameter);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = piece.begin; i < piece.end; ++i) sum += double(gradient[i]) * double(gradient[i]);
    squares[number] = sum;
  });
  double sum = 0;
  for (const double value : squares) sum += value;
  return std::sqrt(sum);
}

// The numbers of one update.
struct Step {
  float beta1, beta2, eps, factor, learning_rate, step_size, root_scale;
};

void update(const Step& step, float decay, float rate, const float* gradients, float* values, float* exp_avg,
            float* exp_avg_sq, int64_t count) {
  const float kept = 1.0f - step.learning_rate * rate * decay, size = step.step_size * rate;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = gradients[i] * step.factor;
    exp_avg[i] = exp_avg[i] * step.beta1 + gradient * (1.0f - step.beta1);
    exp_avg_sq[i] = exp_avg_sq[i] * step.beta2 + gradient * gradient * (1.0f - step.beta2);
    values[i] = values[i] * kept - exp_avg[i] * size / (std::sqrt(exp_avg_sq[i]) * step.root_scale + step.eps);
  }
}

}  // namespace

// The gradients of n parameters, the parameters, both moments of all (total), learning rate, step size, root scale,
// settings (4 + 2 n: both betas, eps, norm to clip to or 0, every parameter's decay, every one's rate), the loss ->
// norm (1), the factor that clips (1).
// Parameters and moments are written where they are, unknown to MindSpore: whoever reads them in the same graph
// must come before one of the gradients or the loss, or after the norm. A norm that is not finite changes nothing.
MINDPEFT_KERNEL(adamw) {
  const int parameters = (arguments.count() - 9) / 2, rest = 2 * parameters;
  const float* settings = arguments.at(rest + 5);
  const auto pieces = pieces_of(arguments, parameters);
  const float norm = static_cast<float>(norm_of(arguments, pieces)), most = settings[3];
  const float factor = most > 0 ? std::fmin(1.0f, most / (norm + kClipEps)) : 1.0f;
  *arguments.at(rest + 7) = norm;
  *arguments.at(rest + 8) = factor;
  if (!std::isfinite(norm)) return;
  const Step step{settings[0], settings[1], settings[2], factor, *arguments.at(rest + 2), *arguments.at(rest + 3),
                  *arguments.at(rest + 4)};
  const float *decays = settings + 4, *rates = decays + parameters;
  mindpeft::run_tasks(pieces.size(), [&](int64_t number) {
    const Piece& piece = pieces[number];
    const int i = piece.parameter;
    update(step, decays[i], rates[i], arguments.at(i) + piece.begin, arguments.at(parameters + i) + piece.begin,
           arguments.at(rest) + piece.place, arguments.at(rest + 1) + piece.place, piece.end - piece.begin);
  });
}
