/* The engine's life, its lock and its counters. */
#include "core/sink.h"
#include "cuda/cuda.h"

#include <errno.h>
#include <stdlib.h>

void fx_lock(struct fx_engine *engine) { pthread_mutex_lock(&engine->lock); }
void fx_unlock(struct fx_engine *engine) { pthread_mutex_unlock(&engine->lock); }

static void wake(struct waits *waits) {
    if (waits->waiters) pthread_cond_broadcast(&waits->changed);
}

void fx_wake(struct fx_engine *engine) { wake(&engine->progress); }
void fx_wake_ends(struct fx_engine *engine) { wake(&engine->ends); }

void fx_wake_writers(struct fx_engine *engine) { pthread_cond_broadcast(&engine->work); }

void fx_wake_writers_for(struct fx_engine *engine, uint32_t jobs) {
    if (jobs == 1) pthread_cond_signal(&engine->work); /* one that works looks for the next job itself */
    else if (jobs) fx_wake_writers(engine);
}

static bool wait_for(struct fx_engine *engine, struct waits *waits, int64_t deadline_ns) {
    if (fx_now() >= deadline_ns) return false;
    struct timespec until = {deadline_ns / SECOND_NS, deadline_ns % SECOND_NS};
    waits->waiters++;
    pthread_cond_timedwait(&waits->changed, &engine->lock, &until);
    waits->waiters--;
    return true; /* the caller looks again, whatever woke it */
}

bool fx_wait(struct fx_engine *engine, int64_t deadline_ns) { return wait_for(engine, &engine->progress, deadline_ns); }
bool fx_wait_end(struct fx_engine *engine, int64_t deadline_ns) { return wait_for(engine, &engine->ends, deadline_ns); }

/* Conditions that count on the monotonic clock: setting the time must not end or prolong a wait. */
static int make_locks(struct fx_engine *engine) {
    pthread_condattr_t monotonic;
    int r = pthread_condattr_init(&monotonic);
    if (!r) r = pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    if (!r) r = pthread_mutex_init(&engine->lock, NULL);
    if (!r) r = pthread_cond_init(&engine->work, &monotonic);
    if (!r) r = pthread_cond_init(&engine->progress.changed, &monotonic);
    if (!r) r = pthread_cond_init(&engine->ends.changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return r;
}

static void free_buffers(struct fx_engine *engine) {
    struct staging *staging = &engine->staging;
    while (staging->n_free) fx_buffer_free(staging->free[--staging->n_free], engine->options.chunk_bytes);
    staging->n_made = 0;
    for (uint32_t i = 0; engine->writers && i < engine->options.threads; i++) {
        fx_buffer_free(engine->writers[i].bounce, engine->options.chunk_bytes);
        engine->writers[i].bounce = NULL;
    }
}

static void destroy(struct fx_engine *engine) {
    fx_fork_remove(engine);
    fx_cuda_free(engine);
    engine->sink->end(engine);
    free_buffers(engine);
    free(engine->staging.free);
    free(engine->writers);
    fx_trace_free(engine);
    pthread_cond_destroy(&engine->progress.changed);
    pthread_cond_destroy(&engine->ends.changed);
    pthread_cond_destroy(&engine->work);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

void fx_engine_release(struct fx_engine *engine) {
    bool last = --engine->refs == 0;
    fx_unlock(engine);
    if (last) destroy(engine);
}

int fx_engine_new(const struct fx_options *options, struct fx_engine **out, struct fx_error *error) {
    uint64_t chunk = options->chunk_bytes;
    if (!options->threads || options->threads > 256 || !chunk || chunk % FX_BLOCK || chunk > 1u << 30)
        return fx_error_set(error, "engine: threads or chunk size", "", -1, EINVAL);
    struct fx_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return fx_error_set(error, "engine", "", -1, ENOMEM);
    int r = make_locks(engine);
    if (!r) r = -fx_trace_new(engine);
    if (r) {
        free(engine);
        return fx_error_set(error, "engine", "", -1, r);
    }
    engine->options = *options;
    engine->refs = 1;
    engine->sink = options->mock ? &fx_nowhere : &fx_disk;
    engine->written = &engine->own;
    engine->staging.limit = (uint32_t)(options->staging_bytes / chunk);
    engine->staging.free = calloc(engine->staging.limit + 1, sizeof *engine->staging.free);
    engine->writers = calloc(options->threads, sizeof *engine->writers);
    fx_fork_add(engine);
    r = engine->staging.free && engine->writers ? fx_writers_start(engine, error)
                                                : fx_error_set(error, "engine", "", -1, ENOMEM);
    if (r) fx_engine_free(engine);
    else *out = engine;
    return r;
}

static bool anyone_copies(const struct fx_engine *engine) {
    for (const struct fx_checkpoint *ck = engine->oldest; ck; ck = ck->next)
        if (ck->taken) return true;
    return false;
}

/* Lock held. Nobody reads the callers' memory afterwards. */
static void cancel_all(struct fx_engine *engine) {
    for (struct fx_checkpoint *ck = engine->oldest, *next; ck; ck = next) {
        next = ck->next;
        fx_give_up(ck, CANCELLED, "close of the engine", "", -1, ECANCELED);
        fx_settle(ck);
    }
    while (anyone_copies(engine)) fx_wait(engine, INT64_MAX); /* a copy always ends by itself */
}

int fx_engine_close(struct fx_engine *engine, int64_t timeout_ns) {
    int64_t deadline = fx_deadline(timeout_ns);
    fx_lock(engine);
    engine->closing = true;
    cancel_all(engine);
    fx_wake_writers(engine);
    fx_unlock(engine);
    fx_cuda_stop(engine);
    fx_lock(engine);
    while (engine->threads_alive && fx_wait(engine, deadline)) continue;
    bool ended = !engine->threads_alive, join = ended && !engine->joined;
    if (join) engine->joined = true;
    fx_unlock(engine);
    if (!join) return ended;
    for (uint32_t i = 0; i < engine->threads_started; i++) pthread_join(engine->writers[i].thread, NULL);
    fx_cuda_free(engine);
    engine->sink->end(engine);
    fx_lock(engine);
    free_buffers(engine); /* all are given back: no checkpoint is in flight and no thread works on one */
    fx_unlock(engine);
    return 1;
}

void fx_engine_free(struct fx_engine *engine) {
    fx_engine_close(engine, 0);
    for (uint32_t i = 0; !engine->joined && i < engine->threads_started; i++)
        pthread_detach(engine->writers[i].thread);
    fx_lock(engine);
    fx_engine_release(engine);
}

void fx_engine_statistics(struct fx_engine *engine, struct fx_statistics *out) {
    fx_lock(engine);
    out->staging_bytes = engine->staging.used_bytes;
    out->staging_peak_bytes = engine->staging.peak_bytes;
    out->bytes_written = engine->written->bytes;
    out->copy_ns = engine->copy_ns;
    out->write_ns = engine->written->ns;
    out->stall_ns = engine->stall_ns;
    out->buffered_files = engine->buffered_files;
    out->unbatched_devices = engine->unbatched_devices;
    fx_unlock(engine);
}

/* _Atomic int64_t has the representation of int64_t on every platform with lock-free 64-bit atomics; engine.h
 * is also read by compilers that know no _Atomic. */
_Static_assert(sizeof(_Atomic int64_t) == sizeof(int64_t), "pending is read from outside as an int64_t");

const int64_t *fx_engine_pending(const struct fx_engine *engine) {
    return (const int64_t *)(const void *)&engine->pending;
}
