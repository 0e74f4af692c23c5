#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace minimind::cpu {
namespace {

// The first word of Philox 4x32-10 (Salmon et al. 2011): key the seed, counter (offset low, offset high, 0, 0).
uint32_t philox(uint64_t seed, uint64_t offset) {
  uint32_t c[4] = {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(first)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9, k[1] += 0xBB67AE85;
  }
  return c[0];
}

double uniform(int64_t seed, int64_t offset) {  // in [0, 1), of 24 bits
  return (philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)) >> 8) * 0x1p-24;
}

// Penalties, then temperature; the greedy row keeps its own scale.
void scaled_logits(const SampleRow& row, std::vector<float>& out) {
  const float temperature = row.temperature > 0 ? row.temperature : 1.0f, factor = row.repetition_penalty;
  out.assign(row.logits, row.logits + row.vocab);
  if (factor != 1.0f || row.presence_penalty != 0.0f)
    for (int64_t i = 0; i < row.vocab; ++i)
      if (row.history[i] > 0) out[i] = (out[i] > 0 ? out[i] / factor : out[i] * factor) - row.presence_penalty;
  if (temperature != 1.0f)
    for (float& x : out) x /= temperature;
}

struct Candidate {
  float logit, mass;
};

// The least logit inside top-p: its betters have a mass below `wanted`. Quickselect by mass: linear in time on average,
// and equal logits stay or go as one.
float nucleus(std::vector<Candidate>& candidates, double wanted) {
  auto begin = candidates.begin(), end = candidates.end();
  double above = 0;
  float least = INFINITY;
  while (begin != end) {
    const float pivot = (begin + (end - begin) / 2)->logit;
    const auto equal = std::partition(begin, end, [&](Candidate c) { return c.logit > pivot; });
    const auto smaller = std::partition(equal, end, [&](Candidate c) { return c.logit == pivot; });
    double betters = above;
    for (auto i = begin; i != equal; ++i) betters += i->mass;
    if (betters >= wanted) {
      end = equal;
      continue;
    }
    least = pivot;
    above = betters;
    for (auto i = equal; i != smaller; ++i) above += i->mass;
    begin = smaller;
  }
  return least;
}

// The least logit that top-k, then top-p leave. masses: exp(logit - the largest).
float least_kept(const SampleRow& row, const std::vector<float>& logits, const std::vector<float>& masses) {
  thread_local std::vector<float> order;
  thread_local std::vector<Candidate> candidates;
  float least = -INFINITY;
  if (row.top_k > 0 && row.top_k < row.vocab) {
    order = logits;
    std::nth_element(order.begin(), order.begin() + (row.top_k - 1), order.end(), std::greater<float>());
    least = order[static_cast<size_t>(row.top_k) - 1];
  }
  if (!(row.top_p < 1)) return least;
  candidates.clear();
  double total = 0;
  for (size_t i = 0; i < logits.size(); ++i)
    if (logits[i] >= least) candidates.push_back({logits[i], masses[i]}), total += masses[i];
  return std::min(nucleus(candidates, row.top_p * total), *std::max_element(logits.begin(), logits.end()));
}

}  // namespace

Sampled sample_row(const SampleRow& row, const Kernels& kernels) {
  thread_local std::vector<float> logits, masses;
  scaled_logits(row, logits);
  masses.resize(logits.size());
  const auto best = std::max_element(logits.begin(), logits.end());  // the first of equals
  kernels.exponentials(logits.data(), *best, masses.data(), row.vocab);
  double all = 0;
  for (const float mass : masses) all += mass;
  const auto result = [&](int64_t token) {
    const auto logit = static_cast<double>(logits[static_cast<size_t>(token)]);
    return Sampled{token, static_cast<float>(logit - *best - std::log(all))};
  };
  if (!(row.temperature > 0) || !std::isfinite(all)) return result(best - logits.begin());

  const float least = least_kept(row, logits, masses);
  const auto mass_of = [&](size_t i) { return logits[i] >= least && masses[i] >= row.min_p ? masses[i] : 0.0f; };
  double total = 0, cumulative = 0;
  for (size_t i = 0; i < masses.size(); ++i) total += mass_of(i);
  const double drawn = uniform(row.seed, row.offset) * total;
  for (size_t i = 0; i < masses.size(); ++i) {
    cumulative += mass_of(i);
    if (cumulative > drawn) return result(static_cast<int64_t>(i));
  }
  return result(best - logits.begin());
}

}  // namespace minimind::cpu
