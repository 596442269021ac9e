// The two loops that PyTorch cannot run at the machine's speed: an LSTM's recurrence, and words to Gaussians. Knows arrays alone.
//
// Both are written in torch beside this too (rules/recurrent.py, noise.py), which is what the tests hold them against, and what
// runs where there is no compiler.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <ATen/cpu/vec/vec.h>

namespace {

using Vec = at::vec::Vectorized<float>;
using Words = at::vec::Vectorized<int32_t>;

constexpr int WIDTH = Vec::size();
constexpr int COLUMNS = 2 * WIDTH;           // of a product, kept in registers at once
constexpr int ROWS = WIDTH >= 16 ? 8 : 4;    // likewise

// out [R, columns] = left [R, inner] @ right [inner, columns]; `columns` is a multiple of COLUMNS, left's rows are `apart` apart.
template <int R>
void product(const float* left, int64_t apart, const float* right, int64_t inner, int64_t columns, float* out) {
  for (int64_t column = 0; column < columns; column += COLUMNS) {
    Vec sum[R][2];
    for (auto& row : sum) row[0] = row[1] = Vec(0);
    for (int64_t k = 0; k < inner; ++k) {
      const float* at = right + k * columns + column;
      Vec first = Vec::loadu(at), second = Vec::loadu(at + WIDTH);
      for (int r = 0; r < R; ++r) {
        Vec value(left[r * apart + k]);
        sum[r][0] = at::vec::fmadd(value, first, sum[r][0]);
        sum[r][1] = at::vec::fmadd(value, second, sum[r][1]);
      }
    }
    for (int r = 0; r < R; ++r) {
      sum[r][0].store(out + r * columns + column);
      sum[r][1].store(out + r * columns + column + WIDTH);
    }
  }
}

using Product = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*);
constexpr Product PRODUCTS[] = {nullptr,    product<1>, product<2>, product<3>, product<4>,
                                product<5>, product<6>, product<7>, product<8>};

// Run `block(from, rows)` over equal blocks of at most ROWS of n rows, as many for each thread. Rows are independent of each other.
template <class Block>
void over_rows(int64_t n, Block block) {
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads();
    int64_t each = (n + threads * ROWS - 1) / (threads * ROWS), blocks = threads * each;
    for (int64_t b = omp_get_thread_num() * each, end = b + each; b < end; ++b) {
      int64_t from = n * b / blocks, to = n * (b + 1) / blocks;
      if (to > from) block(from, static_cast<int>(to - from));
    }
  }
}

Vec sigmoid(Vec x) { return Vec(1) / (Vec(1) + x.neg().exp_u20()); }

Vec tanh(Vec x) { return sigmoid(x * Vec(2)) * Vec(2) - Vec(1); }

template <size_t N>
Vec polynomial(Vec x, const float (&coefficients)[N]) {
  Vec value(coefficients[N - 1]);
  for (int k = N - 2; k >= 0; --k) value = at::vec::fmadd(value, x, Vec(coefficients[k]));
  return value;
}

// sin(pi x / 2) / x and cos(pi x / 2) as polynomials of x^2, least squares at Chebyshev points of [-1, 1]: to 1e-7.
constexpr float SINE[] = {1.5707963267943035f,     -0.6459640974841672f,    0.07969262600749774f,   -0.004681752997338791f,
                          0.00016043839755897933f, -3.59518222854544e-06f, 5.4464412500110165e-08f};
constexpr float COSINE[] = {0.9999999999992514f,    -1.2337005500626559f,     0.25366950672307426f,  -0.02086347368385295f,
                            0.000919240001178927f, -2.5172196439612985e-05f, 4.4922018692639123e-07f};

}  // namespace

// What the last dimension of a weight is filled up to a multiple of.
extern "C" int product_columns() { return COLUMNS; }

// came_in [n, T, 4h] -> gates [n, T, 4h] (i, f, g, o, squashed), hiddens and cells [n, T + 1, h] whose first steps are given,
// squashed [n, T, h] = tanh of the cells after each step. weight [h, 4, padded]: transposed, each gate filled up with zeros.
extern "C" void lstm_forward(const float* came_in, const float* weight, float* gates, float* hiddens, float* cells,
                             float* squashed, int64_t n, int64_t steps, int64_t h, int64_t padded) {
  over_rows(n, [=](int64_t from, int rows) {
    std::vector<float> recurrent(rows * 4 * padded);
    for (int64_t t = 0; t < steps; ++t) {
      PRODUCTS[rows](hiddens + (from * (steps + 1) + t) * h, (steps + 1) * h, weight, h, 4 * padded, recurrent.data());
      for (int64_t row = from; row < from + rows; ++row) {
        const float* entering = came_in + (row * steps + t) * 4 * h;
        const float* more = recurrent.data() + (row - from) * 4 * padded;
        float* gate = gates + (row * steps + t) * 4 * h;
        float* cell = cells + (row * (steps + 1) + t) * h;
        float* hidden = hiddens + (row * (steps + 1) + t + 1) * h;
        for (int64_t at = 0; at < h; at += WIDTH) {
          int64_t count = std::min<int64_t>(WIDTH, h - at);
          auto sum = [&](int which) {
            return Vec::loadu(entering + which * h + at, count) + Vec::loadu(more + which * padded + at);
          };
          Vec i = sigmoid(sum(0)), f = sigmoid(sum(1)), g = tanh(sum(2)), o = sigmoid(sum(3));
          Vec next = f * Vec::loadu(cell + at, count) + i * g, squash = tanh(next);
          i.store(gate + at, count);
          f.store(gate + h + at, count);
          g.store(gate + 2 * h + at, count);
          o.store(gate + 3 * h + at, count);
          next.store(cell + h + at, count);
          squash.store(squashed + (row * steps + t) * h + at, count);
          (o * squash).store(hidden + at, count);
        }
      }
    }
  });
}

// What came back to the outputs [n, T, h] -> back [n, T, 4h], what came back to the gates before they were squashed. at_hidden
// [n, h] is what came back to the first hidden state; at_cell [n, h] holds what came back to the last cell and leaves with the
// first's. weight [4h, padded]: filled up with zeros.
extern "C" void lstm_backward(const float* at_outputs, const float* weight, const float* gates, const float* cells,
                              const float* squashed, float* back, float* at_hidden, float* at_cell, int64_t n, int64_t steps,
                              int64_t h, int64_t padded) {
  over_rows(n, [=](int64_t from, int rows) {
    std::vector<float> carried(rows * padded);
    for (int64_t t = steps - 1; t >= 0; --t) {
      for (int64_t row = from; row < from + rows; ++row) {
        const float* gate = gates + (row * steps + t) * 4 * h;
        float* out = back + (row * steps + t) * 4 * h;
        for (int64_t at = 0; at < h; at += WIDTH) {
          int64_t count = std::min<int64_t>(WIDTH, h - at);
          Vec one(1);
          Vec i = Vec::loadu(gate + at, count), f = Vec::loadu(gate + h + at, count);
          Vec g = Vec::loadu(gate + 2 * h + at, count), o = Vec::loadu(gate + 3 * h + at, count);
          Vec before = Vec::loadu(cells + (row * (steps + 1) + t) * h + at, count);
          Vec squash = Vec::loadu(squashed + (row * steps + t) * h + at, count);
          Vec hidden = Vec::loadu(at_outputs + (row * steps + t) * h + at, count) +
                       Vec::loadu(carried.data() + (row - from) * padded + at);
          Vec cell = Vec::loadu(at_cell + row * h + at, count) + hidden * o * (one - squash * squash);
          (cell * g * i * (one - i)).store(out + at, count);
          (cell * before * f * (one - f)).store(out + h + at, count);
          (cell * i * (one - g * g)).store(out + 2 * h + at, count);
          (hidden * squash * o * (one - o)).store(out + 3 * h + at, count);
          (cell * f).store(at_cell + row * h + at, count);
        }
      }
      PRODUCTS[rows](back + (from * steps + t) * 4 * h, steps * 4 * h, weight, 4 * h, padded, carried.data());
    }
    for (int r = 0; r < rows; ++r) std::copy_n(carried.data() + r * padded, h, at_hidden + (from + r) * h);
  });
}

// words [2, 8, groups] -> out [2, 4, groups]: the draws that noise.py describes, of standard deviation `std`.
extern "C" void gaussians(const int32_t* words, float* out, int64_t groups, float std) {
  const float unit = -(1.f - 1.f / (1 << 24)) / (1u << 31), scale = -2 * std::log(2.f) * (std / 2) * (std / 2);
#pragma omp parallel for
  for (int64_t at = 0; at < groups; at += WIDTH) {
    int64_t count = std::min<int64_t>(WIDTH, groups - at);
    Vec halves[2][8];
    for (int k = 0; k < 8; ++k) {
      Words radius_words = Words::loadu(words + k * groups + at, count) | Words(INT32_MIN + 1);
      Words angle = Words::loadu(words + (8 + k) * groups + at, count), doubled = angle << Words(1);
      Vec radius = ((at::vec::convert<float>(radius_words) * Vec(unit)).log2() * Vec(scale)).sqrt();
      // The angle in units of pi / 2, taken modulo 2; where that moved it by half a turn, both coordinates change their sign.
      Vec x = at::vec::convert<float>(doubled) * Vec(1.f / (1u << 31)), square = x * x;
      radius = radius ^ at::vec::cast<float>((angle ^ doubled) & Words(INT32_MIN));
      halves[0][k] = polynomial(square, COSINE) * radius;
      halves[1][k] = polynomial(square, SINE) * x * radius;
    }
    for (int half = 0; half < 2; ++half) {
      const Vec *a = halves[half], *b = a + 4;
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          Vec first = i ? a[j] - a[2 + j] : a[j] + a[2 + j];
          Vec second = j ? b[2 * i] - b[2 * i + 1] : b[2 * i] + b[2 * i + 1];
          (first + second).store(out + (4 * half + 2 * i + j) * groups + at, count);
        }
      }
    }
  }
}
