/* Tables of checksums: of blocks of memory, and as the decimal text that a record has, half a million numbers in milliseconds. */
#include "engine.h"

#include <stdbool.h>

void fx_crc32c_blocks(uint32_t *crcs, uint64_t block, uint64_t offset, const void *data, size_t n) {
    const char *from = data;
    for (size_t part; n; n -= part, offset += part, from += part) {
        uint64_t rest = block - offset % block;
        part = n < rest ? n : (size_t)rest;
        crcs[offset / block] = fx_crc32c(crcs[offset / block], from, part);
    }
}

size_t fx_sums_text(const uint32_t *crcs, size_t n, char *out) {
    char *to = out;
    for (size_t i = 0; i < n; i++) {
        char digits[10];
        int left = 10;
        uint32_t rest = crcs[i];
        do digits[--left] = (char)('0' + rest % 10);
        while (rest /= 10);
        if (i) *to++ = ',';
        while (left < 10) *to++ = digits[left++];
    }
    return (size_t)(to - out);
}

int64_t fx_sums_parse(const char *text, size_t n, uint32_t *crcs) {
    int64_t count = 0;
    for (size_t at = 0; at < n; at++) {
        uint64_t value = 0;
        size_t begin = at;
        for (; at < n && text[at] >= '0' && text[at] <= '9' && at - begin < 11; at++)
            value = value * 10 + (uint64_t)(text[at] - '0');
        bool is_number = at > begin && value <= UINT32_MAX && (text[begin] != '0' || at == begin + 1);
        if (!is_number || (at < n && text[at] != ',') || at + 1 == n) return -1;
        if (crcs) crcs[count] = (uint32_t)value;
        count++;
    }
    return count;
}
