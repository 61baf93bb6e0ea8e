// The slots of the k best scores of a list in one pass: a block a sequence, all scores in registers.
//
// A thread's largest score is a column's maximum, and k maxima reach the k-th largest of them, so k scores reach it too.
// The few scores that do are collected, and the k-th largest among them is found by counts of 4,096 digits, mostly at
// once. Where too many reach it (equal scores), all scores are counted in their place. The chosen go out in the order
// of the list; of equal scores at the cut those listed first.
#ifndef EMULATED  // tests run this file on a CPU
typedef unsigned int u32;
#define WARP 0xffffffffu
#endif
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define THREADS 1024
#define ROWS 6            // four scores each: 24,576 of a block
#define ITEMS (4 * ROWS)
#define FEW 2048          // collected at most, two a thread
#define DIGITS 4096

struct Cut {
    u32 low;     // k keys or more reach it
    u32 width;   // of the last digit's bin: low .. low + width - 1
    int above;   // keys beyond the bin, fewer than k
    int reached; // keys that reach low
};

struct Shared {
    u32 counts[DIGITS];
    u32 few[FEW];
    u32 lows[32], highs[32];
    int totals[32], others[32];
    Cut cut;
    int collected;
};

__device__ __forceinline__ u32 ordered(float score) {  // -inf, and what is beyond the list, is 0 and never chosen
    if (score == -INFINITY) return 0;
    u32 bits = __float_as_uint(score == 0.0f ? 0.0f : score);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The cut of the k-th largest of the block's keys; one below it will do if at most k + slack keys reach it. Keys that
// reach `low` are k or more, none is beyond `high`. The counts are zero before and after.
template <int N>
__device__ __forceinline__ Cut find(Shared& shared, const u32 (&keys)[N], u32 low, u32 high, int k, int slack) {
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    int bits = 32 - __clz(high - low);
    Cut cut{low, 1, 0, 0};
    while (true) {
        int shift = max(bits - 12, 0);
#pragma unroll
        for (int i = 0; i < N; i++) {
            u32 rest = keys[i] - cut.low;
            if (keys[i] >= cut.low && (unsigned long long)rest >> bits == 0) atomicAdd(&shared.counts[rest >> shift], 1u);
        }
        __syncthreads();
        u32 bins[4];
        int sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bins[i] = shared.counts[4 * thread + i];
            shared.counts[4 * thread + i] = 0;
            sum += bins[i];
        }
        int suffix = sum;  // of this warp's threads from this one on
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_down_sync(WARP, suffix, step);
            if (lane + step < 32) suffix += other;
        }
        if (lane == 0) shared.totals[warp] = suffix;
        __syncthreads();
        int later = __reduce_add_sync(WARP, lane > warp ? shared.totals[lane] : 0);
        int run = cut.above + later + suffix - sum;
#pragma unroll
        for (int i = 3; i >= 0; i--) {
            int before = run;
            run += bins[i];
            if (before < k && run >= k) shared.cut = Cut{cut.low + ((u32)(4 * thread + i) << shift), 1u << shift, before, run};
        }
        __syncthreads();
        cut = shared.cut;
        if (shift == 0 || cut.reached <= k + slack) return cut;
        bits = shift;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
select_kernel(const float* scores, const int* slots, int* best, int listed, int k) {
    __shared__ Shared shared;
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    scores += (long long)blockIdx.x * listed;
    slots += (long long)blockIdx.x * listed;
    best += (long long)blockIdx.x * k;
    bool aligned = listed % 4 == 0 && (unsigned long long)scores % 16 == 0;
    int first = warp * 32 * ITEMS + lane * 4;  // a warp reads its own stretch of the list, 128 scores a row
    u32 keys[ITEMS], largest = 0;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        int at = first + row * 128;
        float4 four = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        if (aligned && at < listed) four = *(const float4*)(scores + at);
        else {
            if (at < listed) four.x = scores[at];
            if (at + 1 < listed) four.y = scores[at + 1];
            if (at + 2 < listed) four.z = scores[at + 2];
            if (at + 3 < listed) four.w = scores[at + 3];
        }
        keys[4 * row] = ordered(four.x), keys[4 * row + 1] = ordered(four.y);
        keys[4 * row + 2] = ordered(four.z), keys[4 * row + 3] = ordered(four.w);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) largest = max(largest, keys[i]);
    for (int i = thread; i < DIGITS; i += THREADS) shared.counts[i] = 0;
    if (thread == 0) shared.collected = 0;
    u32 low = __reduce_min_sync(WARP, largest), high = __reduce_max_sync(WARP, largest);
    if (lane == 0) shared.lows[warp] = low, shared.highs[warp] = high;
    __syncthreads();
    low = __reduce_min_sync(WARP, shared.lows[lane]), high = __reduce_max_sync(WARP, shared.highs[lane]);

    u32 maxima[1] = {largest};
    low = max(find(shared, maxima, low, high, k, k / 8).low, 1u);
    int mine = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) mine += keys[i] >= low;
    int start = mine;
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(WARP, start, step);
        if (lane >= step) start += other;
    }
    int base = 0;
    if (lane == 31) base = atomicAdd(&shared.collected, start);
    start += __shfl_sync(WARP, base, 31) - mine;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
        if (keys[i] >= low) {
            if (start < FEW) shared.few[start] = keys[i];
            start++;
        }
    __syncthreads();
    int collected = shared.collected;
    Cut cut{low, 1, 0, 0};  // fewer than k: all that are there
    int wanted = collected;
    if (collected > FEW) {
        cut = find(shared, keys, low, high, k, 0);
        wanted = k;
    } else if (collected > k) {
        u32 few[2];
        for (int i = 0; i < 2; i++) few[i] = thread + i * THREADS < collected ? shared.few[thread + i * THREADS] : 0;
        cut = find(shared, few, low, high, k, 0);
        wanted = k;
    } else {
        cut.width = 0;  // no key lies in the cut's bin, all are beyond it
    }

    // How many scores are chosen before each of a thread's: those beyond the bin, and the first of the bin. A byte for
    // each row of 128, four rows a word.
    u32 sure[2] = {0, 0}, tied[2] = {0, 0}, ends[2], tied_ends[2];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        u32 rest = keys[i] - cut.low, one = 1u << (i / 4 % 4 * 8);
        if (keys[i] >= cut.low) {
            if (rest >= cut.width) sure[i / 16] += one;
            else tied[i / 16] += one;
        }
    }
#pragma unroll
    for (int word = 0; word < 2; word++) {
        u32 own = sure[word], own_tied = tied[word];
        for (int step = 1; step < 32; step *= 2) {
            u32 other = __shfl_up_sync(WARP, sure[word], step), other_tied = __shfl_up_sync(WARP, tied[word], step);
            if (lane >= step) sure[word] += other, tied[word] += other_tied;
        }
        ends[word] = __shfl_sync(WARP, sure[word], 31), tied_ends[word] = __shfl_sync(WARP, tied[word], 31);
        sure[word] -= own, tied[word] -= own_tied;
    }
    int total = 0, total_tied = 0;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        total += ends[row / 4] >> (row % 4 * 8) & 255;
        total_tied += tied_ends[row / 4] >> (row % 4 * 8) & 255;
    }
    if (lane == 0) shared.totals[warp] = total, shared.others[warp] = total_tied;
    __syncthreads();
    int before = __reduce_add_sync(WARP, lane < warp ? shared.totals[lane] : 0);
    int before_tied = __reduce_add_sync(WARP, lane < warp ? shared.others[lane] : 0);
    int ties = wanted - cut.above;
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        int place = before + (sure[row / 4] >> (row % 4 * 8) & 255);
        int tie = before_tied + (tied[row / 4] >> (row % 4 * 8) & 255);
#pragma unroll
        for (int i = 4 * row; i < 4 * row + 4; i++) {
            if (keys[i] < cut.low) continue;
            bool sure_one = keys[i] - cut.low >= cut.width;
            if (sure_one || tie < ties) best[place + min(tie, ties)] = slots[first + row * 128 + i % 4];
            if (sure_one) place++;
            else tie++;
        }
        before += ends[row / 4] >> (row % 4 * 8) & 255;
        before_tied += tied_ends[row / 4] >> (row % 4 * 8) & 255;
    }
    for (int i = wanted + thread; i < k; i += THREADS) best[i] = -1;
}
