// In which order the threads of a CTA take turns, and the CTAs of a launch. A GPU promises none, so
// a kernel has to give the same result in each. Chosen by EMU_ORDER:
//
// forward      ascending, the default
// reverse      descending
// random:SEED  threads and CTAs in a new random order, threads at every turn
// greedy:SEED  the same, and a warp goes on until all its lanes wait for other warps
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace emulation {

class Order {
 public:
  using Indices = std::vector<unsigned>;

  // Reads EMU_ORDER; std::invalid_argument where it is none of the above.
  Order();

  // The CTAs of a launch.
  std::vector<uint64_t> ctas(uint64_t count);
  // The threads of a CTA, in sets: each runs until all of it wait, then the next one does.
  std::vector<Indices> turns(unsigned threads);
  // Called before every pass over such a set.
  void mix(Indices& threads);

 private:
  enum class Kind { kForward, kReverse, kRandom, kGreedy } kind_ = Kind::kForward;
  std::mt19937_64 random_;

  template <typename T>
  void arrange(std::vector<T>& ascending);
};

}  // namespace emulation
