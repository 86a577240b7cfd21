// Finds races in emulated kernels, whatever their results are.
//
// Two accesses to a byte race if different threads of a launch make them, one writes, they are not
// both atomic, and nothing orders them. A barrier of their CTA does, __syncwarp does within their
// warp; between CTAs nothing does. Launches are taken to follow one another: races between
// kernels or streams are not looked for.
//
// EMU_WITHOUT=FILE:LINE names a barrier of a kernel that orders nothing, as if it were not there:
// if it is needed, there is a race then. Threads wait at it all the same, so nothing goes astray.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "watcher.h"

namespace emulation {

class Detector : public Watcher {
 public:
  Detector();
  void start_launch(const char* kernel, const void* shared, size_t bytes) override;
  void start_cta() override;
  void end_launch() override { running_ = false; }
  void cta_barrier(const std::source_location& at) override;
  void warp_barrier(const std::source_location& at) override;
  void access(const void* at, size_t bytes, bool write, const void* code) override {
    record(at, bytes, write, false, code);
  }
  void record(const void* at, size_t bytes, bool write, bool atomic, const void* code);

  // What was found since the last call, a line each; +0x... stands for an address in this library.
  std::string take_reports();
  int64_t accesses() const { return accesses_; }
  // Accesses that gave way to others before their word was accessed for the last time: what they
  // race with is not found.
  int64_t forgotten() const { return forgotten_; }

 private:
  struct Epochs {
    uint32_t cta = 0, warp = 0;  // barriers that a thread has passed
  };
  // An access to some of the bytes of a word.
  struct Stamp {
    uint32_t cta, code;
    Epochs epochs;
    uint16_t thread;
    uint8_t bytes;  // a bit each
    bool write, atomic;
  };
  static constexpr int kWordBytes = 4;
  static constexpr int kStamps = 12;
  struct Word {
    uint32_t age = 0;  // older than its launch, or its CTA if it is shared: all is forgotten
    uint16_t count = 0, oldest = 0;
    Stamp stamps[kStamps];
  };
  static constexpr int kPageWords = 256;
  struct Page {
    Word words[kPageWords];
  };
  static constexpr size_t kMostPages = 4096;

  bool is_ignored(const std::source_location& at) const;
  static bool ordered(const Stamp& before, const Stamp& now);
  static bool stands_for(const Stamp& one, const Stamp& other);
  static bool covered(const Word& word, const Stamp& now);
  Word& word_at(uintptr_t index, bool shared);
  void add(Word& word, const Stamp& now, bool shared);
  void report(const Stamp& before, const Stamp& now, bool shared);

  const std::string ignored_;
  bool running_ = false;
  const char* kernel_ = "";
  uintptr_t shared_ = 0;
  size_t shared_bytes_ = 0;
  uint32_t clock_ = 0, launch_age_ = 0, cta_age_ = 0;
  std::vector<Epochs> epochs_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_ = nullptr;
  std::set<std::pair<uint32_t, uint32_t>> reported_;
  std::string reports_;
  int64_t accesses_ = 0, forgotten_ = 0;
};

extern Detector detector;

}  // namespace emulation
