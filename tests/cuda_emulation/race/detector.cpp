#include "race/detector.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "emulation.h"

// The linker's: where this library begins and ends.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace emulation {

Detector detector;

namespace {
constexpr unsigned kLanes = 32;
constexpr unsigned kMostThreads = 1024;

const struct Install {
  Install() { watcher = &detector; }
} install;

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
}  // namespace

Detector::Detector() : ignored_(std::getenv("EMU_WITHOUT") ? std::getenv("EMU_WITHOUT") : "") {}

bool Detector::is_ignored(const std::source_location& at) const {
  if (ignored_.empty()) return false;
  const std::string path = at.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(at.line()) == ignored_;
}

void Detector::cta_barrier(const std::source_location& at) {
  if (!is_ignored(at)) ++epochs_[running_thread()].cta;
}

void Detector::warp_barrier(const std::source_location& at) {
  if (!is_ignored(at)) ++epochs_[running_thread()].warp;
}

void Detector::start_launch(const char* kernel, const void* shared, size_t bytes) {
  kernel_ = kernel;
  shared_ = address(shared);
  shared_bytes_ = bytes;
  launch_age_ = ++clock_;
  if (pages_.size() > kMostPages) {
    pages_.clear();
    last_ = nullptr;
  }
}

void Detector::start_cta() {
  cta_age_ = ++clock_;
  epochs_.assign(kMostThreads, {});
  running_ = true;
}

void Detector::record(const void* pointer, size_t bytes, bool write, bool atomic,
                      const void* code) {
  if (!running_ || is_private(pointer)) return;
  ++accesses_;
  const uintptr_t at = address(pointer), end = at + bytes;
  // A kernel's static __shared__ variables are this library's.
  const bool shared = at - shared_ < shared_bytes_ ||
                      at - address(__ehdr_start) < address(_end) - address(__ehdr_start);
  const unsigned thread = running_thread();
  Stamp now = {.cta = cta_age_,
               .code = static_cast<uint32_t>(address(code) - address(__ehdr_start)),
               .epochs = epochs_[thread],
               .thread = static_cast<uint16_t>(thread),
               .bytes = 0,
               .write = write,
               .atomic = atomic};
  for (uintptr_t word = at / kWordBytes; word * kWordBytes < end; ++word) {
    const uintptr_t first = word * kWordBytes;
    const unsigned from = first < at ? at - first : 0;
    const unsigned to = std::min<uintptr_t>(end - first, kWordBytes);
    now.bytes = static_cast<uint8_t>((1u << to) - (1u << from));
    add(word_at(word, shared), now, shared);
  }
}

Detector::Word& Detector::word_at(uintptr_t index, bool shared) {
  const uintptr_t number = index / kPageWords;
  if (!last_ || number != last_number_) {
    auto& page = pages_[number];
    if (!page) page = std::make_unique<Page>();
    last_ = page.get();
    last_number_ = number;
  }
  Word& word = last_->words[index % kPageWords];
  const uint32_t age = shared ? cta_age_ : launch_age_;
  if (word.age != age) {
    word.age = age;
    word.count = word.oldest = 0;
  }
  return word;
}

bool Detector::ordered(const Stamp& before, const Stamp& now) {
  if (before.cta != now.cta) return false;
  if (before.thread == now.thread || before.epochs.cta < now.epochs.cta) return true;
  return before.thread / kLanes == now.thread / kLanes && before.epochs.warp < now.epochs.warp;
}

// Whether whatever conflicts with `other` conflicts with `one`.
bool Detector::stands_for(const Stamp& one, const Stamp& other) {
  return one.write >= other.write && one.atomic <= other.atomic &&
         (one.bytes & other.bytes) == other.bytes;
}

// Whether a later access that races with `now` also races with one that is kept.
bool Detector::covered(const Word& word, const Stamp& now) {
  const Stamp* first = nullptr;
  const unsigned warp = now.thread / kLanes;
  for (int i = 0; i < word.count; ++i) {
    const Stamp& kept = word.stamps[i];
    if (!stands_for(kept, now)) continue;
    // CTAs run one after the other: nothing is ordered behind one that has ended.
    if (kept.cta != now.cta) return true;
    const bool same_warp = kept.thread / kLanes == warp;
    if (kept.thread == now.thread || kept.epochs.cta < now.epochs.cta) continue;
    if (same_warp && kept.epochs.warp < now.epochs.warp) continue;
    // What is ordered behind two threads, whose only common barriers are those that `now` waits
    // for as well, is ordered behind `now`.
    if (!first) {
      first = &kept;
    } else if (first->thread / kLanes != kept.thread / kLanes ||
               (same_warp && first->thread != kept.thread)) {
      return true;
    }
  }
  return false;
}

void Detector::add(Word& word, const Stamp& now, bool shared) {
  int count = 0;
  for (int i = 0; i < word.count; ++i) {
    const Stamp& before = word.stamps[i];
    const bool behind = ordered(before, now);
    if (!behind && before.bytes & now.bytes && (before.write || now.write) &&
        !(before.atomic && now.atomic)) {
      report(before, now, shared);
    }
    if (behind && stands_for(now, before)) continue;
    if (count != i) word.stamps[count] = before;
    ++count;
  }
  word.count = static_cast<uint16_t>(count);
  if (covered(word, now)) return;
  if (count < kStamps) {
    word.stamps[word.count++] = now;
    return;
  }
  ++forgotten_;
  word.stamps[word.oldest++ % kStamps] = now;
}

void Detector::report(const Stamp& before, const Stamp& now, bool shared) {
  if (!reported_.insert({before.code, now.code}).second) return;
  const auto kind = [](const Stamp& stamp) {
    return stamp.atomic ? "atomic access" : stamp.write ? "write" : "read";
  };
  char text[512];
  std::snprintf(
      text, sizeof text,
      "%s: race in %s memory: %s by thread %u at +0x%x, %s by thread %u of %s CTA at +0x%x\n",
      kernel_, shared ? "shared" : "global", kind(before), before.thread, before.code, kind(now),
      now.thread, before.cta == now.cta ? "the same" : "another", now.code);
  reports_ += text;
}

std::string Detector::take_reports() { return std::exchange(reports_, {}); }

}  // namespace emulation

// For Python.
extern "C" {
const char* emulation_race_reports() {
  static std::string reports;
  reports = emulation::detector.take_reports();
  return reports.c_str();
}
int64_t emulation_race_accesses() { return emulation::detector.accesses(); }
int64_t emulation_race_forgotten() { return emulation::detector.forgotten(); }
}
