// GELU, SiLU and the sigmoid, and the gated units of feed-forward layers: act(gate) * up.
#include <type_traits>

#include "elementwise.h"

namespace {

using mindpeft::each;
using mindpeft::number;

struct ExactGelu {
  static float value(float x) { return x * share(x); }
  static float slope(float x) {
    return share(x) + x * 0.3989422804f * mindpeft::exponential(-0.5f * x * x);
  }

 private:
  static float share(float x) { return 0.5f + 0.5f * mindpeft::error_function(x * 0.7071067812f); }
};

struct TanhGelu {
  static float value(float x) { return x * share(x); }
  static float slope(float x) {
    const float s = share(x);
    return s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
  }

 private:
  // (1 + tanh z) / 2 = sigmoid(2 z)
  static float share(float x) { return mindpeft::sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }
};

struct Silu {
  static float value(float x) { return x * mindpeft::sigmoid(x); }
  static float slope(float x) {
    const float s = mindpeft::sigmoid(x);
    return s + x * s * (1.0f - s);
  }
};

struct QuickGelu {
  static float value(float x) { return x * mindpeft::sigmoid(kFactor * x); }
  static float slope(float x) {
    const float s = mindpeft::sigmoid(kFactor * x);
    return s + kFactor * x * s * (1.0f - s);
  }

 private:
  static constexpr float kFactor = 1.702f;
};

struct Sigmoid {
  static float value(float x) { return mindpeft::sigmoid(x); }
  static float slope(float x) {
    const float s = mindpeft::sigmoid(x);
    return s * (1.0f - s);
  }
};

// The inputs are kept for the backward pass, if the call asks for it: as outputs more, in bfloat16s.
void keep_inputs(const mindpeft::Arguments& arguments, int inputs) {
  for (int input = 0, output = inputs + 1; output < arguments.count(); ++input, ++output) {
    mindpeft::keep(arguments.size(0), arguments.at(input), arguments.at<mindpeft::bfloat16>(output));
  }
}

// x -> y, and x to be kept
template <typename Activation>
void activate(const mindpeft::Arguments& arguments) {
  each(arguments.size(0), arguments.at(1), [](float x) { return Activation::value(x); }, arguments.at(0));
  keep_inputs(arguments, 1);
}

// x, in floats or bfloat16s, dy -> dx
template <typename Activation>
void activate_grad(const mindpeft::Arguments& arguments) {
  arguments.read(0, [&](const auto* x) {
    each(arguments.size(0), arguments.at(2), [](auto x, float dy) { return Activation::slope(number(x)) * dy; }, x,
         arguments.at(1));
  });
}

// gate, up -> y, and both to be kept
template <typename Activation>
void gate(const mindpeft::Arguments& arguments) {
  each(arguments.size(0), arguments.at(2), [](float x, float up) { return Activation::value(x) * up; },
       arguments.at(0), arguments.at(1));
  keep_inputs(arguments, 2);
}

// gate and up, in floats or bfloat16s, dy -> dgate, dup
template <typename Activation>
void gate_grad(const mindpeft::Arguments& arguments) {
  arguments.read(0, [&](const auto* x) {
    const auto* up = arguments.at<std::remove_pointer_t<decltype(x)>>(1);
    const float* dy = arguments.at(2);
    float *dgate = arguments.at(3), *dup = arguments.at(4);
    mindpeft::in_parallel(arguments.size(0), mindpeft::kLeastNumbers, [=](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        dgate[i] = Activation::slope(number(x[i])) * number(up[i]) * dy[i];
        dup[i] = Activation::value(number(x[i])) * dy[i];
      }
    });
  });
}

}  // namespace

MINDPEFT_KERNEL(gelu) { activate<ExactGelu>(arguments); }
MINDPEFT_KERNEL(gelu_grad) { activate_grad<ExactGelu>(arguments); }
MINDPEFT_KERNEL(tanh_gelu) { activate<TanhGelu>(arguments); }
MINDPEFT_KERNEL(tanh_gelu_grad) { activate_grad<TanhGelu>(arguments); }
MINDPEFT_KERNEL(silu) { activate<Silu>(arguments); }
MINDPEFT_KERNEL(silu_grad) { activate_grad<Silu>(arguments); }
MINDPEFT_KERNEL(quick_gelu) { activate<QuickGelu>(arguments); }
MINDPEFT_KERNEL(quick_gelu_grad) { activate_grad<QuickGelu>(arguments); }
MINDPEFT_KERNEL(sigmoid) { activate<Sigmoid>(arguments); }
MINDPEFT_KERNEL(sigmoid_grad) { activate_grad<Sigmoid>(arguments); }
MINDPEFT_KERNEL(gelu_gate) { gate<ExactGelu>(arguments); }
MINDPEFT_KERNEL(gelu_gate_grad) { gate_grad<ExactGelu>(arguments); }
MINDPEFT_KERNEL(tanh_gelu_gate) { gate<TanhGelu>(arguments); }
MINDPEFT_KERNEL(tanh_gelu_gate_grad) { gate_grad<TanhGelu>(arguments); }
MINDPEFT_KERNEL(silu_gate) { gate<Silu>(arguments); }
MINDPEFT_KERNEL(silu_gate_grad) { gate_grad<Silu>(arguments); }
MINDPEFT_KERNEL(quick_gelu_gate) { gate<QuickGelu>(arguments); }
MINDPEFT_KERNEL(quick_gelu_gate_grad) { gate_grad<QuickGelu>(arguments); }
MINDPEFT_KERNEL(sigmoid_gate) { gate<Sigmoid>(arguments); }
MINDPEFT_KERNEL(sigmoid_gate_grad) { gate_grad<Sigmoid>(arguments); }
