// The functions that GCC calls before every access of code compiled with -fsanitize=thread. They
// are answered here instead of by its runtime, whose threads are the operating system's.
#include "race/detector.h"

#define CODE __builtin_return_address(0)
#define READ(p, bytes) ::emulation::detector.record(p, bytes, false, false, CODE)
#define WRITE(p, bytes) ::emulation::detector.record(p, bytes, true, false, CODE)
#define ATOMIC(p, write) \
  ::emulation::detector.record(const_cast<const T*>(p), sizeof(T), write, true, CODE)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}  // of C++ objects, which kernels have none of
void __tsan_vptr_read(void**) {}

#define ACCESSES(bytes)                                            \
  void __tsan_read##bytes(void* p) { READ(p, bytes); }             \
  void __tsan_write##bytes(void* p) { WRITE(p, bytes); }           \
  void __tsan_unaligned_read##bytes(void* p) { READ(p, bytes); }   \
  void __tsan_unaligned_write##bytes(void* p) { WRITE(p, bytes); } \
  void __tsan_volatile_read##bytes(void* p) { READ(p, bytes); }    \
  void __tsan_volatile_write##bytes(void* p) { WRITE(p, bytes); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long bytes) { READ(p, bytes); }
void __tsan_write_range(void* p, unsigned long bytes) { WRITE(p, bytes); }

// Those that intrinsics.cuh uses, and the host's shared pointers.
#define ATOMICS(bits, type)                                                                       \
  type __tsan_atomic##bits##_load(const volatile type* p, int) {                                  \
    using T = type;                                                                               \
    ATOMIC(p, false);                                                                             \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                               \
  void __tsan_atomic##bits##_store(volatile type* p, type value, int) {                           \
    using T = type;                                                                               \
    ATOMIC(p, true);                                                                              \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                               \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type value, int) {                       \
    using T = type;                                                                               \
    ATOMIC(p, true);                                                                              \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                               \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type value, int) {                       \
    using T = type;                                                                               \
    ATOMIC(p, true);                                                                              \
    return __atomic_fetch_sub(p, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* expected, type value, \
                                                    int, int) {                                   \
    using T = type;                                                                               \
    ATOMIC(p, true);                                                                              \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST,               \
                                       __ATOMIC_SEQ_CST);                                         \
  }
ATOMICS(8, char)
ATOMICS(32, int)
ATOMICS(64, long)

}  // extern "C"
