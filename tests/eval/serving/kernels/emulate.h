// CUDA blocks on a CPU, one after the other: each thread is a fiber, which yields where the others must come first.
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#define EMULATED
#define WARP 0xffffffffu
#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
typedef unsigned int u32;
using std::max;
using std::min;
struct float4 { float x, y, z, w; };
struct Index { int x; };
struct Meeting { int arrived = 0; long phase = 0; };
struct Warp { Meeting meeting; uint64_t given[2][32]; };
struct Fiber { ucontext_t context; Index thread; bool done = false; std::vector<char> stack = std::vector<char>(1 << 16); };

static Fiber* self;
static ucontext_t scheduler;
static Index blockIdx;
static std::vector<Warp> warps;
static Meeting block;
static int threads;
#define threadIdx (self->thread)

static void meet(Meeting& meeting, int expected) {
    long phase = meeting.phase;
    if (++meeting.arrived == expected) meeting.arrived = 0, meeting.phase++;
    else while (meeting.phase == phase) swapcontext(&self->context, &scheduler);
}
static void __syncthreads() { meet(block, threads); }

// Everybody's value, by lane. Two places by turns: whoever is ahead by one exchange overwrites nothing.
static const uint64_t* exchange(uint64_t value) {
    Warp& warp = warps[threadIdx.x / 32];
    uint64_t* given = warp.given[warp.meeting.phase & 1];
    given[threadIdx.x % 32] = value;
    meet(warp.meeting, 32);
    return given;
}
template <class T> static T __shfl_sync(u32, T value, int lane) { return (T)exchange((uint64_t)value)[lane]; }
template <class T> static T __shfl_up_sync(u32 all, T value, int step) {
    int lane = threadIdx.x % 32;
    return __shfl_sync(all, value, lane < step ? lane : lane - step);
}
template <class T> static T __shfl_down_sync(u32 all, T value, int step) {
    int lane = threadIdx.x % 32;
    return __shfl_sync(all, value, lane + step > 31 ? lane : lane + step);
}
static int __reduce_add_sync(u32, int value) {
    const uint64_t* given = exchange((u32)value);
    u32 sum = 0;
    for (int lane = 0; lane < 32; lane++) sum += (u32)given[lane];
    return (int)sum;
}
static u32 __reduce_min_sync(u32, u32 value) { const uint64_t* given = exchange(value); return *std::min_element(given, given + 32); }
static u32 __reduce_max_sync(u32, u32 value) { const uint64_t* given = exchange(value); return *std::max_element(given, given + 32); }
template <class T, class V> static T atomicAdd(T* at, V value) { T before = *at; *at += value; return before; }
static u32 __float_as_uint(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
static int __clz(u32 bits) { return bits ? __builtin_clz(bits) : 32; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static std::function<void()> body;
static void begin() {
    body();
    self->done = true;
    swapcontext(&self->context, &scheduler);
}
static void launch(int blocks, int block_threads, std::function<void()> kernel) {
    body = kernel, threads = block_threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        warps.assign(threads / 32, Warp()), block = Meeting();
        std::vector<Fiber> fibers(threads);
        for (int thread = 0; thread < threads; thread++) {
            Fiber& fiber = fibers[thread];
            fiber.thread.x = thread;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
            makecontext(&fiber.context, begin, 0);
        }
        for (int left = threads; left;)
            for (Fiber& fiber : fibers)
                if (!fiber.done) self = &fiber, swapcontext(&scheduler, &fiber.context), left -= fiber.done;
    }
}
