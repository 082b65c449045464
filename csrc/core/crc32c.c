/* CRC-32C: three interleaved streams of the crc32 instruction, or slice-by-8 tables.
 *
 * The instruction has a latency of three cycles and a throughput of one, so one stream runs at a third of the
 * speed. Three neighbouring stretches are checksummed at once and joined: a CRC is linear, so the CRC of A
 * followed by B is "CRC of A moved over |B| zero bytes" xor "CRC of B from zero", and moving over a fixed
 * length is four table look-ups. The method is Mark Adler's (crc32c.c, 2013). With `to` given, the same loop
 * also stores what it loads: the copy is then nearly free, since the loop waits for memory anyway.
 */
#include "engine.h"

#include <stdbool.h>
#include <string.h>

#define POLYNOMIAL 0x82f63b78u /* reflected 0x1EDC6F41 */
/* Bytes in a stretch, a multiple of 8, of no power of two (such addresses alias in the cache). The longer the
 * better, for the processor's prefetching: over 350 MB, copy and checksum take 23 ms with the longest, 40 ms
 * with 5456. Four rounds of the longest fill a chunk of 4 MiB. */
enum { LONG = 349520, MIDDLE = 8208, SHORT = 272 };

#if defined(__x86_64__)
#include <nmmintrin.h>
#define HARDWARE "sse4.2"
#if defined(__clang__) && __clang_major__ >= 14 /* where the instruction became a feature of its own */
#define TARGET __attribute__((target("sse4.2,crc32")))
#else
#define TARGET __attribute__((target("sse4.2")))
#endif
#define CRC_8(crc, word) ((uint32_t)_mm_crc32_u64(crc, word))
#define CRC_1(crc, byte) ((uint32_t)_mm_crc32_u8(crc, byte))
static bool have_hardware(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#define HARDWARE "armv8-crc"
#define TARGET __attribute__((target("+crc")))
#define CRC_8(crc, word) __crc32cd(crc, word)
#define CRC_1(crc, byte) __crc32cb(crc, byte)
static bool have_hardware(void) { return (getauxval(AT_HWCAP) & (1ul << 7)) != 0; /* HWCAP_CRC32 */ }
#endif

#define INLINE TARGET static inline __attribute__((always_inline))

static uint32_t slices[8][256];    /* slices[k][b]: byte b followed by k zero bytes */
static uint32_t over_long[4][256]; /* byte k of a CRC moved over LONG zero bytes */
static uint32_t over_middle[4][256], over_short[4][256];
static bool hardware;

/* Product of two polynomials modulo POLYNOMIAL, both reflected. */
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? (b >> 1) ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

static void fill_over(uint32_t table[4][256], size_t n) {
    uint32_t power = 1u << 31, square = 1u << 30; /* x^0 and x^1 */
    for (uint64_t bits = (uint64_t)n * 8; bits; bits >>= 1) {
        if (bits & 1) power = multiply(power, square);
        square = multiply(square, square);
    }
    for (int k = 0; k < 4; k++)
        for (uint32_t b = 0; b < 256; b++) table[k][b] = multiply(power, b << (8 * k));
}

/* Runs when the library is loaded, before any thread can call us. */
__attribute__((constructor)) static void prepare(void) {
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int i = 0; i < 8; i++) crc = crc & 1 ? (crc >> 1) ^ POLYNOMIAL : crc >> 1;
        slices[0][b] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (uint32_t b = 0; b < 256; b++)
            slices[k][b] = (slices[k - 1][b] >> 8) ^ slices[0][slices[k - 1][b] & 0xff];
    fill_over(over_long, LONG);
    fill_over(over_middle, MIDDLE);
    fill_over(over_short, SHORT);
#ifdef HARDWARE
    hardware = have_hardware();
#endif
}

static inline uint64_t load(const void *at) {
    uint64_t word;
    memcpy(&word, at, 8);
    return word;
}

uint32_t fx_crc32c_portable(uint32_t crc, const void *data, size_t n) {
    const uint8_t *p = data;
    crc = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t low = crc ^ (p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
        crc = slices[7][low & 0xff] ^ slices[6][low >> 8 & 0xff] ^ slices[5][low >> 16 & 0xff] ^
              slices[4][low >> 24] ^ slices[3][p[4]] ^ slices[2][p[5]] ^ slices[1][p[6]] ^ slices[0][p[7]];
    }
    for (; n; n--, p++) crc = crc >> 8 ^ slices[0][(crc ^ *p) & 0xff];
    return ~crc;
}

#ifdef HARDWARE

static inline uint32_t over(uint32_t table[4][256], uint32_t crc) {
    return table[0][crc & 0xff] ^ table[1][crc >> 8 & 0xff] ^ table[2][crc >> 16 & 0xff] ^
           table[3][crc >> 24];
}

/* Whole rounds of three stretches of `stretch` bytes; moves the pointers along. `copy` is a constant in each
 * caller. */
INLINE uint32_t rounds(uint32_t crc, uint8_t **to, const uint8_t **from, size_t *n, const size_t stretch,
                       uint32_t table[4][256], const bool copy) {
    for (; *n >= 3 * stretch; *n -= 3 * stretch, *from += 3 * stretch) {
        const uint8_t *p = *from;
        uint32_t second = 0, third = 0;
        for (const uint8_t *end = p + stretch; p < end; p += 8) {
            uint64_t a = load(p), b = load(p + stretch), c = load(p + 2 * stretch);
            crc = CRC_8(crc, a);
            second = CRC_8(second, b);
            third = CRC_8(third, c);
            if (copy) {
                uint8_t *q = *to + (p - *from);
                memcpy(q, &a, 8);
                memcpy(q + stretch, &b, 8);
                memcpy(q + 2 * stretch, &c, 8);
            }
        }
        crc = over(table, over(table, crc) ^ second) ^ third;
        if (copy) *to += 3 * stretch;
    }
    return crc;
}

INLINE uint32_t in_hardware(uint32_t crc, uint8_t *to, const uint8_t *from, size_t n, const bool copy) {
    crc = ~crc;
    crc = rounds(crc, &to, &from, &n, LONG, over_long, copy);
    crc = rounds(crc, &to, &from, &n, MIDDLE, over_middle, copy);
    crc = rounds(crc, &to, &from, &n, SHORT, over_short, copy);
    if (copy) memcpy(to, from, n);
    for (; n >= 8; n -= 8, from += 8) crc = CRC_8(crc, load(from));
    for (; n; n--, from++) crc = CRC_1(crc, *from);
    return ~crc;
}

TARGET static uint32_t hardware_crc(uint32_t crc, const uint8_t *from, size_t n) {
    return in_hardware(crc, NULL, from, n, false);
}

TARGET static uint32_t hardware_copy(uint32_t crc, uint8_t *to, const uint8_t *from, size_t n) {
    return in_hardware(crc, to, from, n, true);
}

#endif

const char *fx_crc32c_name(void) {
#ifdef HARDWARE
    if (hardware) return HARDWARE;
#endif
    return "portable";
}

uint32_t fx_crc32c(uint32_t crc, const void *data, size_t n) {
#ifdef HARDWARE
    if (hardware) return hardware_crc(crc, data, n);
#endif
    return fx_crc32c_portable(crc, data, n);
}

uint32_t fx_copy_crc32c(uint32_t crc, void *to, const void *from, size_t n) {
#ifdef HARDWARE
    if (hardware) return hardware_copy(crc, to, from, n);
#endif
    memcpy(to, from, n);
    return fx_crc32c_portable(crc, to, n);
}
