/* Fences: the only place where training waits for the engine. */
#include "cuda/cuda.h"

#include <errno.h>

/* What a look at the checkpoints in flight found. */
struct finding {
    const struct fx_stream *streams; /* asked: a copy that was issued for them counts as done */
    uint32_t n_streams;
    bool done;                     /* nothing of the layer is left to copy */
    struct fx_checkpoint *ck;      /* a piece that the caller may copy, ... */
    uint32_t piece;                /* ... or NOTHING */
    struct fx_checkpoint *starved; /* has a piece without room whose chunk waits for an emit */
};

static bool is_in(const struct fx_checkpoint *ck, int64_t layer) {
    return layer < 0 || (uint64_t)layer < ck->plan->n_layers;
}

/* A layer that the copier thread copies: there is nothing to help with. */
static void look_at_device_layer(struct fx_checkpoint *ck, uint32_t layer, struct finding *found) {
    const struct plan_layer *l = &ck->plan->layers[layer];
    bool covered = fx_cuda_covers(ck->layers[layer].devices, found->streams, found->n_streams);
    for (uint32_t i = 0; i < l->n_pieces; i++) {
        uint32_t piece = ck->plan->layer_pieces[l->first_piece + i];
        if (ck->pieces[piece] == DONE || (ck->pieces[piece] == ISSUED && covered)) continue;
        if (FX_KEEPS(NO_FENCE_ISSUED)) found->done = false;
        bool room = ck->chunks[ck->plan->pieces[piece].chunk].staging || fx_staging_has_room(ck->engine);
        if (ck->pieces[piece] == IDLE && !room) found->starved = ck;
    }
}

/* Looks through one layer of one checkpoint; true once a piece to help with was found. */
static bool look_at_layer(struct fx_checkpoint *ck, uint32_t layer, struct finding *found) {
    const struct plan_layer *l = &ck->plan->layers[layer];
    if (!ck->layers[layer].emitted || !ck->layers[layer].left) return false;
    if (ck->layers[layer].devices) {
        look_at_device_layer(ck, layer, found);
        return false;
    }
    found->done = false;
    for (uint32_t i = 0; i < l->n_pieces; i++) {
        uint32_t piece = ck->plan->layer_pieces[l->first_piece + i];
        struct ck_chunk *chunk = &ck->chunks[ck->plan->pieces[piece].chunk];
        if (ck->pieces[piece] != IDLE) continue;
        if (chunk->staging || fx_staging_has_room(ck->engine)) {
            found->ck = ck;
            found->piece = piece;
            return true;
        }
        if (chunk->layers_left) found->starved = ck;
    }
    return false;
}

static struct finding look(struct fx_engine *engine, int64_t layer, const struct fx_stream *streams,
                           uint32_t n_streams) {
    struct finding found = {.streams = streams, .n_streams = n_streams, .done = true, .piece = NOTHING};
    for (struct fx_checkpoint *ck = engine->oldest; ck; ck = ck->next) {
        if (!is_in(ck, layer) || !ck->left) continue;
        uint32_t first = layer < 0 ? 0 : (uint32_t)layer, end = layer < 0 ? ck->plan->n_layers : first + 1;
        for (uint32_t i = first; i < end; i++)
            if (look_at_layer(ck, i, &found)) return found;
    }
    return found;
}

/* Lock held on entry and return. The chunk cannot be taken by a writer meanwhile: it has a helper. */
static void help(struct fx_engine *engine, struct fx_checkpoint *ck, uint32_t piece) {
    struct ck_chunk *chunk = &ck->chunks[ck->plan->pieces[piece].chunk];
    if (!chunk->staging) chunk->staging = fx_staging_take(engine);
    if (!chunk->staging) return; /* no memory after all: the limit was lowered, the next look finds no room */
    chunk->helpers++;
    fx_take_piece(ck, piece);
    fx_unlock(engine);
    int64_t start = fx_now();
    fx_copy_piece(ck, piece, chunk->staging);
    engine->copy_ns += (uint64_t)(fx_now() - start);
    struct fx_span span = {.checkpoint = ck->id, .layer = ck->plan->pieces[piece].layer, .chunk = ck->plan->pieces[piece].chunk};
    fx_span_add(engine, FX_SPAN_HELP, 0, start, span);
    fx_lock(engine);
    fx_end_help(ck, piece);
}

/* Whether a staging buffer will come free without another emit: some holder is being filled or can be
 * written. */
static bool room_will_come(const struct fx_engine *engine) {
    if (engine->staging.away) return true;
    for (const struct fx_checkpoint *ck = engine->oldest; ck; ck = ck->next)
        for (uint32_t i = 0; i < ck->plan->n_chunks; i++)
            if (ck->chunks[i].staging && (ck->chunks[i].helpers || !ck->chunks[i].layers_left)) return true;
    return false;
}

/* Lock held. Helps, waits, or fails a checkpoint that would make us wait for an emit that may never come. */
static int pass(struct fx_engine *engine, int64_t layer, int64_t deadline, const struct fx_stream *streams,
                uint32_t n_streams) {
    for (;;) {
        struct finding found = look(engine, layer, streams, n_streams);
        if (found.done) return 1;
        if (found.piece != NOTHING) {
            help(engine, found.ck, found.piece);
            if (fx_now() >= deadline) return look(engine, layer, streams, n_streams).done;
        } else if (found.starved && !room_will_come(engine)) {
            fx_give_up(found.starved, FAILED,
                       "fence: no staging room for a chunk that waits for another layer", "", -1, ENOBUFS);
            fx_settle(found.starved);
        } else if (!fx_wait(engine, deadline)) {
            return 0;
        }
    }
}

int fx_fence(struct fx_engine *engine, int64_t layer, int64_t timeout_ns) {
    return fx_fence_for(engine, layer, timeout_ns, NULL, 0);
}

int fx_fence_for(struct fx_engine *engine, int64_t layer, int64_t timeout_ns, const struct fx_stream *streams,
                 uint32_t n_streams) {
    if (!atomic_load_explicit(&engine->pending, memory_order_acquire)) return 1;
    fx_lock(engine);
    int r = look(engine, layer, streams, n_streams).done;
    if (!r) {
        int64_t start = fx_now();
        r = pass(engine, layer, fx_deadline(timeout_ns), streams, n_streams);
        engine->stall_ns += (uint64_t)(fx_now() - start);
        fx_span_add(engine, FX_SPAN_FENCE, 0, start, (struct fx_span){.layer = layer, .chunk = -1});
    }
    if (r == 1) fx_cuda_order(engine, layer, streams, n_streams);
    fx_unlock(engine);
    return r;
}
