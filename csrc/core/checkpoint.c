/* A checkpoint as its caller sees it: begin, emit, wait, cancel, release. */
#include "core/sink.h"
#include "cuda/cuda.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- begin ---- */

static void *copy_of(const void *data, size_t nbytes) {
    void *copy = malloc(nbytes + 1);
    if (copy && data) memcpy(copy, data, nbytes);
    else if (copy) memset(copy, 0, nbytes);
    return copy;
}

static struct fx_checkpoint *allocate(struct fx_engine *engine, struct fx_plan *plan, int at,
                                      const char *const *paths, const struct fx_held *held) {
    struct fx_checkpoint *ck = calloc(1, sizeof *ck);
    if (!ck) return NULL;
    fx_plan_hold(plan);
    ck->engine = engine;
    ck->plan = plan;
    ck->at = at;
    ck->ready_head = ck->ready_tail = NOTHING;
    ck->files = calloc(plan->n_files + 1, sizeof *ck->files);
    ck->chunks = calloc(plan->n_chunks + 1, sizeof *ck->chunks);
    ck->layers = calloc(plan->n_layers + 1, sizeof *ck->layers);
    ck->pieces = calloc(plan->n_pieces + 1, 1);
    ck->crcs = calloc(plan->n_sums + 1, sizeof *ck->crcs);
    ck->known = copy_of(held ? held->crcs : NULL, plan->n_chunks * sizeof *ck->known);
    ck->has_known = copy_of(held ? held->has : NULL, plan->n_chunks);
    bool complete = ck->files && ck->chunks && ck->layers && ck->pieces && ck->crcs && ck->known &&
                    ck->has_known;
    for (uint32_t i = 0; ck->files && i < plan->n_files; i++) {
        ck->files[i].fd = -1;
        ck->files[i].path = strdup(paths[i]);
        if (held && held->files) ck->files[i].waited = held->files[i];
        complete = complete && ck->files[i].path;
    }
    if (complete) return ck;
    fx_checkpoint_destroy(ck);
    return NULL;
}

/* Lock held: the checkpoint joins the list; chunks that hold no layer are ready at once. */
static void enlist(struct fx_checkpoint *ck) {
    struct fx_engine *engine = ck->engine;
    ck->id = ++engine->ids;
    ck->previous = engine->newest;
    *(engine->newest ? &engine->newest->next : &engine->oldest) = ck;
    engine->newest = ck;
    engine->refs++;
    ck->chunks_left = ck->plan->n_chunks;
    ck->files_left = ck->plan->n_files;
    for (uint32_t i = 0; i < ck->plan->n_files; i++) {
        ck->files[i].chunks_left = ck->plan->files[i].n_chunks;
        if (!ck->files[i].chunks_left) ck->syncs_waiting++;
    }
    for (uint32_t i = 0; i < ck->plan->n_chunks; i++) {
        ck->chunks[i].layers_left = ck->plan->chunks[i].n_pieces;
        if (!ck->chunks[i].layers_left) fx_push_ready(ck, i);
    }
    fx_check_durable(ck);
    fx_settle(ck);
    fx_wake_writers(engine);
}

int fx_begin(struct fx_engine *engine, struct fx_plan *plan, int at, const char *const *paths,
             const struct fx_held *held, struct fx_checkpoint **out, struct fx_error *error) {
    if (plan->chunk_bytes != engine->options.chunk_bytes)
        return fx_error_set(error, "begin: the plan has another chunk size", "", -1, EINVAL);
    struct fx_checkpoint *ck = allocate(engine, plan, at, paths, held);
    if (!ck) return fx_error_set(error, "begin", "", -1, ENOMEM);
    int r = engine->sink->open(ck, error);
    fx_lock(engine);
    if (!r && engine->closing) r = fx_error_set(error, "begin: the engine is closed", "", -1, ECANCELED);
    if (!r) r = engine->sink->admit(engine, error);
    if (!r) enlist(ck);
    fx_unlock(engine);
    if (r) {
        engine->sink->close(ck);
        fx_checkpoint_destroy(ck);
        return r;
    }
    *out = ck;
    return 0;
}

uint64_t fx_file_inode(const struct fx_checkpoint *ck, uint32_t file) { return ck->files[file].inode; }

/* ---- emit ---- */

/* Lock held: the layer's pieces become copyable, and chunks that waited for them only become ready: writers are woken for
 * these, for a thread that wakes takes a core from training. */
static void emit_pieces(struct fx_checkpoint *ck, uint32_t layer, struct fx_sources *sources,
                        struct ck_devices *devices) {
    const struct plan_layer *l = &ck->plan->layers[layer];
    uint32_t ready = 0;
    fx_sources_hold(sources);
    ck->layers[layer].sources = sources;
    ck->layers[layer].devices = devices;
    ck->layers[layer].left = l->n_pieces;
    ck->left += l->n_pieces;
    atomic_fetch_add(&ck->engine->pending, l->n_pieces);
    for (uint32_t i = 0; i < l->n_pieces; i++) {
        uint32_t chunk = ck->plan->pieces[ck->plan->layer_pieces[l->first_piece + i]].chunk;
        if (--ck->chunks[chunk].layers_left) continue;
        fx_push_ready(ck, chunk);
        ready++;
    }
    fx_wake_writers_for(ck->engine, ready);
    if (devices && fx_cuda_enqueue(ck, layer)) fx_give_up(ck, FAILED, "emit", "", -1, ENOMEM);
}

int fx_emit(struct fx_checkpoint *ck, uint32_t layer, struct fx_sources *sources) {
    return fx_emit_from(ck, layer, sources, NULL, 0);
}

int fx_emit_from(struct fx_checkpoint *ck, uint32_t layer, struct fx_sources *sources,
                 const struct fx_stream *streams, uint32_t n_streams) {
    struct ck_devices *devices = NULL;
    struct fx_error refused = {.err = 0};
    if (layer >= ck->plan->n_layers || !fx_sources_fit(sources, ck->plan, layer)) return -EINVAL;
    int r = sources->devices ? fx_cuda_mark(ck, sources, streams, n_streams, &devices, &refused) : 0;
    if (r && !refused.err) return r;
    fx_lock(ck->engine);
    r = ck->layers[layer].emitted ? -EALREADY : 0;
    if (!r) {
        if (refused.err) fx_fail(ck, &refused);
        ck->layers[layer].emitted = true;
        ck->emitted++;
        if (ck->state == ACTIVE) {
            emit_pieces(ck, layer, sources, devices);
            devices = NULL;
        }
        fx_check_durable(ck);
        if (ck->emitted == ck->plan->n_layers) fx_wake_ends(ck->engine); /* it may be copied by now */
        fx_settle(ck);
        fx_wake(ck->engine);
    }
    fx_cuda_drop(devices);
    fx_unlock(ck->engine);
    return r;
}

uint32_t fx_emitted(struct fx_checkpoint *ck) {
    fx_lock(ck->engine);
    uint32_t emitted = ck->emitted;
    fx_unlock(ck->engine);
    return emitted;
}

/* ---- waits ---- */

static bool is_copied(const struct fx_checkpoint *ck) {
    return ck->emitted == ck->plan->n_layers && (!ck->left || !FX_KEEPS(EARLY_COPIED));
}
static bool is_durable(const struct fx_checkpoint *ck) { return ck->state == DURABLE; }

static int wait_until(struct fx_checkpoint *ck, bool (*reached)(const struct fx_checkpoint *),
                      int64_t timeout_ns, struct fx_error *error) {
    int64_t deadline = fx_deadline(timeout_ns);
    int r = 0;
    fx_lock(ck->engine);
    for (;;) {
        if (ck->state == FAILED || ck->state == CANCELLED) {
            if (error) *error = ck->error;
            r = ck->state == CANCELLED ? -ECANCELED : -ck->error.err;
        } else if (reached(ck)) {
            r = 1;
        }
        if (r || !fx_wait_end(ck->engine, deadline)) break;
    }
    fx_unlock(ck->engine);
    return r;
}

int fx_copied(struct fx_checkpoint *ck, int64_t timeout_ns, struct fx_error *error) {
    return wait_until(ck, is_copied, timeout_ns, error);
}

int fx_durable(struct fx_checkpoint *ck, int64_t timeout_ns, struct fx_error *error) {
    return wait_until(ck, is_durable, timeout_ns, error);
}

int fx_settled(struct fx_checkpoint *ck, int64_t timeout_ns) {
    int64_t deadline = fx_deadline(timeout_ns);
    fx_lock(ck->engine);
    while (!ck->settled && fx_wait_end(ck->engine, deadline)) continue;
    int r = ck->settled;
    fx_unlock(ck->engine);
    return r;
}

uint64_t fx_id(const struct fx_checkpoint *ck) { return ck->id; }

const uint32_t *fx_crcs(const struct fx_checkpoint *ck) { return ck->crcs; }

/* ---- the end ---- */

void fx_cancel(struct fx_checkpoint *ck) {
    fx_lock(ck->engine);
    fx_give_up(ck, CANCELLED, "cancel", "", -1, ECANCELED);
    fx_settle(ck);
    while (ck->taken && FX_KEEPS(NO_CANCEL_WAIT)) fx_wait(ck->engine, INT64_MAX); /* copies end by themselves */
    fx_unlock(ck->engine);
}

void fx_checkpoint_release(struct fx_checkpoint *ck) {
    struct fx_engine *engine = ck->engine;
    fx_cancel(ck);
    fx_lock(engine);
    engine->refs++; /* fx_settle may drop the checkpoint's own */
    ck->released = true;
    fx_settle(ck);
    fx_engine_release(engine);
}
