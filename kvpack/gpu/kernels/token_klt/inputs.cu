// Computes what tokens are predicted from (token_inputs of model.py), as fp16 numbers: a token's own vector, the vectors of the
// LAGS tokens before it, DECAYS decaying means of all tokens before it (except weights below 1e-9), and functions of its
// position. vectors are [V, E]; of earlier tokens only the first `reach` elements of a vector are used.
static_assert(PLACES == 3, "three functions of the position are written");

// Writes sums [spans, DECAYS, reach], the weighted sum of each span of SPAN tokens; a weight falls by a factor with each token.
extern "C" __global__ void __launch_bounds__(THREADS) tally(
    const u16 *vectors, const int *tokens, i64 count, i64 width, i64 reach, const float *decays, float *sums) {
    i64 first = (i64)blockIdx.x * SPAN, last = first + SPAN < count ? first + SPAN : count;
    for (int m = threadIdx.x; m < reach; m += THREADS) {
        float total[DECAYS] = {};
#pragma unroll 8
        for (i64 t = first; t < last; t++) {
            float value = from_half(vectors[tokens[t] * width + m]);
#pragma unroll
            for (int i = 0; i < DECAYS; i++) total[i] = total[i] * decays[i] + value;
        }
#pragma unroll
        for (int i = 0; i < DECAYS; i++) sums[(blockIdx.x * DECAYS + i) * reach + m] = total[i];
    }
}

__device__ __forceinline__ float power(float base, int exponent) {
    float result = 1;
    for (; exponent; exponent >>= 1, base *= base)
        if (exponent & 1) result *= base;
    return result;
}

// Writes rows [count, stride] for the tokens from `first` on, a multiple of SPAN. Rows of sinks are 0, and so are elements from
// the last input up to `padded`.
extern "C" __global__ void __launch_bounds__(THREADS) inputs(
    const u16 *vectors, const int *tokens, i64 width, i64 reach, const float *decays, const float *sums, i64 first,
    i64 count, i64 sinks, u16 *rows, i64 stride, i64 padded) {
    int span = (int)(first / SPAN) + blockIdx.x;
    i64 begin = (i64)span * SPAN, end = begin + SPAN < first + count ? begin + SPAN : first + count;
    rows += (begin - first) * stride;
    for (int m = threadIdx.x; m < reach; m += THREADS) {
        float total[DECAYS], weight[DECAYS];
#pragma unroll
        for (int i = 0; i < DECAYS; i++) {
            float whole = power(decays[i], SPAN), factor = 1;
            total[i] = 0, weight[i] = (1 - power(decays[i], (int)begin)) / (1 - decays[i]);
            for (int before = span - 1; before >= 0 && factor > 1e-9f; before--, factor *= whole)
                total[i] += factor * sums[(before * DECAYS + i) * reach + m];
        }
        for (i64 t = begin; t < end; t++) {
            u16 *row = rows + (t - begin) * stride + width + m;
#pragma unroll
            for (int lag = 1; lag <= LAGS; lag++)
                row[(lag - 1) * reach] = t < sinks || t < lag ? 0 : vectors[tokens[t - lag] * width + m];
            float value = from_half(vectors[tokens[t] * width + m]);
#pragma unroll
            for (int i = 0; i < DECAYS; i++) {
                row[(LAGS + i) * reach] = t < sinks || t == 0 ? 0 : (u16)to_halves(total[i] / weight[i], 0);
                total[i] = total[i] * decays[i] + value, weight[i] = weight[i] * decays[i] + 1;
            }
        }
    }
    i64 places = width + (LAGS + DECAYS) * reach;
    for (i64 t = begin; t < end; t++) {
        u16 *row = rows + (t - begin) * stride;
        for (int e = threadIdx.x; e < width; e += THREADS) row[e] = t < sinks ? 0 : vectors[tokens[t] * width + e];
        float n = t < 2047 ? (float)t : 2047;
        u32 held[3] = {to_halves(1, 0), to_halves(log1pf(n) / 8, 0), to_halves(1 / sqrtf(n + 1), 0)};
        for (int e = threadIdx.x; e < padded - places; e += THREADS) row[places + e] = e > 2 || t < sinks ? 0 : (u16)held[e];
    }
}

// Sets negative fp16 numbers to 0: the first `width`, a multiple of 8, of rows [count, stride]. A thread handles eight.
extern "C" __global__ void __launch_bounds__(THREADS) rectify(u16 *rows, i64 count, i64 stride, i64 width) {
    i64 i = (i64)blockIdx.x * THREADS + threadIdx.x, row = i / (width / 8);
    if (row >= count) return;
    uint4 *at = (uint4 *)(rows + row * stride) + i % (width / 8), v = *at;
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] &= ~((words[j] >> 15 & 0x10001) * 0xFFFF);
    *at = make_uint4(words[0], words[1], words[2], words[3]);
}
