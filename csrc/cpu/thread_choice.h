// The number of threads of a step. On an idle machine all of torch's are best, or nearly. Once another program has
// one of the processors, every barrier of a step waits for the thread that shares it: two threads then take a hundred times
// as long as one. So the fastest number is kept, and another is tried now and then. The logits are the same bits with any.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

namespace minimind::cpu {

class ThreadChoice {
 public:
  static constexpr int kFirst = 8, kLongest = 4096;  // steps between two trials

  // first: steps before the first trial, which slow steps bring forward.
  explicit ThreadChoice(int most, int first = kFirst) : until_trial_(first), interval_(first) {
    for (int threads : {most, most - 1, most / 2, 1})
      if (threads >= 1 && (arms_.empty() || threads < arms_.back().threads)) arms_.push_back({threads, 0.0});
  }

  // For the next step, whose time goes to `took`.
  int threads() const { return arms_[steps_left_ > 0 ? tried_ : best_].threads; }

  void took(double seconds) {
    if (steps_left_ > 0)
      tried(seconds);
    else
      used(seconds);
  }

 private:
  static constexpr int kTrial = 2;  // the first step of a trial may have to start threads
  static constexpr double kFaster = 0.8, kSlower = 3.0, kShare = 0.05;

  struct Arm {
    int threads;
    double seconds;  // of a step, lately; 0: not known
  };

  void used(double seconds) {
    Arm& arm = arms_[best_];
    const bool slow = arm.seconds > 0 && seconds > kSlower * arm.seconds;
    slow_ = slow ? slow_ + 1 : 0;
    if (arm.seconds == 0 || slow_ == 2)
      arm.seconds = seconds;
    else if (!slow)
      arm.seconds += (seconds - arm.seconds) / 8;
    if (slow_ == 2) interval_ = kFirst, until_trial_ = 1, survey_ = static_cast<int>(arms_.size()) - 1;  // try all others
    if (--until_trial_ > 0 || arms_.size() == 1) return;
    do tried_ = (tried_ + 1) % arms_.size();
    while (tried_ == best_);
    steps_left_ = kTrial, arms_[tried_].seconds = std::numeric_limits<double>::infinity();
  }

  void tried(double seconds) {
    Arm &arm = arms_[tried_], &best = arms_[best_];
    arm.seconds = std::min(arm.seconds, seconds);
    if (--steps_left_ > 0) return;
    if (arm.seconds < kFaster * best.seconds) {
      best_ = tried_, interval_ = kFirst;
    } else {  // a trial that is slow is paid for by many steps
      const double worth = kTrial * arm.seconds / best.seconds / kShare;
      interval_ = std::min(kLongest, std::max(2 * interval_, worth < kLongest ? static_cast<int>(worth) : kLongest));
    }
    until_trial_ = --survey_ > 0 ? 1 : interval_;
  }

  std::vector<Arm> arms_;  // most threads first
  size_t best_ = 0, tried_ = 0;
  int until_trial_, interval_, steps_left_ = 0, slow_ = 0, survey_ = 0;
};

}  // namespace minimind::cpu
