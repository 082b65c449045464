/* Writer threads: take a ready chunk, copy and checksum it in one pass, write it; sync and close files. */
#include "internal.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- copying ---- */

static void fill_zeros_or_header(struct fx_checkpoint *ck, const struct chunk *chunk,
                                 const struct extent *extent, char *to) {
    if (extent->piece == PIECE_OF_NOBODY) memset(to, 0, extent->nbytes);
    else memcpy(to, ck->plan->files[chunk->file].header + extent->from, extent->nbytes);
}

/* Gathers one extent and continues the checksum over it, in blocks that stay in the cache between the two. */
static uint32_t fill_from_memory(struct fx_checkpoint *ck, const struct extent *extent, char *to,
                                 uint32_t crc) {
    uint32_t layer = ck->plan->pieces[extent->piece].layer;
    const struct fx_view *view = &ck->layers[layer].sources->views[extent->tensor];
    uint64_t itemsize = ck->plan->tensors[ck->plan->layers[layer].first_tensor + extent->tensor].itemsize;
    if (view->ndim < 0) return fx_copy_crc32c(crc, to, view->address + extent->from, extent->nbytes);
    const uint32_t block = 64 << 10;
    for (uint32_t at = 0; at < extent->nbytes; at += block) {
        uint32_t n = extent->nbytes - at < block ? extent->nbytes - at : block;
        fx_view_gather(view, itemsize, extent->from + at, n, to + at);
        crc = fx_crc32c(crc, to + at, n);
    }
    return crc;
}

/* Completes the chunk in `to`. Pieces that are DONE were put there by fences; the others are ours (TAKEN). */
static uint32_t fill_chunk(struct fx_checkpoint *ck, uint32_t index, char *to) {
    const struct chunk *chunk = &ck->plan->chunks[index];
    uint32_t crc = 0;
    for (uint32_t i = 0; i < chunk->n_extents; i++) {
        const struct extent *extent = &ck->plan->extents[chunk->first_extent + i];
        bool planned = extent->piece < PIECE_OF_HEADER;
        if (planned && ck->pieces[extent->piece] == TAKEN) {
            crc = fill_from_memory(ck, extent, to + extent->at, crc);
            continue;
        }
        if (!planned) fill_zeros_or_header(ck, chunk, extent, to + extent->at);
        crc = fx_crc32c(crc, to + extent->at, extent->nbytes);
    }
    return crc;
}

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

/* ---- writing ---- */

/* Some file systems accept O_DIRECT at open and refuse it at the first write. */
static int write_chunk(struct fx_checkpoint *ck, uint32_t index, const char *data) {
    const struct chunk *chunk = &ck->plan->chunks[index];
    struct ck_file *file = &ck->files[chunk->file];
    int r = fx_pwrite(file->fd, data, chunk->nbytes, (int64_t)chunk->offset, NULL);
    if (r == -EINVAL && file->direct && fx_make_buffered(file->fd) == 0) {
        file->direct = false;
        ck->engine->buffered_files++;
        r = fx_pwrite(file->fd, data, chunk->nbytes, (int64_t)chunk->offset, NULL);
    }
    if (!r) ck->engine->bytes_written += chunk->nbytes;
    return r;
}

/* 0 if the disk holds the chunk now. */
static int store_chunk(struct fx_checkpoint *ck, uint32_t index, const char *data) {
    if (ck->has_known[index] && ck->known[index] == ck->crcs[index]) return 0;
    if (ck->engine->options.mock) return 0;
    int64_t start = fx_now();
    int r = write_chunk(ck, index, data);
    uint64_t took = (uint64_t)(fx_now() - start);
    ck->engine->write_ns += took;
    fx_relay_wrote(ck->engine, r ? 0 : ck->plan->chunks[index].nbytes, took);
    return r;
}

/* ---- jobs: lock held on entry and on return, not in between ---- */

/* The first layer that has a piece of it; -1: only the header or zeros. */
static int64_t layer_of(const struct fx_checkpoint *ck, const struct chunk *chunk) {
    return chunk->n_pieces ? (int64_t)ck->plan->pieces[chunk->first_piece].layer : -1;
}

static void do_chunk(struct writer *writer, struct fx_checkpoint *ck, uint32_t index) {
    struct fx_engine *engine = writer->engine;
    const struct chunk *chunk = &ck->plan->chunks[index];
    struct ck_chunk *live = &ck->chunks[index];
    if (!live->staging && fx_relay_posts(engine)) live->staging = fx_staging_take(engine); /* there is one: fx_pop_ready */
    char *buffer = live->staging ? live->staging : writer->bounce;
    uint32_t to_copy = take_pieces(ck, chunk);
    live->taken = true;
    fx_unlock(engine);

    int64_t start = fx_now();
    while (to_copy--) fx_io_copy_delay();
    if (!live->whole) ck->crcs[index] = fill_chunk(ck, index, buffer);
    engine->copy_ns += (uint64_t)(fx_now() - start);
    uint32_t track = (uint32_t)(writer - engine->writers);
    struct fx_span span = {.checkpoint = ck->id, .layer = layer_of(ck, chunk), .chunk = index, .nbytes = chunk->nbytes};
    fx_span_add(engine, FX_SPAN_COPY, track, start, span);

    fx_lock(engine);
    finish_pieces(ck, chunk);
    bool wanted = ck->state == ACTIVE;
    if (wanted && fx_relay_posts(engine)) {
        fx_relay_post(engine, ck, index, buffer);
        live->staging = NULL;
        fx_chunk_written(ck, index);
        fx_wake(engine);
        return;
    }
    fx_unlock(engine);
    start = fx_now();
    int r = wanted ? store_chunk(ck, index, buffer) : 0;
    if (wanted) fx_span_add(engine, FX_SPAN_WRITE, track, start, span);

    fx_lock(engine);
    if (live->staging) fx_staging_give(engine, live->staging);
    live->staging = NULL;
    if (r) fx_give_up(ck, FAILED, "pwrite", ck->files[chunk->file].path, (int64_t)chunk->offset, -r);
    else if (ck->state == ACTIVE) fx_chunk_written(ck, index);
    fx_wake(engine);
}

/* The descriptor is taken out of the table before it is closed: its number may be somebody else's right
 * after. */
static int close_file(struct fx_engine *engine, struct ck_file *file) {
    fx_lock(engine);
    int fd = file->fd;
    file->fd = -1;
    fx_unlock(engine);
    return fd >= 0 ? fx_close(fd) : 0;
}

/* Edge D of docs/format.md: without the sync, a record could reach the disk before the data it vouches for. */
static void do_sync(struct writer *writer, struct fx_checkpoint *ck, struct ck_file *file) {
    struct fx_engine *engine = writer->engine;
    int r = 0, closed = 0;
    file->sync = SYNC_TAKEN;
    ck->syncs_waiting--;
    fx_unlock(engine);
    if (!engine->options.mock) {
        int64_t start = fx_now();
        r = fx_fdatasync(file->fd);
        closed = close_file(engine, file);
        engine->write_ns += (uint64_t)(fx_now() - start);
        struct fx_span span = {.checkpoint = ck->id, .layer = -1, .chunk = -1};
        fx_span_add(engine, FX_SPAN_SYNC, (uint32_t)(writer - engine->writers), start, span);
    }
    fx_lock(engine);
    file->sync = SYNCED;
    if (r || closed) {
        fx_give_up(ck, FAILED, r ? "fdatasync" : "close", file->path, -1, r ? -r : -closed);
        return;
    }
    ck->files_left--;
    fx_check_durable(ck);
}

/* For a checkpoint that is over and that nobody works on. */
static void do_close(struct fx_engine *engine, struct fx_checkpoint *ck) {
    fx_unlock(engine);
    for (uint32_t i = 0; i < ck->plan->n_files; i++) close_file(engine, &ck->files[i]);
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
    int r = pthread_create(&writer->thread, NULL, writer_main, writer);
    if (r) return r;
    engine->refs++;
    engine->threads_started++;
    engine->threads_alive++;
    snprintf(name, sizeof name, "fxckpt-w%u", index % 1000);
    pthread_setname_np(writer->thread, name);
    return 0;
}

/* Signals stay with the caller's threads: a handler of the host program must not run in ours. */
int fx_writers_start(struct fx_engine *engine, struct fx_error *error) {
    sigset_t all, before;
    int r = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    fx_lock(engine); /* the new threads wait here until they are counted */
    for (uint32_t i = 0; i < engine->options.threads && !r; i++) r = start_one(engine, i);
    fx_unlock(engine);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return r ? fx_error_set(error, "start of a writer thread", "", -1, r) : 0;
}
