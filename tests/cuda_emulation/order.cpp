#include "order.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>

namespace emulation {

namespace {
constexpr unsigned kLanes = 32;
}

Order::Order() {
  const char* variable = std::getenv("EMU_ORDER");
  const std::string text = variable ? variable : "forward";
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const std::string seed = colon == std::string::npos ? "" : text.substr(colon + 1);
  const bool is_number = !seed.empty() && seed.size() < 10 &&
                         seed.find_first_not_of("0123456789") == std::string::npos;
  if (name == text && name == "forward") {
    kind_ = Kind::kForward;
  } else if (name == text && name == "reverse") {
    kind_ = Kind::kReverse;
  } else if (is_number && name == "random") {
    kind_ = Kind::kRandom;
  } else if (is_number && name == "greedy") {
    kind_ = Kind::kGreedy;
  } else {
    throw std::invalid_argument(
        "EMU_ORDER must be forward, reverse, random:SEED or greedy:SEED, got '" + text + "'");
  }
  if (is_number) random_.seed(std::stoul(seed));
}

template <typename T>
void Order::arrange(std::vector<T>& ascending) {
  if (kind_ == Kind::kForward) return;
  if (kind_ == Kind::kReverse) return std::reverse(ascending.begin(), ascending.end());
  std::shuffle(ascending.begin(), ascending.end(), random_);
}

std::vector<uint64_t> Order::ctas(uint64_t count) {
  std::vector<uint64_t> result(count);
  std::iota(result.begin(), result.end(), uint64_t{0});
  arrange(result);
  return result;
}

std::vector<Order::Indices> Order::turns(unsigned threads) {
  const unsigned size = kind_ == Kind::kGreedy ? kLanes : threads;
  std::vector<Indices> result;
  for (unsigned first = 0; first < threads; first += size) {
    Indices& turn = result.emplace_back(std::min(size, threads - first));
    std::iota(turn.begin(), turn.end(), first);
    if (kind_ == Kind::kReverse) arrange(turn);
  }
  if (kind_ == Kind::kGreedy) arrange(result);
  return result;
}

void Order::mix(Indices& threads) {
  if (kind_ == Kind::kRandom || kind_ == Kind::kGreedy) arrange(threads);
}

}  // namespace emulation
