// Products of packed weights, and the rounding of activations to 8 bits.
#include "reference.h"

namespace parity {

namespace {

const char* name(Weights type) { return type == kFloat ? "float32" : type == kBf16 ? "bfloat16" : "8 bits"; }

// What x [B, K] becomes as factors of these weights.
Doubles rounded(Weights type, const Floats& x, int64_t batch, int64_t k) {
  Doubles out(x.begin(), x.end());
  for (size_t i = 0; type == kBf16 && i < x.size(); ++i) out[i] = bf16_of(x[i]);
  for (int64_t row = 0; type == kInt8 && row < batch; ++row)
    for (int64_t first = 0; first < k; first += kGroup) {
      const auto begin = static_cast<size_t>(row * k + first),
                 end = begin + static_cast<size_t>(std::min<int64_t>(kGroup, k - first));
      float largest = 0;
      for (size_t i = begin; i < end; ++i) largest = std::fmax(largest, std::fabs(x[i]));
      for (size_t i = begin; i < end; ++i)
        out[i] = largest > 0 ? static_cast<double>(std::nearbyint(x[i] * (127 / largest))) * (largest / 127) : 0;
    }
  return out;
}

}  // namespace

void products() {
  const int64_t cases[][3] = {{1, 16, 64}, {1, 40, 130}, {2, 1, 1},    {3, 37, 70},   {4, 48, 5},   {5, 17, 192},
                              {6, 64, 66}, {7, 33, 3},   {8, 64, 512}, {9, 16, 1408}, {19, 24, 45}, {16, 32, 258}};
  Random random(1);
  for (const auto& [batch, n, k] : cases)
    for (Weights type : {kFloat, kBf16, kInt8}) {
      const Packed w = pack(type, random.normals(n * k), n, k);
      const Floats x = random.normals(batch * k);
      const Doubles factors = rounded(type, x, batch, k);
      Floats first;
      for (const Form& form : usable()) {
        Floats out(static_cast<size_t>(batch * n), NAN), alone(static_cast<size_t>(n));
        form.multiply(type, w.bytes.data(), w.k_size, n, x.data(), k, batch, out.data());
        // A product and a sum for each number of an accumulator (a group of 8 bits), then the accumulators' sum or the
        // row's scale. Instructions of pairs cut off instead of rounding.
        const double roundings =
            type == kInt8 ? static_cast<double>(w.k_size) / kGroup + 2 : static_cast<double>(w.k_size) + 2;
        const double unit = type == kBf16 && form.pairs ? kEps : kEps / 2;
        for (int64_t b = 0; b < batch; ++b)
          for (int64_t row = 0; row < n; ++row) {
            double truth = 0, magnitude = 0;
            for (int64_t i = 0; i < k; ++i) {
              const double term = w.values[static_cast<size_t>(row * k + i)] * factors[static_cast<size_t>(b * k + i)];
              truth += term, magnitude += std::fabs(term);
            }
            const double error = std::fabs(out[static_cast<size_t>(b * n + row)] - truth);
            expect(error <= 1.01 * unit * roundings * magnitude,
                   "%s: product of %s [%ld, %ld] x [%ld, %ld]: output %ld, %ld is off by %g", form.table->name,
                   name(type), long(batch), long(k), long(n), long(k), long(b), long(row), error);
          }
        for (int64_t b = 0; b < batch; ++b) {
          form.multiply(type, w.bytes.data(), w.k_size, n, x.data() + b * k, k, 1, alone.data());
          expect(std::memcmp(alone.data(), out.data() + b * n, sizeof(float) * static_cast<size_t>(n)) == 0,
                 "%s: product of %s: row %ld of %ld is not the same bits alone", form.table->name, name(type), long(b),
                 long(batch));
        }
        // one group: an exact sum, the same in every form
        if (first.empty()) first = out;
        if (type == kInt8 && k <= kGroup)
          expect(out == first, "%s: the product of one group is not that of the other forms", form.table->name);
      }
    }
}

void integers() {
  Random random(2);
  for (int64_t k : {1, 3, 63, 64, 70, 200}) {
    Floats x = random.normals(k, 0.37f);
    if (k == 64)
      for (int64_t i = 0; i < k; ++i)
        x[static_cast<size_t>(i)] = i == 0 ? 127.0f : static_cast<float>(i - 32) + 0.5f;  // halves
    const int64_t groups = packed_k8(k) / kGroup;
    for (const Form& form : usable()) {
      std::vector<int32_t> made(static_cast<size_t>(groups * kGroup), -1);
      Floats scales(static_cast<size_t>(groups), NAN);
      form.quantize(x.data(), k, made.data(), scales.data());
      for (int64_t g = 0; g < groups; ++g) {
        float largest = 0;
        const auto at = [&](int64_t i) { return g * kGroup + i < k ? x[static_cast<size_t>(g * kGroup + i)] : 0.0f; };
        for (int i = 0; i < kGroup; ++i) largest = std::fmax(largest, std::fabs(at(i)));
        expect(scales[static_cast<size_t>(g)] == largest / 127, "%s: the scale of a group", form.table->name);
        for (int i = 0; i < kGroup; ++i)
          expect(made[static_cast<size_t>(g * kGroup + i)] == std::nearbyint(at(i) * (127 / largest)),
                 "%s: integer %d of a row of %ld", form.table->name, i, long(k));
      }
      Floats strange(64, 1.0f);
      for (float bad : {INFINITY, -INFINITY, NAN}) {
        strange[37] = bad;
        form.quantize(strange.data(), 64, made.data(), scales.data());
        expect(!std::isfinite(scales[0]), "%s: what is no number gave the scale %g", form.table->name, scales[0]);
      }
    }
  }
  for (float sign : {1.0f, -1.0f}) {  // the largest sums
    Floats w(16 * 128, 127.0f), x(9 * 128, sign * 127.0f);
    for (size_t i = 0; i < w.size(); i += 2) w[i] = -127;
    for (size_t i = 0; i < x.size(); i += 2) x[i] *= -1;
    const Packed packed = pack(kInt8, w, 16, 128);
    for (const Form& form : usable()) {
      Floats out(9 * 16);
      form.multiply(kInt8, packed.bytes.data(), 128, 16, x.data(), 128, 9, out.data());
      for (float y : out) expect(y == sign * 128 * 127 * 127, "%s: the largest sum is %g", form.table->name, y);
    }
  }
}

}  // namespace parity
