/* Runs the CUDA kernels on a CPU, slowly and in lock step, so that their results can be seen without a GPU.
 *
 * Each thread of a CTA is a coroutine. A warp's shuffle or ballot waits until all 32 of its threads have reached it, a
 * barrier until all threads of the CTA have; anything else would hang or read garbage on a GPU and aborts here. CTAs run
 * one after another. What this does not show: memory ordering between threads, and speed.
 *
 * Compile a kernel source with this header in front (g++ -include) and -ffp-contract=off, since the kernels round every
 * operation on its own.
 */
#ifndef CUDA_EMULATION_H
#define CUDA_EMULATION_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <vector>

#define QAD_EMULATED
#define __device__
#define __forceinline__ inline
#define __shared__ static

struct Index {
    unsigned x;
};
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum State { RUNNABLE, AT_WARP, AT_CTA, DONE };

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    State state;
    unsigned exchanges;
};

static std::vector<Thread> threads;
static std::vector<uint64_t> exchanged[2]; /* by turns: a thread may reach its next exchange before all have read */
static ucontext_t scheduler;
static void (*kernel)(const void *);
static const void *arguments;

static void fail(const char *message) {
    fprintf(stderr, "CTA %u, thread %u: %s\n", blockIdx.x, threadIdx.x, message);
    abort();
}

static void wait(State state) {
    Thread &thread = threads[threadIdx.x];
    thread.state = state;
    swapcontext(&thread.context, &scheduler);
}

static void begin() {
    kernel(arguments);
    threads[threadIdx.x].state = DONE;
}

static void run_warp(unsigned first) {
    for (;;) {
        unsigned waiting = 0;
        for (unsigned i = first; i < first + 32; ++i) {
            threadIdx.x = i;
            if (threads[i].state == RUNNABLE) swapcontext(&scheduler, &threads[i].context);
            waiting += threads[i].state == AT_WARP;
        }
        if (!waiting) return;
        if (waiting < 32) fail("a shuffle without the whole warp");
        for (unsigned i = first; i < first + 32; ++i) threads[i].state = RUNNABLE;
    }
}

static void run_cta() {
    for (unsigned i = 0; i < blockDim.x; ++i) {
        Thread &thread = threads[i];
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        thread.state = RUNNABLE;
        thread.exchanges = 0;
        makecontext(&thread.context, begin, 0);
    }
    for (;;) {
        for (unsigned first = 0; first < blockDim.x; first += 32) run_warp(first);
        unsigned done = 0;
        for (Thread &thread : threads) done += thread.state == DONE;
        if (done == blockDim.x) return;
        if (done) fail("a barrier without the whole CTA");
        for (Thread &thread : threads) thread.state = RUNNABLE;
    }
}

/* Publish a value to the warp and return all 32 that were published. */
static const uint64_t *exchange(unsigned mask, uint64_t value) {
    if (mask != 0xffffffffu) fail("an exchange that names only part of the warp");
    std::vector<uint64_t> &values = exchanged[threads[threadIdx.x].exchanges++ % 2];
    values[threadIdx.x] = value;
    wait(AT_WARP);
    return &values[threadIdx.x / 32 * 32];
}

template <class Value> static Value shuffle(unsigned mask, Value value, unsigned lane) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    memcpy(&value, &exchange(mask, bits)[lane], sizeof value);
    return value;
}

static void launch(void (*what)(const void *), const void *with, unsigned grid, unsigned block) {
    kernel = what;
    arguments = with;
    gridDim.x = grid;
    blockDim.x = block;
    threads.resize(block);
    for (Thread &thread : threads) thread.stack.resize(1 << 16);
    exchanged[0].resize(block);
    exchanged[1].resize(block);
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) run_cta();
}

} // namespace emulation

template <class Value> static Value __shfl_xor_sync(unsigned mask, Value value, unsigned distance) {
    return emulation::shuffle(mask, value, (threadIdx.x % 32) ^ distance);
}
template <class Value> static Value __shfl_sync(unsigned mask, Value value, unsigned lane) {
    return emulation::shuffle(mask, value, lane % 32);
}
static inline uint32_t __ballot_sync(unsigned mask, bool vote) {
    const uint64_t *votes = emulation::exchange(mask, vote);
    uint32_t ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= (uint32_t)votes[lane] << lane;
    return ballot;
}
static inline void __syncthreads() { emulation::wait(emulation::AT_CTA); }
static inline void atomicAdd(unsigned long long *target, unsigned long long value) { *target += value; }

static inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }

/* As the GPU's conversions: half to even, any NaN becomes 0x7fff. */
static inline uint32_t emulated_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return value != value ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
static inline uint32_t emulated_f16(float value) {
    const _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return value != value ? 0x7fffu : bits;
}
static inline uint32_t bf16_pair(float low, float high) { return emulated_bf16(low) | emulated_bf16(high) << 16; }
static inline uint32_t f16_pair(float low, float high) { return emulated_f16(low) | emulated_f16(high) << 16; }
static inline float f16_value(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

/* Each kernel becomes a function that runs a whole launch of it, under its own name. */
#define QAD_KERNEL(name, threads_at_most, Arguments, body)                                                             \
    extern "C" int name(const void *given, unsigned grid, unsigned block) {                                           \
        if (block > threads_at_most || block % 32) return -1;                                                          \
        emulation::launch([](const void *one) { body(*static_cast<const Arguments *>(one)); }, given, grid, block);    \
        return 0;                                                                                                      \
    }

#endif
