#include "tables.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) bank(
    const u32 *rows, const u32 *present, i64 blocks, i64 channels_, i64 tokens_, i64 tables_, const u8 *nearest,
    const u16 *levels, const int *cost, u16 *counts, u16 *symbols, u8 *maps, u8 *tables, u8 *codes, u64 *entries,
    int *keys, int *meta, i64 least, i64 most, i64 lane_bytes) {
    extern __shared__ u64 shared[];
    __shared__ int renamed[MOST_TABLES], live;
    __shared__ u64 bits;
    i64 part = blockIdx.x;
    int channels = (int)channels_, K = (int)tables_, *own = meta + part * META;
    if (least && (own[MODE] != CODED || K * own[ALPHABET] <= least)) return;
    symbols += part * MOST_SYMBOLS, maps += part * BINS, tables += part * channels, codes += part * MOST_ENTRIES;
    entries += part * MOST_ENTRIES, counts += part * channels * MOST_SYMBOLS, keys += part * channels;
    int A = gather(rows + part * blocks * BINS * 32, present + part * blocks * ((BINS + 31) / 32), (int)blocks,
                   channels, (int)tokens_, K, symbols, maps, counts, tables, keys);
    if (threadIdx.x == 0) own[MODE] = A > MOST_SYMBOLS ? PACKED : CODED, own[ALPHABET] = A, live = 0, bits = 0;
    if (A > MOST_SYMBOLS || K * A > most) return;
    int *sums = (int *)shared;
    Bank bank = {K, A, sums, (u16 *)(sums + K * A), (u8 *)(sums + K * A) + 2 * K * A};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int round = 0;; round++) {
        sum_channels(bank, counts, tables, channels);
        if (round == (K > 1 ? ROUNDS : 0)) break;
        for (int k = warp; k < K; k += THREADS / 32) {
            int used = quantize(bank, k, nearest, levels);
            for (int s = lane; s < A; s += 32) {
                int code = bank.codes[k * A + s];
                bank.values[s * K + k] = cost[code == REST ? TOTAL - used : levels[code]];
            }
        }
        __syncthreads();
        assign(bank, counts, tables, channels);
        __syncthreads();
    }
    if (threadIdx.x < K) renamed[threadIdx.x] = 0;
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += THREADS) renamed[tables[c]] = 1;  // tables without channels go
    __syncthreads();
    if (threadIdx.x == 0)
        for (int k = 0; k < K; k++) live += renamed[k], renamed[k] = renamed[k] ? live - 1 : -1;
    __syncthreads();
    for (int k = 0; k < K; k++) {
        int to = renamed[k];
        if (to >= 0 && to < k)
            for (int s = threadIdx.x; s < A; s += THREADS) sums[to * A + s] = sums[k * A + s];
        __syncthreads();
    }
    for (int c = threadIdx.x; c < channels; c += THREADS) tables[c] = (u8)renamed[tables[c]];
    bank.tables = live;
    u64 total = 0;
    for (int k = warp; k < live; k += THREADS / 32) {
        int used = quantize(bank, k, nearest, levels);
        for (int s = lane; s < A; s += 32) {
            int code = bank.codes[k * A + s];
            total += (u64)sums[k * A + s] * cost[code == REST ? TOTAL - used : levels[code]];
            codes[k * A + s] = code;
        }
    }
    total = warp_sum(total);
    if (lane == 0) atomicAdd(&bits, total);
    __syncthreads();
    entries_of(bank, levels, entries);
    if (threadIdx.x) return;
    i64 payload = bits / (64 * 8) ? bits / (64 * 8) : 1, per_lane = (lane_bytes * channels + payload - 1) / payload;
    per_lane = per_lane > channels ? channels : per_lane < 1 ? 1 : per_lane;
    int groups = (int)((channels + 32 * per_lane - 1) / (32 * per_lane));
    i64 tail = channels - (groups - 1) * 32 * per_lane;
    own[TABLES] = live, own[PER_LANE] = (int)per_lane, own[GROUPS] = groups;
    own[LANES] = (groups - 1) * 32 + (int)(tail < 32 ? tail : 32);
}
