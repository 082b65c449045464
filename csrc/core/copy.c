/* Copies the caller's memory to its place in a chunk: single pieces, or a whole chunk with its checksum. */
#include "core/internal.h"

#include <string.h>

static struct part part_of(const struct fx_checkpoint *ck, const struct extent *extent) {
    const struct fx_plan *plan = ck->plan;
    uint32_t layer = plan->pieces[extent->piece].layer;
    return (struct part){
        .view = &ck->layers[layer].sources->views[extent->tensor],
        .itemsize = plan->tensors[plan->layers[layer].first_tensor + extent->tensor].itemsize,
        .from = extent->from,
        .nbytes = extent->nbytes,
        .at = extent->at,
    };
}

bool fx_next_part(const struct fx_checkpoint *ck, uint32_t piece, uint32_t *next, struct part *out) {
    const struct chunk *chunk = &ck->plan->chunks[ck->plan->pieces[piece].chunk];
    while (*next < chunk->n_extents) {
        const struct extent *extent = &ck->plan->extents[chunk->first_extent + (*next)++];
        if (extent->piece != piece) continue;
        *out = part_of(ck, extent);
        return true;
    }
    return false;
}

void fx_copy_piece(const struct fx_checkpoint *ck, uint32_t piece, char *to) {
    struct part part;
    for (uint32_t next = 0; fx_next_part(ck, piece, &next, &part);)
        if (!part.view->device) fx_view_gather(part.view, part.itemsize, part.from, part.nbytes, to + part.at);
}

/* Gathers one part and continues the checksum over it, in blocks that stay in the cache between the two. */
static uint32_t fill_from_memory(struct part part, char *to, uint32_t crc) {
    if (part.view->ndim < 0) return fx_copy_crc32c(crc, to, part.view->address + part.from, part.nbytes);
    const uint64_t block = 64 << 10;
    for (uint64_t at = 0; at < part.nbytes; at += block) {
        uint64_t n = part.nbytes - at < block ? part.nbytes - at : block;
        fx_view_gather(part.view, part.itemsize, part.from + at, n, to + at);
        crc = fx_crc32c(crc, to + at, n);
    }
    return crc;
}

/* Fills in `n` bytes of an extent, which begin `at` bytes into it, and continues the checksum over them. Pieces that are DONE
 * were put there by fences or devices. */
static uint32_t fill(const struct fx_checkpoint *ck, const struct chunk *chunk, const struct extent *extent, uint32_t at,
                     uint32_t n, char *to, uint32_t crc) {
    to += extent->at + at;
    if (extent->piece == PIECE_OF_NOBODY) memset(to, 0, n);
    else if (extent->piece == PIECE_OF_HEADER) memcpy(to, ck->plan->files[chunk->file].header + extent->from + at, n);
    else if (ck->pieces[extent->piece] == TAKEN) {
        struct part part = part_of(ck, extent);
        part.from += at;
        part.nbytes = n;
        return fill_from_memory(part, to, crc);
    }
    return fx_crc32c(crc, to, n);
}

/* Extents are cut where a checksum ends. */
void fx_fill_chunk(struct fx_checkpoint *ck, uint32_t index, char *to) {
    const struct fx_plan *plan = ck->plan;
    const struct chunk *chunk = &plan->chunks[index];
    uint32_t *crcs = ck->crcs + fx_first_sum(plan, chunk), sum = (uint32_t)plan->sum_bytes;
    for (uint32_t i = 0; i < chunk->n_extents; i++) {
        const struct extent *extent = &plan->extents[chunk->first_extent + i];
        for (uint32_t at = 0, n; at < extent->nbytes; at += n) {
            uint32_t *crc = &crcs[(extent->at + at) / sum], rest = sum - (extent->at + at) % sum;
            n = extent->nbytes - at < rest ? extent->nbytes - at : rest;
            *crc = fill(ck, chunk, extent, at, n, to, *crc);
        }
    }
}
