/* The steps of a checkpoint's life, small and under the lock: pieces taken and finished, chunks ready and
 * written, the end. */
#include "core/sink.h"
#include "cuda/cuda.h"

#include <errno.h>
#include <stdlib.h>

/* ---- pieces ---- */

void fx_take_piece(struct fx_checkpoint *ck, uint32_t piece) {
    ck->pieces[piece] = TAKEN;
    ck->taken++;
}

/* The release half of the pair with fx_engine_pending's readers: what was copied was read before this. */
static void piece_done(struct fx_checkpoint *ck, uint32_t piece) {
    ck->pieces[piece] = DONE;
    ck->layers[ck->plan->pieces[piece].layer].left--;
    if (!--ck->left && ck->emitted == ck->plan->n_layers) fx_wake_ends(ck->engine);
    atomic_fetch_sub_explicit(&ck->engine->pending, 1, memory_order_release);
}

void fx_finish_piece(struct fx_checkpoint *ck, uint32_t piece) {
    ck->taken--;
    piece_done(ck, piece);
}

void fx_end_help(struct fx_checkpoint *ck, uint32_t piece) {
    struct ck_chunk *chunk = &ck->chunks[ck->plan->pieces[piece].chunk];
    fx_finish_piece(ck, piece);
    chunk->helpers--;
    if (ck->state != ACTIVE && !chunk->helpers && !chunk->taken && chunk->staging) {
        fx_staging_give(ck->engine, chunk->staging);
        chunk->staging = NULL;
    } else if (!chunk->helpers && !chunk->layers_left) {
        fx_wake_writers(ck->engine); /* one may have passed over this chunk because we were at it */
    }
    fx_wake(ck->engine);
    fx_settle(ck);
}

/* ---- chunks ---- */

void fx_push_ready(struct fx_checkpoint *ck, uint32_t chunk) {
    ck->chunks[chunk].next_ready = NOTHING;
    if (ck->ready_tail == NOTHING) ck->ready_head = chunk;
    else ck->chunks[ck->ready_tail].next_ready = chunk;
    ck->ready_tail = chunk;
}

uint32_t fx_pop_ready(struct fx_checkpoint *ck) {
    uint32_t before = NOTHING, chunk = ck->ready_head;
    /* Then only chunks that have their buffer can be done. */
    bool poor = ck->engine->sink->takes_staging && !ck->engine->staging.n_free;
    while (chunk != NOTHING && (ck->chunks[chunk].helpers || ck->chunks[chunk].device_left ||
                                (poor && !ck->chunks[chunk].staging))) {
        before = chunk;
        chunk = ck->chunks[chunk].next_ready;
    }
    if (chunk == NOTHING) return NOTHING;
    if (before == NOTHING) ck->ready_head = ck->chunks[chunk].next_ready;
    else ck->chunks[before].next_ready = ck->chunks[chunk].next_ready;
    if (ck->ready_tail == chunk) ck->ready_tail = before;
    return chunk;
}

void fx_chunk_written(struct fx_checkpoint *ck, uint32_t chunk) {
    struct ck_file *file = &ck->files[ck->plan->chunks[chunk].file];
    ck->chunks_left--;
    if (--file->chunks_left == 0) ck->syncs_waiting++;
}

void fx_check_durable(struct fx_checkpoint *ck) {
    if (ck->state != ACTIVE || ck->files_left || ck->emitted < ck->plan->n_layers) return;
    ck->state = DURABLE;
    fx_wake(ck->engine);
    fx_wake_ends(ck->engine);
}

/* ---- the end ---- */

static void give_back_staging(struct fx_checkpoint *ck) {
    for (uint32_t i = 0; i < ck->plan->n_chunks; i++) {
        struct ck_chunk *chunk = &ck->chunks[i];
        if (!chunk->staging || chunk->helpers || chunk->taken) continue; /* who uses it gives it back */
        fx_staging_give(ck->engine, chunk->staging);
        chunk->staging = NULL;
    }
}

void fx_give_up(struct fx_checkpoint *ck, enum state state, const char *operation, const char *path,
                int64_t offset, int err) {
    if (ck->state != ACTIVE) return;
    ck->state = state;
    fx_error_set(&ck->error, operation, path, offset, err);
    ck->ready_head = ck->ready_tail = NOTHING;
    ck->syncs_waiting = 0;
    for (uint32_t p = 0; p < ck->plan->n_pieces; p++)
        if (ck->pieces[p] == IDLE && ck->layers[ck->plan->pieces[p].layer].emitted) piece_done(ck, p);
    give_back_staging(ck);
    fx_wake(ck->engine);
    fx_wake_ends(ck->engine);
    fx_wake_writers(ck->engine); /* to close its files */
}

void fx_fail(struct fx_checkpoint *ck, const struct fx_error *error) {
    fx_give_up(ck, FAILED, error->operation, error->path, error->offset, error->err);
}

bool fx_has_open_files(const struct fx_checkpoint *ck) {
    for (uint32_t i = 0; i < ck->plan->n_files; i++)
        if (ck->files[i].fd >= 0) return true;
    return false;
}

static void unlink_from_list(struct fx_checkpoint *ck) {
    struct fx_engine *engine = ck->engine;
    *(ck->previous ? &ck->previous->next : &engine->oldest) = ck->next;
    *(ck->next ? &ck->next->previous : &engine->newest) = ck->previous;
}

void fx_checkpoint_destroy(struct fx_checkpoint *ck) {
    for (uint32_t i = 0; ck->files && i < ck->plan->n_files; i++) free(ck->files[i].path);
    for (uint32_t i = 0; ck->layers && i < ck->plan->n_layers; i++) fx_sources_free(ck->layers[i].sources);
    fx_cuda_forget(ck);
    fx_plan_free(ck->plan);
    free(ck->files);
    free(ck->chunks);
    free(ck->layers);
    free(ck->pieces);
    free(ck->crcs);
    free(ck->known);
    free(ck->has_known);
    free(ck);
}

void fx_settle(struct fx_checkpoint *ck) {
    if (!ck->settled) {
        if (ck->state == ACTIVE || ck->working || ck->taken || fx_has_open_files(ck)) return;
        ck->settled = true;
        unlink_from_list(ck);
        fx_wake(ck->engine);
        fx_wake_ends(ck->engine);
    }
    if (!ck->released) return;
    ck->engine->refs--; /* never the last: whoever calls this holds one */
    fx_checkpoint_destroy(ck);
}
