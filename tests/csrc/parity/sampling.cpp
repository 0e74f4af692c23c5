// Sampling: its vector functions, and what it draws.
#include "../../../csrc/cpu/sample.h"
#include "reference.h"

namespace parity {

void sampling() {
  Random random(3);
  for (int64_t n : {1, 3, 4, 15, 16, 17, 255, 257, 1003}) {
    const Floats x = random.normals(n, 5);
    const float best = *std::max_element(x.begin(), x.end());
    const auto blocks = static_cast<size_t>((n + kSumOver - 1) / kSumOver);
    for (const Form& form : usable()) {
      const char* of = form.table->name;
      expect(form.table->largest(x.data(), n) == best, "%s: the largest of %ld", of, long(n));
      Floats masses(x.size() + 1, -1.0f);
      Doubles sums(blocks);
      form.table->masses(x.data(), best, masses.data(), sums.data(), n);
      const auto compare_sums = [&] {
        for (size_t block = 0; block < blocks; ++block) {
          double sum = 0;
          for (size_t i = block * kSumOver; i < std::min(x.size(), (block + 1) * kSumOver); ++i) sum += masses[i];
          expect(std::fabs(sums[block] - sum) <= kSumOver * 0x1p-53 * sum, "%s: sum %zu of %ld masses", of, block,
                 long(n));
        }
      };
      for (size_t i = 0; i < x.size(); ++i) {
        const float from = x[i] - best;
        const double truth = std::exp(static_cast<double>(from));
        expect(std::fabs(masses[i] - truth) <= 2 * kEps * truth, "%s: exp(%g) is %g", of, from, masses[i]);
      }
      compare_sums();
      const Floats before = masses;
      const float least = x[x.size() / 2], min_mass = before[x.size() / 3];
      form.table->keep(x.data(), least, min_mass, masses.data(), sums.data(), n);
      for (size_t i = 0; i < x.size(); ++i)
        expect(masses[i] == (x[i] >= least && before[i] >= min_mass ? before[i] : 0), "%s: mass %zu of %ld is %g", of,
               i, long(n), masses[i]);
      compare_sums();
      expect(masses.back() == -1, "%s: wrote beyond %ld masses", of, long(n));
    }
  }
  const int64_t vocab = 1003;
  const Floats logits = random.normals(vocab, 3);
  std::vector<int32_t> history(static_cast<size_t>(vocab));
  for (size_t i = 0; i < history.size(); i += 7) history[i] = 1;
  for (int64_t seed = 0; seed < 24; ++seed) {
    const bool all = seed % 3 == 0;
    const SampleRow row{logits.data(),
                        history.data(),
                        vocab,
                        0.25f * static_cast<float>(seed % 5),
                        all ? 1.0f : 0.8f,
                        all ? 0.0f : 0.01f,
                        1.1f,
                        0.2f,
                        all ? 0 : 50,
                        seed,
                        2 * seed};
    const Sampled expected = sample_row(row, *usable().back().table);
    for (const Form& form : usable()) {
      const Sampled drawn = sample_row(row, *form.table);
      expect(drawn.token == expected.token &&
                 std::fabs(drawn.log_prob - expected.log_prob) <= 8 * kEps * std::fabs(expected.log_prob),
             "%s: seed %ld drew token %ld (%g), generic %ld (%g)", form.table->name, long(seed), long(drawn.token),
             drawn.log_prob, long(expected.token), expected.log_prob);
    }
  }
}

}  // namespace parity
