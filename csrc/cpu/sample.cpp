#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
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

// Penalties, then temperature; the greedy row keeps its own scale. `room` is for logits that differ from the row's.
const float* scaled_logits(const SampleRow& row, std::vector<float>& room) {
  const float temperature = row.temperature > 0 ? row.temperature : 1.0f, factor = row.repetition_penalty;
  const bool penalised = factor != 1.0f || row.presence_penalty != 0.0f;
  if (!penalised && temperature == 1.0f) return row.logits;
  room.assign(row.logits, row.logits + row.vocab);
  if (penalised)
    for (int64_t i = 0; i < row.vocab; ++i)
      if (row.history[i] > 0) room[i] = (room[i] > 0 ? room[i] / factor : room[i] * factor) - row.presence_penalty;
  if (temperature != 1.0f)
    for (float& x : room) x /= temperature;
  return room.data();
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

// The least logit that top-k, then top-p leave. masses: exp(logit - best), best being the largest logit; all: their sum.
float least_kept(const SampleRow& row, const float* logits, const float* masses, float best, double all) {
  thread_local std::vector<float> order;
  thread_local std::vector<Candidate> candidates;
  float least = -INFINITY;
  if (row.top_k > 0 && row.top_k < row.vocab) {
    order.assign(logits, logits + row.vocab);
    std::nth_element(order.begin(), order.begin() + (row.top_k - 1), order.end(), std::greater<float>());
    least = order[static_cast<size_t>(row.top_k) - 1];
  }
  if (!(row.top_p < 1)) return least;
  candidates.clear();
  double total = all;
  if (least > -INFINITY) {
    total = 0;
    for (int64_t i = 0; i < row.vocab; ++i)
      if (logits[i] >= least) total += masses[i];
  }
  // Those below this share, all together, are less than what top-p leaves out. Half of it, for rounding's sake.
  const auto negligible = static_cast<float>(0.5 * (1.0 - row.top_p) * total / static_cast<double>(row.vocab));
  for (int64_t i = 0; i < row.vocab; ++i)
    if (logits[i] >= least && masses[i] >= negligible) candidates.push_back({logits[i], masses[i]});
  return std::min(nucleus(candidates, row.top_p * total), best);
}

// The first index at which the masses before and at it add up to more than `drawn`; -1 if rounding leaves none.
int64_t index_at(double drawn, const std::vector<float>& masses, const std::vector<double>& sums) {
  double before = 0;
  size_t block = 0;
  while (block < sums.size() && before + sums[block] <= drawn) before += sums[block++];
  const size_t end = std::min<size_t>(masses.size(), (block + 1) * kSumOver);
  for (size_t i = block * kSumOver; i < end; ++i) {
    before += masses[i];
    if (before > drawn) return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace

Sampled sample_row(const SampleRow& row, const Kernels& kernels) {
  thread_local std::vector<float> room, masses;
  thread_local std::vector<double> sums;
  const float* logits = scaled_logits(row, room);
  masses.resize(static_cast<size_t>(row.vocab));
  sums.resize(static_cast<size_t>((row.vocab + kSumOver - 1) / kSumOver));
  const auto total = [&] { return std::accumulate(sums.begin(), sums.end(), 0.0); };

  const float best = kernels.largest(logits, row.vocab);
  kernels.masses(logits, best, masses.data(), sums.data(), row.vocab);
  const double all = total();
  const auto result = [&](int64_t token) {
    return Sampled{token, static_cast<float>(static_cast<double>(logits[token]) - best - std::log(all))};
  };
  const auto likeliest = [&] {
    const float* first = std::find(logits, logits + row.vocab, best);  // of equals
    return result(first == logits + row.vocab ? 0 : first - logits);
  };
  if (!(row.temperature > 0) || !std::isfinite(all)) return likeliest();

  const float least = least_kept(row, logits, masses.data(), best, all);
  if (least > -INFINITY || row.min_p > 0)
    kernels.keep(logits, least, row.min_p, masses.data(), sums.data(), row.vocab);
  const int64_t token = index_at(uniform(row.seed, row.offset) * total(), masses, sums);
  return token < 0 ? likeliest() : result(token);
}

}  // namespace minimind::cpu
