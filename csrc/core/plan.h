/* Geometry of a checkpoint's files, and where layers lie in memory: what chunks.c and sources.c make, immutable. */
#ifndef FX_PLAN_H
#define FX_PLAN_H

#include "engine.h"

#include <stdatomic.h>
#include <stdbool.h>

#define NOTHING UINT32_MAX

/* ---- chunks.c ---- */

enum { PIECE_OF_HEADER = NOTHING - 1, PIECE_OF_NOBODY = NOTHING }; /* extents that need no emit */

/* Bytes of one tensor (or of the header, or of nobody: zeros) that lie in one chunk. */
struct extent {
    uint32_t piece;
    uint32_t tensor; /* index within its layer's sources */
    uint64_t from;   /* offset in the tensor or header */
    uint32_t at;     /* offset in the chunk */
    uint32_t nbytes;
};

struct piece {
    uint32_t layer, chunk;
};

struct chunk {
    uint64_t offset; /* in the file */
    uint32_t file, nbytes;
    uint32_t first_extent, n_extents; /* in order of `at` */
    uint32_t first_piece, n_pieces;
};

struct plan_file {
    uint64_t nbytes;
    char *header;
    uint64_t header_nbytes;
    uint32_t first_chunk, n_chunks, first_sum, n_sums;
};

struct plan_layer {
    uint32_t first_tensor, n_tensors; /* in tensors[] */
    uint32_t first_piece, n_pieces;   /* in layer_pieces[] */
};

struct plan_tensor {
    uint64_t nbytes, itemsize;
};

struct fx_plan {
    atomic_int refs;
    uint64_t chunk_bytes, sum_bytes;
    uint32_t n_files, n_layers, n_chunks, n_sums, n_pieces, n_extents;
    struct plan_file *files;
    struct plan_layer *layers;
    struct plan_tensor *tensors; /* by layer, in the order of its sources */
    struct chunk *chunks;
    struct extent *extents;
    struct piece *pieces;   /* by chunk */
    uint32_t *layer_pieces; /* by layer, in file order */
};

void fx_plan_hold(struct fx_plan *plan);

/* The first checksum of a chunk, in the plan's numbering, and how many it has. */
static inline uint32_t fx_first_sum(const struct fx_plan *plan, const struct chunk *chunk) {
    return plan->files[chunk->file].first_sum + (uint32_t)(chunk->offset / plan->sum_bytes);
}
static inline uint32_t fx_sums_of(const struct fx_plan *plan, const struct chunk *chunk) {
    return (uint32_t)((chunk->nbytes + plan->sum_bytes - 1) / plan->sum_bytes);
}

/* ---- sources.c ---- */

struct fx_sources {
    atomic_int refs;
    uint32_t n;
    uint64_t devices; /* bit i: a tensor lies on CUDA device i */
    struct fx_view views[]; /* sizes and strides follow in the same allocation */
};

void fx_sources_hold(struct fx_sources *sources);
/* Whether they have the layer's number of tensors, with the planned sizes. */
bool fx_sources_fit(struct fx_sources *sources, const struct fx_plan *plan, uint32_t layer);

#endif
