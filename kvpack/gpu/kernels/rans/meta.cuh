// What is known of each part's stream: META ints a part, by these positions.
#define META 16
#define MODE 0
#define TABLES 1
#define ALPHABET 2
#define PER_LANE 3
#define GROUPS 4
#define LANES 5
#define SPREAD 6
#define SHORTEST 7
#define WORDS 8
#define SLOT_BYTES 9
#define FAULT 10

#define PACKED 0
#define CODED 1
#define LOW (1u << 15)
#define MAX_TABLES 64
#define MAX_SYMBOLS 256
#define MAX_ENTRIES (MAX_TABLES * MAX_SYMBOLS)
#define MAX_SLOTS 4352
#define REST 63

__device__ __forceinline__ int bits_for(u32 most) { return most ? 32 - __clz(most) : 0; }

// Channels before the end of a group's scratch, over all parts.
__device__ __forceinline__ i64 words_end(i64 part, int group, int per_lane, i64 groups_most) {
    i64 channels = (i64)(group + 1) * 32 * per_lane;
    return part * groups_most * 32 + (channels < groups_most * 32 ? channels : groups_most * 32);
}
