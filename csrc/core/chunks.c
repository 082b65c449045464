/* Geometry: cuts files into chunks, and what lies in them into extents and pieces. Immutable once made. */
#include "core/plan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A contiguous range of a file and what it holds. */
struct span {
    uint32_t file, layer, tensor; /* layer: NOTHING for the header */
    uint64_t begin, end;
};

static int by_place(const void *a, const void *b) {
    const struct span *x = a, *y = b;
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

/* What a builder needs while it walks the spans in file order. */
struct builder {
    struct fx_plan *plan;
    struct span *spans;
    uint32_t n_spans;
    uint32_t *piece_of_layer; /* in the chunk at hand, if pieces[] agrees */
    uint32_t extents_room, pieces_room;
};

static int bad(struct fx_error *error, const char *operation, int64_t offset) {
    return fx_error_set(error, operation, "", offset, EINVAL);
}

static int check(const struct fx_file *files, uint32_t n_files, const struct fx_tensor *tensors,
                 uint32_t n_tensors, uint32_t n_layers, uint64_t chunk_bytes, uint64_t sum_bytes,
                 struct fx_error *error) {
    if (!chunk_bytes || chunk_bytes % FX_BLOCK || chunk_bytes > 1u << 30)
        return bad(error, "plan: chunk size", -1);
    if (!sum_bytes || sum_bytes % FX_BLOCK || chunk_bytes % sum_bytes)
        return bad(error, "plan: bytes of a checksum", -1);
    for (uint32_t i = 0; i < n_files; i++) {
        if (files[i].nbytes % FX_BLOCK) return bad(error, "plan: file size is no multiple of 4096", i);
        if (files[i].header_nbytes > files[i].nbytes) return bad(error, "plan: header exceeds its file", i);
    }
    for (uint32_t i = 0; i < n_tensors; i++) {
        const struct fx_tensor *t = &tensors[i];
        if (t->layer >= n_layers || t->file >= n_files)
            return bad(error, "plan: tensor names no such layer or file", i);
        if (!t->itemsize || t->nbytes % t->itemsize)
            return bad(error, "plan: tensor is no whole number of items", i);
        uint64_t end = files[t->file].nbytes;
        if (t->offset > end || t->nbytes > end - t->offset)
            return bad(error, "plan: tensor exceeds its file", i);
    }
    return 0;
}

/* Tensors by layer, keeping their order; spans of what is not empty. */
static int place(struct builder *b, const struct fx_tensor *tensors, uint32_t n_tensors,
                 const struct fx_file *files) {
    struct fx_plan *plan = b->plan;
    for (uint32_t i = 0; i < n_tensors; i++) plan->layers[tensors[i].layer].n_tensors++;
    for (uint32_t i = 1; i < plan->n_layers; i++)
        plan->layers[i].first_tensor = plan->layers[i - 1].first_tensor + plan->layers[i - 1].n_tensors;
    for (uint32_t i = 0; i < plan->n_layers; i++) plan->layers[i].n_tensors = 0;
    for (uint32_t i = 0; i < plan->n_files; i++)
        if (files[i].header_nbytes)
            b->spans[b->n_spans++] = (struct span){i, NOTHING, 0, 0, files[i].header_nbytes};
    for (uint32_t i = 0; i < n_tensors; i++) {
        const struct fx_tensor *t = &tensors[i];
        struct plan_layer *layer = &plan->layers[t->layer];
        uint32_t index = layer->n_tensors++;
        plan->tensors[layer->first_tensor + index] = (struct plan_tensor){t->nbytes, t->itemsize};
        if (t->nbytes)
            b->spans[b->n_spans++] = (struct span){t->file, t->layer, index, t->offset,
                                                   t->offset + t->nbytes};
    }
    qsort(b->spans, b->n_spans, sizeof *b->spans, by_place);
    for (uint32_t i = 1; i < b->n_spans; i++)
        if (b->spans[i].file == b->spans[i - 1].file && b->spans[i].begin < b->spans[i - 1].end)
            return -EINVAL;
    return 0;
}

static void *grow(void *array, uint32_t n, uint32_t *room, size_t item) {
    if (n < *room) return array;
    *room = *room ? *room * 2 : 64;
    return realloc(array, *room * item);
}

/* The piece that `layer` has in `chunk`, made at its first extent. NOTHING: no memory. */
static uint32_t piece_of(struct builder *b, uint32_t layer, uint32_t chunk) {
    struct fx_plan *plan = b->plan;
    uint32_t known = b->piece_of_layer[layer];
    if (known < plan->n_pieces && plan->pieces[known].layer == layer && plan->pieces[known].chunk == chunk)
        return known;
    struct piece *pieces = grow(plan->pieces, plan->n_pieces, &b->pieces_room, sizeof *pieces);
    if (!pieces) return NOTHING;
    plan->pieces = pieces;
    pieces[plan->n_pieces] = (struct piece){layer, chunk};
    plan->chunks[chunk].n_pieces++;
    plan->layers[layer].n_pieces++;
    return b->piece_of_layer[layer] = plan->n_pieces++;
}

static int add_extent(struct builder *b, uint32_t chunk, struct extent extent) {
    struct extent *extents = grow(b->plan->extents, b->plan->n_extents, &b->extents_room, sizeof *extents);
    if (!extents) return -ENOMEM;
    b->plan->extents = extents;
    extents[b->plan->n_extents++] = extent;
    b->plan->chunks[chunk].n_extents++;
    return 0;
}

/* The part of a span (NULL: of a hole) that lies between two offsets of one chunk. */
static int add_part(struct builder *b, uint32_t chunk, const struct span *span, uint64_t begin,
                    uint64_t end) {
    struct extent extent = {.piece = PIECE_OF_NOBODY,
                            .at = (uint32_t)(begin - b->plan->chunks[chunk].offset),
                            .nbytes = (uint32_t)(end - begin)};
    if (begin == end) return 0;
    if (span) {
        extent.from = begin - span->begin;
        extent.tensor = span->tensor;
        extent.piece = PIECE_OF_HEADER;
        if (span->layer != NOTHING) {
            extent.piece = piece_of(b, span->layer, chunk);
            if (extent.piece == NOTHING) return -ENOMEM;
        }
    }
    return add_extent(b, chunk, extent);
}

/* Fills one chunk; *next is the first span that ends after the chunk's begin. */
static int cut_chunk(struct builder *b, uint32_t chunk, uint32_t *next) {
    struct chunk *c = &b->plan->chunks[chunk];
    uint64_t at = c->offset, end = c->offset + c->nbytes;
    c->first_extent = b->plan->n_extents;
    c->first_piece = b->plan->n_pieces;
    for (; *next < b->n_spans; ++*next) {
        const struct span *span = &b->spans[*next];
        if (span->file != c->file || span->begin >= end) break;
        uint64_t begin = span->begin > c->offset ? span->begin : c->offset;
        uint64_t stop = span->end < end ? span->end : end;
        int r = add_part(b, chunk, NULL, at, begin);
        if (!r) r = add_part(b, chunk, span, begin, stop);
        if (r) return r;
        at = stop;
        if (span->end > end) break; /* it goes on in the next chunk */
    }
    return add_part(b, chunk, NULL, at, end);
}

static int cut(struct builder *b) {
    struct fx_plan *plan = b->plan;
    uint32_t next = 0;
    for (uint32_t f = 0; f < plan->n_files; f++) {
        for (uint32_t i = 0; i < plan->files[f].n_chunks; i++) {
            uint32_t chunk = plan->files[f].first_chunk + i;
            uint64_t offset = i * plan->chunk_bytes, rest = plan->files[f].nbytes - offset;
            plan->chunks[chunk].file = f;
            plan->chunks[chunk].offset = offset;
            plan->chunks[chunk].nbytes = (uint32_t)(rest < plan->chunk_bytes ? rest : plan->chunk_bytes);
            int r = cut_chunk(b, chunk, &next);
            if (r) return r;
        }
    }
    return 0;
}

static int index_pieces(struct fx_plan *plan) {
    plan->layer_pieces = calloc(plan->n_pieces + 1, sizeof *plan->layer_pieces);
    if (!plan->layer_pieces) return -ENOMEM;
    for (uint32_t i = 1; i < plan->n_layers; i++)
        plan->layers[i].first_piece = plan->layers[i - 1].first_piece + plan->layers[i - 1].n_pieces;
    for (uint32_t i = 0; i < plan->n_layers; i++) plan->layers[i].n_pieces = 0;
    for (uint32_t p = 0; p < plan->n_pieces; p++) {
        struct plan_layer *layer = &plan->layers[plan->pieces[p].layer];
        plan->layer_pieces[layer->first_piece + layer->n_pieces++] = p;
    }
    return 0;
}

static int copy_files(struct fx_plan *plan, const struct fx_file *files) {
    for (uint32_t i = 0; i < plan->n_files; i++) {
        struct plan_file *file = &plan->files[i];
        file->nbytes = files[i].nbytes;
        file->header_nbytes = files[i].header_nbytes;
        file->first_chunk = plan->n_chunks;
        file->n_chunks = (uint32_t)((file->nbytes + plan->chunk_bytes - 1) / plan->chunk_bytes);
        plan->n_chunks += file->n_chunks;
        file->first_sum = plan->n_sums;
        file->n_sums = (uint32_t)((file->nbytes + plan->sum_bytes - 1) / plan->sum_bytes);
        plan->n_sums += file->n_sums;
        file->header = malloc(file->header_nbytes + 1);
        if (!file->header) return -ENOMEM;
        if (file->header_nbytes) memcpy(file->header, files[i].header, file->header_nbytes);
    }
    plan->chunks = calloc(plan->n_chunks + 1, sizeof *plan->chunks);
    return plan->chunks ? 0 : -ENOMEM;
}

static int build(struct builder *b, const struct fx_file *files, const struct fx_tensor *tensors,
                 uint32_t n_tensors, struct fx_error *error) {
    struct fx_plan *plan = b->plan;
    plan->files = calloc(plan->n_files + 1, sizeof *plan->files);
    plan->layers = calloc(plan->n_layers + 1, sizeof *plan->layers);
    plan->tensors = calloc(n_tensors + 1, sizeof *plan->tensors);
    b->spans = calloc((size_t)plan->n_files + n_tensors + 1, sizeof *b->spans);
    b->piece_of_layer = calloc(plan->n_layers + 1, sizeof *b->piece_of_layer);
    if (!plan->files || !plan->layers || !plan->tensors || !b->spans || !b->piece_of_layer) goto no_memory;
    if (copy_files(plan, files)) goto no_memory;
    if (place(b, tensors, n_tensors, files)) return bad(error, "plan: tensors overlap", -1);
    if (cut(b) || index_pieces(plan)) goto no_memory;
    return 0;
no_memory:
    return fx_error_set(error, "plan", "", -1, ENOMEM);
}

int fx_plan_new(const struct fx_file *files, uint32_t n_files, const struct fx_tensor *tensors,
                uint32_t n_tensors, uint32_t n_layers, uint64_t chunk_bytes, uint64_t sum_bytes,
                struct fx_plan **out, struct fx_error *error) {
    int r = check(files, n_files, tensors, n_tensors, n_layers, chunk_bytes, sum_bytes, error);
    if (r) return r;
    struct builder b = {.plan = calloc(1, sizeof *b.plan)};
    if (!b.plan) return fx_error_set(error, "plan", "", -1, ENOMEM);
    b.plan->refs = 1;
    b.plan->chunk_bytes = chunk_bytes;
    b.plan->sum_bytes = sum_bytes;
    b.plan->n_files = n_files;
    b.plan->n_layers = n_layers;
    r = build(&b, files, tensors, n_tensors, error);
    free(b.spans);
    free(b.piece_of_layer);
    if (r) fx_plan_free(b.plan);
    else *out = b.plan;
    return r;
}

void fx_plan_hold(struct fx_plan *plan) { atomic_fetch_add(&plan->refs, 1); }

void fx_plan_free(struct fx_plan *plan) {
    if (atomic_fetch_sub(&plan->refs, 1) != 1) return;
    for (uint32_t i = 0; plan->files && i < plan->n_files; i++) free(plan->files[i].header);
    free(plan->files);
    free(plan->layers);
    free(plan->tensors);
    free(plan->chunks);
    free(plan->extents);
    free(plan->pieces);
    free(plan->layer_pieces);
    free(plan);
}

uint32_t fx_plan_chunks(const struct fx_plan *plan) { return plan->n_chunks; }

uint32_t fx_plan_sums(const struct fx_plan *plan) { return plan->n_sums; }

void fx_plan_file_sums(const struct fx_plan *plan, uint32_t file, uint32_t *first, uint32_t *count) {
    *first = plan->files[file].first_sum;
    *count = plan->files[file].n_sums;
}
