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

static void fill_zeros_or_header(const struct fx_checkpoint *ck, const struct chunk *chunk,
                                 const struct extent *extent, char *to) {
    if (extent->piece == PIECE_OF_NOBODY) memset(to, 0, extent->nbytes);
    else memcpy(to, ck->plan->files[chunk->file].header + extent->from, extent->nbytes);
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

/* Pieces that are DONE were put there by fences or devices. */
uint32_t fx_fill_chunk(const struct fx_checkpoint *ck, uint32_t index, char *to) {
    const struct chunk *chunk = &ck->plan->chunks[index];
    uint32_t crc = 0;
    for (uint32_t i = 0; i < chunk->n_extents; i++) {
        const struct extent *extent = &ck->plan->extents[chunk->first_extent + i];
        bool planned = extent->piece < PIECE_OF_HEADER;
        if (planned && ck->pieces[extent->piece] == TAKEN) {
            crc = fill_from_memory(part_of(ck, extent), to + extent->at, crc);
            continue;
        }
        if (!planned) fill_zeros_or_header(ck, chunk, extent, to + extent->at);
        crc = fx_crc32c(crc, to + extent->at, extent->nbytes);
    }
    return crc;
}
