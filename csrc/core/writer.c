/* Writer threads: take a ready chunk, copy and checksum it in one pass, give it to the sink; sync and close files. */
#include "core/sink.h"

#include <errno.h>
#include <stdio.h>

/* Lock held: takes every piece of the chunk that no fence has copied. Returns how many. */
static uint32_t take_pieces(struct fx_checkpoint *ck, const struct chunk *chunk) {
    uint32_t taken = 0;
    for (uint32_t p = chunk->first_piece; p < chunk->first_piece + chunk->n_pieces; p++) {
        if (ck->pieces[p] != IDLE) continue;
        fx_take_piece(ck, p);
        taken++;
    }
    return taken;
}

static void finish_pieces(struct fx_checkpoint *ck, const struct chunk *chunk) {
    for (uint32_t p = chunk->first_piece; p < chunk->first_piece + chunk->n_pieces; p++)
        if (ck->pieces[p] == TAKEN) fx_finish_piece(ck, p);
    fx_wake(ck->engine);
}

/* ---- jobs: lock held on entry and on return, not in between ---- */

static void do_chunk(struct writer *writer, struct fx_checkpoint *ck, uint32_t index) {
    struct fx_engine *engine = writer->engine;
    const struct chunk *chunk = &ck->plan->chunks[index];
    struct ck_chunk *live = &ck->chunks[index];
    struct fx_error error;
    if (!live->staging && engine->sink->takes_staging) live->staging = fx_staging_take(engine); /* fx_pop_ready: one is free */
    char *buffer = live->staging ? live->staging : writer->bounce;
    uint32_t to_copy = take_pieces(ck, chunk);
    live->taken = true;
    fx_unlock(engine);

    int64_t start = fx_now();
    while (to_copy--) fx_copy_delay();
    if (!live->whole) fx_fill_chunk(ck, index, buffer);
    engine->copy_ns += (uint64_t)(fx_now() - start);
    fx_span_add(engine, FX_SPAN_COPY, fx_track(writer), start, fx_chunk_span(ck, index));

    fx_lock(engine);
    finish_pieces(ck, chunk);
    int r = ck->state == ACTIVE ? engine->sink->store(writer, ck, index, buffer, &error) : 0;
    if (live->staging) fx_staging_give(engine, live->staging);
    live->staging = NULL;
    if (r) fx_fail(ck, &error);
    else if (ck->state == ACTIVE) fx_chunk_written(ck, index);
    fx_wake(engine);
}

static void do_sync(struct writer *writer, struct fx_checkpoint *ck, struct ck_file *file) {
    struct fx_engine *engine = writer->engine;
    struct fx_error error;
    file->sync = SYNC_TAKEN;
    ck->syncs_waiting--;
    fx_unlock(engine);
    int r = engine->sink->sync(writer, ck, file, &error);
    fx_lock(engine);
    file->sync = SYNCED;
    if (r) {
        fx_fail(ck, &error);
        return;
    }
    ck->files_left--;
    fx_check_durable(ck);
}

/* For a checkpoint that is over and that nobody works on. */
static void do_close(struct fx_engine *engine, struct fx_checkpoint *ck) {
    fx_unlock(engine);
    engine->sink->close(ck);
    fx_lock(engine);
}

static struct ck_file *next_sync(struct fx_checkpoint *ck) {
    for (uint32_t i = 0; ck->syncs_waiting && i < ck->plan->n_files; i++)
        if (!ck->files[i].chunks_left && ck->files[i].sync == UNSYNCED) return &ck->files[i];
    return NULL;
}

/* Lock held: does the next job there is, oldest checkpoint first; false if there is none. */
static bool work(struct writer *writer) {
    struct fx_engine *engine = writer->engine;
    for (struct fx_checkpoint *ck = engine->oldest; ck; ck = ck->next) {
        bool over = ck->state != ACTIVE;
        struct ck_file *sync = over ? NULL : next_sync(ck);
        uint32_t chunk = over || sync ? NOTHING : fx_pop_ready(ck);
        if (over ? ck->working || !fx_has_open_files(ck) : !sync && chunk == NOTHING) continue;
        ck->working++;
        if (over) do_close(engine, ck);
        else if (sync) do_sync(writer, ck, sync);
        else do_chunk(writer, ck, chunk);
        ck->working--;
        fx_settle(ck);
        return true;
    }
    return false;
}

static void *writer_main(void *argument) {
    struct writer *writer = argument;
    struct fx_engine *engine = writer->engine;
    fx_lock(engine);
    for (;;) {
        if (work(writer)) continue;
        if (engine->closing) break;
        pthread_cond_wait(&engine->work, &engine->lock);
    }
    engine->threads_alive--;
    fx_wake(engine);
    fx_engine_release(engine);
    return NULL;
}

static int start_one(struct fx_engine *engine, uint32_t index) {
    struct writer *writer = &engine->writers[index];
    char name[16];
    writer->bounce = fx_buffer_new(engine->options.chunk_bytes);
    if (!writer->bounce) return ENOMEM;
    writer->engine = engine;
    snprintf(name, sizeof name, "fxckpt-w%u", index % 1000);
    int r = fx_thread_start(&writer->thread, writer_main, writer, name);
    if (r) return r;
    engine->refs++;
    engine->threads_started++;
    engine->threads_alive++;
    return 0;
}

int fx_writers_start(struct fx_engine *engine, struct fx_error *error) {
    int r = 0;
    fx_lock(engine); /* the new threads wait here until they are counted */
    for (uint32_t i = 0; i < engine->options.threads && !r; i++) r = start_one(engine, i);
    fx_unlock(engine);
    return r ? fx_error_set(error, "start of a writer thread", "", -1, r) : 0;
}
