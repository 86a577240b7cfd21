#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "order.h"
#include "watcher.h"

namespace emulation {

Context context;
Watcher* watcher = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kLanes = 32;
constexpr int kLaneWords = 8;
constexpr std::align_val_t kSharedAlignment{16};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  const void* code;  // what asked for it
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf at;
  bool started = false, ended = false;
  uint64_t waits_for = 0;  // generation of the barrier; 0: for nothing
  bool waits_for_warp = false;
  std::vector<Copy> open;                // copies not committed yet
  std::deque<std::vector<Copy>> groups;  // commits not waited for
};

struct Barrier {
  uint64_t generation = 1;
  int arrived = 0, living = 0, count = 0, last_count = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Barrier> warps;
std::vector<std::array<uint64_t, kLanes * kLaneWords>> lanes;
Barrier cta;
unsigned current, num_threads;
const char* kernel_name;
const std::function<void()>* body;
jmp_buf scheduler;

void arrive(Barrier& barrier) {
  if (barrier.arrived < barrier.living || barrier.living == 0) return;
  barrier.arrived = 0;
  barrier.last_count = barrier.count;
  barrier.count = 0;
  ++barrier.generation;
}

void give_way() {
  if (!_setjmp(fibers[current]->at)) _longjmp(scheduler, 1);
}

void wait(Barrier& barrier, bool warp) {
  Fiber& fiber = *fibers[current];
  fiber.waits_for = barrier.generation;
  fiber.waits_for_warp = warp;
  ++barrier.arrived;
  arrive(barrier);
  if (barrier.generation == fiber.waits_for) give_way();
  fiber.waits_for = 0;
}

void fiber_main() {
  (*body)();
  Fiber& fiber = *fibers[current];
  fiber.ended = true;
  // An ended thread is not waited for.
  for (Barrier* barrier : {&cta, &warps[current / kLanes]}) {
    --barrier->living;
    arrive(*barrier);
  }
  _longjmp(scheduler, 1);
}

bool runnable(unsigned i) {
  const Fiber& fiber = *fibers[i];
  if (fiber.ended) return false;
  const Barrier& barrier = fiber.waits_for_warp ? warps[i / kLanes] : cta;
  return fiber.waits_for == 0 || fiber.waits_for != barrier.generation;
}

// Runs a thread until it waits or ends. Not inlined, so that no local of the caller lives where
// _longjmp would restore it.
[[gnu::noinline]] void resume(unsigned i) {
  current = i;
  context.thread_index = {i, 0, 0};
  if (_setjmp(scheduler)) return;
  Fiber& fiber = *fibers[i];
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

void run_cta(Order& order) {
  cta = {};
  cta.living = static_cast<int>(num_threads);
  warps.assign((num_threads + kLanes - 1) / kLanes, {});
  lanes.resize(warps.size());
  for (unsigned i = 0; i < num_threads; ++i) {
    ++warps[i / kLanes].living;
    Fiber& fiber = *fibers[i];
    fiber.started = fiber.ended = false;
    fiber.waits_for = 0;
    fiber.open.clear();
    fiber.groups.clear();
  }
  while (cta.living > 0) {
    bool ran = false;
    for (Order::Indices& threads : order.turns(num_threads)) {
      for (bool again = true; again;) {
        again = false;
        order.mix(threads);
        for (const unsigned i : threads) {
          if (!runnable(i)) continue;
          resume(i);
          again = ran = true;
        }
      }
    }
    if (!ran) {
      std::fprintf(stderr, "emulation: %s: the threads of a CTA wait for one another for ever\n",
                   kernel_name);
      std::abort();
    }
  }
}

}  // namespace

void run(const char* kernel, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::function<void()>& thread) {
  static Order order;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  // As many bytes as were asked for and no more, so that AddressSanitizer sees an access beyond.
  const auto free = [](uint8_t* memory) { ::operator delete(memory, kSharedAlignment); };
  const std::unique_ptr<uint8_t[], decltype(free)> shared(
      static_cast<uint8_t*>(::operator new(shared_bytes, kSharedAlignment)), free);
  context = {{}, {}, {threads, 1, 1}, grid, shared.get()};
  num_threads = threads;
  kernel_name = kernel;
  body = &thread;
  if (watcher) watcher->start_launch(kernel, shared.get(), shared_bytes);
  for (const uint64_t i : order.ctas(uint64_t{grid.x} * grid.y * grid.z)) {
    context.block_index = {static_cast<unsigned>(i % grid.x),
                           static_cast<unsigned>(i / grid.x % grid.y),
                           static_cast<unsigned>(i / grid.x / grid.y)};
    std::memset(shared.get(), 0xff, shared_bytes);  // fp32, fp16 and bf16 NaN
    if (watcher) watcher->start_cta();
    run_cta(order);
  }
  if (watcher) watcher->end_launch();
}

unsigned running_thread() { return current; }

bool is_private(const void* at) {
  const auto within = [&](const void* begin, size_t bytes) {
    return reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(begin) < bytes;
  };
  return within(fibers[current]->stack.get(), kStackBytes) || within(&context, sizeof context) ||
         within(lanes.data(), lanes.size() * sizeof lanes[0]);
}

int sync_threads(bool value, const std::source_location& at) {
  cta.count += value;
  wait(cta, false);
  if (watcher) watcher->cta_barrier(at);
  return cta.last_count;
}

void sync_warp(const std::source_location& at) {
  meet_warp();
  if (watcher) watcher->warp_barrier(at);
}

void meet_warp() { wait(warps[current / kLanes], true); }

uint64_t* lane_memory(int lane) { return lanes[current / kLanes].data() + lane * kLaneWords; }

int lane() { return static_cast<int>(current % kLanes); }

void copy_async(void* to, const void* from, size_t bytes) {
  const void* code = __builtin_return_address(0);
  fibers[current]->open.push_back({to, from, bytes, code});
  if (!watcher) return;
  watcher->access(from, bytes, false, code);
  watcher->access(to, bytes, true, code);  // it may be written from now on
}

void commit_copies() {
  fibers[current]->groups.push_back(std::move(fibers[current]->open));
  fibers[current]->open.clear();
}

void wait_copies(int pending) {
  auto& groups = fibers[current]->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      if (watcher) watcher->access(copy.to, copy.bytes, true, copy.code);
    }
  }
}

}  // namespace emulation
