// What all kernels of rANS share. META ints are known of each part's stream; MODE, TABLES, ... are their positions. These and
// all other names in capitals that no source defines come from kernels/constants.py.
static_assert(TOTAL == 4096 && REST == 63 && LEVEL_COUNT <= 48, "entries and slots have fields for 12-bit frequencies and 6-bit codes");

// The bits of the largest of some values, 0 if it is 0.
__device__ __forceinline__ int bits_for(u32 most) { return most ? 32 - __clz(most) : 0; }

// The number of channels, over all parts, up to the end of a group's scratch.
__device__ __forceinline__ i64 words_end(i64 part, int group, int per_lane, i64 groups_most) {
    i64 channels = (i64)(group + 1) * 32 * per_lane;
    return part * groups_most * 32 + (channels < groups_most * 32 ? channels : groups_most * 32);
}
