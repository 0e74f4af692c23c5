// Whether this process may use Intel AMX.
#pragma once

namespace minimind::cpu {

enum class Amx : int {
  absent,   // the processor or the system has none
  refused,  // the system does not let this process use it
  usable
};

// Asks the system for permission. Visible outside the library, so that a preloaded library can answer in its place
// (tests/csrc/amx_emulator.cpp).
extern "C" __attribute__((visibility("default"))) int minimind_amx();

inline Amx amx_state() {
  static const auto answer = static_cast<Amx>(minimind_amx());
  return answer;
}

}  // namespace minimind::cpu
