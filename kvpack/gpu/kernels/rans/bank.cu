// Makes the bank of frequency tables of each part.
//
// rows and present come from scan.cu; nearest [TOTAL + 1], levels [LEVEL_COUNT] and cost [TOTAL + 1] are those of tables.py.
// Written are counts [P, MAX_SYMBOLS, stride], symbols [P, MAX_SYMBOLS], maps [P, BINS] (from codes to symbols), names [P, C]
// (the table of each channel), codes [P, MAX_ENTRIES] (frequency codes, one table behind another), entries [P, MAX_ENTRIES]
// for encode.cu, and meta. Only parts are handled whose number of tables times ALPHABET is in (least, most]: most parts need
// little shared memory and are done by a first launch.
#include "tables.cuh"

__device__ void cluster(const Bank &bank, const u8 *nearest, const u16 *levels, const int *cost) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, K = bank.tables, A = bank.alphabet;
    for (int round = 0;; round++) {
        sum_channels(bank);
        if (round == (K > 1 ? ROUNDS : 0)) return;
        for (int k = warp; k < K; k += THREADS / 32) {
            int used = quantize(bank, k, nearest, levels);
            for (int s = lane; s < A; s += 32) {
                int code = bank.codes[k * A + s];
                set_cost(bank, s, k, cost[code == REST ? TOTAL - used : levels[code]]);
            }
            if (lane == 0 && A % 2) set_cost(bank, A, k, 0);
        }
        __syncthreads();
        assign(bank);
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) bank(
    const u32 *rows, const u32 *present, i64 blocks, i64 channels_, i64 tables, const u8 *nearest, const u16 *levels,
    const int *cost, u16 *counts, u16 *symbols, u8 *maps, u8 *names, u8 *codes, u64 *entries, int *keys, int *meta,
    i64 least, i64 most, i64 lane_bytes) {
    extern __shared__ u64 shared[];
    __shared__ int order[32], renamed[32], live;
    __shared__ u64 bits;
    i64 part = blockIdx.x;
    int channels = (int)channels_, K = (int)tables, *own = meta + part * META;
    if (least && (own[MODE] != CODED || K * own[ALPHABET] <= least)) return;
    const int groups = (BINS + 31) / 32;
    rows += part * blocks * BINS * 32, present += part * blocks * groups;
    symbols += part * MAX_SYMBOLS, maps += part * BINS, names += part * channels, codes += part * MAX_ENTRIES;
    entries += part * MAX_ENTRIES, counts += part * MAX_SYMBOLS * blocks * 64, keys += part * channels;
    int A = list_symbols(present, (int)blocks, symbols, maps);
    if (threadIdx.x == 0) own[MODE] = A > MAX_SYMBOLS ? PACKED : CODED, own[ALPHABET] = A, live = 0, bits = 0;
    if (threadIdx.x < 32) renamed[threadIdx.x] = 0;
    if (A > MAX_SYMBOLS || K * A > most) return;
    int *sums = (int *)shared;
    u16 *values = (u16 *)(sums + K * A);
    Bank bank = {K, A, channels, (int)blocks * 64, counts, names, sums, values, (u8 *)(values + K * (A + A % 2))};
    gather(bank, rows, present, symbols, counts, keys);
    cluster(bank, nearest, levels, cost);
    for (int c = threadIdx.x; c < channels; c += THREADS) renamed[names[c]] = 1;  // a table that no channel uses is dropped
    __syncthreads();
    if (threadIdx.x == 0)
        for (int k = 0; k < K; k++)
            if (renamed[k]) order[live] = k, renamed[k] = live++;
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += THREADS) names[c] = (u8)renamed[names[c]];
    u64 total = 0;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int to = warp; to < live; to += THREADS / 32) {
        int k = order[to], used = quantize(bank, k, nearest, levels);
        for (int s = lane; s < A; s += 32) {
            int code = bank.codes[k * A + s];
            total += (u64)sums[k * A + s] * cost[code == REST ? TOTAL - used : levels[code]];
            codes[to * A + s] = code;
        }
    }
    total = warp_sum(total);
    if (lane == 0) atomicAdd(&bits, total);
    __syncthreads();
    entries_of(bank, levels, order, live, entries);
    if (threadIdx.x) return;
    i64 payload = bits / (64 * 8) ? bits / (64 * 8) : 1, per_lane = (lane_bytes * channels + payload - 1) / payload;
    per_lane = per_lane > channels ? channels : per_lane < 1 ? 1 : per_lane;
    int count = (int)((channels + 32 * per_lane - 1) / (32 * per_lane));
    i64 tail = channels - (count - 1) * 32 * per_lane;
    own[TABLES] = live, own[PER_LANE] = (int)per_lane, own[GROUPS] = count;
    own[LANES] = (count - 1) * 32 + (int)(tail < 32 ? tail : 32);
}
