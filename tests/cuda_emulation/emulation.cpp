#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

namespace emulation {

Index thread_index, block_index;
dim3 block_size, grid_size;
uint8_t* shared_memory;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kLanes = 32;
constexpr int kLaneWords = 8;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
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

void run_cta() {
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
  // Volatile: they live through _longjmp.
  volatile unsigned next = 0, idle = 0;
  volatile unsigned ended = 0;
  while (ended < num_threads) {
    const unsigned i = next;
    next = (next + 1) % num_threads;
    if (!runnable(i)) {
      idle = idle + 1;
      if (idle > num_threads) {
        std::fprintf(stderr, "emulation: the threads of a CTA wait for one another for ever\n");
        std::abort();
      }
      continue;
    }
    idle = 0;
    current = i;
    thread_index = {i, 0, 0};
    if (!_setjmp(scheduler)) {
      Fiber& fiber = *fibers[i];
      if (fiber.started) _longjmp(fiber.at, 1);
      fiber.started = true;
      getcontext(&fiber.start);
      fiber.start.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, fiber_main, 0);
      setcontext(&fiber.start);
    }
    if (fibers[i]->ended) ended = ended + 1;
  }
}

}  // namespace

void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  std::vector<uint64_t> shared((shared_bytes + 15) / 16 * 2 + 2);
  shared_memory = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared.data()) + 15) &
                                             ~uintptr_t{15});
  grid_size = grid;
  block_size = {threads, 1, 1};
  num_threads = threads;
  body = &thread;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        std::memset(shared_memory, 0xff, shared_bytes);  // fp32, fp16 and bf16 NaN
        run_cta();
      }
    }
  }
}

int sync_threads(bool value) {
  cta.count += value;
  wait(cta, false);
  return cta.last_count;
}

void sync_warp() { wait(warps[current / kLanes], true); }

uint64_t* lane_memory(int lane) { return lanes[current / kLanes].data() + lane * kLaneWords; }

int lane() { return static_cast<int>(current % kLanes); }

void copy_async(void* to, const void* from, size_t bytes) {
  fibers[current]->open.push_back({to, from, bytes});
}

void commit_copies() {
  fibers[current]->groups.push_back(std::move(fibers[current]->open));
  fibers[current]->open.clear();
}

void wait_copies(int pending) {
  auto& groups = fibers[current]->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

}  // namespace emulation
