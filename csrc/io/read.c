/* Reading back: chunk by chunk into a bounce buffer, verified, and only then into the targets. A record may say that chunks
 * are large: what is larger than a piece is read piece by piece, once to verify the chunk and, where a target wants it, once
 * more, and no byte of the second time is taken that was not there the first time. Small ones are read several at a time. */
#include "core/system.h"
#include "engine.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#define PIECE (UINT64_C(64) << 20) /* of a chunk; no thread has a larger buffer */
#define AT_ONCE (UINT64_C(4) << 20) /* chunks that are smaller are read so many bytes at a time */

struct reader {
    int fd;
    const char *path;
    uint64_t nbytes, chunk_bytes;
    uint64_t group; /* chunks that are read together, at most */
    const uint32_t *crcs;
    const struct fx_target *targets;
    uint32_t n_targets;
    const struct fx_range *range, *end; /* what is left to read: from chunk `taken` of *range on */
    uint64_t taken;
    pthread_mutex_t lock; /* over the three of these, result and *error */
    atomic_int result;
    struct fx_error *error;
};

/* The first failure counts; the others stop. */
static void fail(struct reader *r, int result, uint64_t offset, uint32_t expected, uint32_t found) {
    pthread_mutex_lock(&r->lock);
    if (!r->result) {
        fx_error_set(r->error, "pread", r->path, (int64_t)offset, result < 0 ? -result : 0);
        if (r->error) {
            r->error->expected = expected;
            r->error->found = found;
        }
        r->result = result;
    }
    pthread_mutex_unlock(&r->lock);
}

static void scatter(const struct reader *r, uint64_t offset, uint64_t nbytes, const char *data) {
    for (uint32_t i = 0; i < r->n_targets; i++) {
        const struct fx_target *t = &r->targets[i];
        uint64_t begin = t->offset > offset ? t->offset : offset;
        uint64_t end = t->offset + t->nbytes < offset + nbytes ? t->offset + t->nbytes : offset + nbytes;
        if (begin >= end) continue;
        fx_view_scatter(&t->view, t->itemsize, begin - t->offset, end - begin, data + (begin - offset));
    }
}

/* O_DIRECT wants whole blocks also at the end of a file that has none: the read then stops short by itself.
 */
static int read_chunk(struct reader *r, uint64_t offset, uint64_t nbytes, char *buffer, size_t *got) {
    size_t blocks = (nbytes + FX_BLOCK - 1) / FX_BLOCK * FX_BLOCK;
    int err = fx_pread(r->fd, buffer, blocks, (int64_t)offset, got);
    if (err == -EINVAL && fx_make_buffered(r->fd) == 0)
        err = fx_pread(r->fd, buffer, blocks, (int64_t)offset, got);
    return err;
}

/* What a thread reads with. crcs[i]: of the chunk up to its piece i; it is 0 for the first. */
struct hands {
    char *buffer;
    uint64_t nbytes;
    uint32_t *crcs;
};

static int hands_new(struct hands *h, uint64_t chunk_bytes, uint64_t group) {
    h->nbytes = chunk_bytes < PIECE ? chunk_bytes * group : PIECE;
    h->buffer = fx_buffer_new(h->nbytes);
    h->crcs = calloc(chunk_bytes / PIECE + 2, sizeof *h->crcs);
    return h->buffer && h->crcs;
}

static void hands_free(struct hands *h) {
    fx_buffer_free(h->buffer, h->nbytes);
    free(h->crcs);
}

/* One piece into the buffer, and the checksum of its chunk up to its end; false if reading failed. */
static int read_piece(struct reader *r, struct hands *h, uint64_t at, uint64_t nbytes, uint32_t before, uint32_t *crc) {
    size_t got = 0;
    int err = read_chunk(r, at, nbytes, h->buffer, &got);
    if (err || got < nbytes) {
        fail(r, err ? err : FX_TRUNCATED, at, 0, 0);
        return 0;
    }
    *crc = fx_crc32c(before, h->buffer, nbytes);
    return 1;
}

static int is_wanted(const struct reader *r, uint64_t offset, uint64_t nbytes) {
    for (uint32_t i = 0; i < r->n_targets; i++) {
        const struct fx_target *t = &r->targets[i];
        if (t->offset < offset + nbytes && offset < t->offset + t->nbytes) return 1;
    }
    return 0;
}

/* The pieces of a verified chunk that a target wants, read again. */
static void take_pieces(struct reader *r, struct hands *h, uint64_t offset, uint64_t nbytes) {
    for (uint64_t i = 0, at = 0; at < nbytes && !r->result; at += PIECE, i++) {
        uint64_t n = nbytes - at < PIECE ? nbytes - at : PIECE;
        uint32_t found;
        if (!is_wanted(r, offset + at, n)) continue;
        if (!read_piece(r, h, offset + at, n, h->crcs[i], &found)) return;
        if (found != h->crcs[i + 1]) return fail(r, FX_MISMATCH, offset, h->crcs[i + 1], found);
        scatter(r, offset + at, n, h->buffer);
    }
}

static void do_chunk(struct reader *r, uint64_t index, struct hands *h) {
    uint64_t offset = index * r->chunk_bytes, rest = r->nbytes - offset;
    uint64_t nbytes = rest < r->chunk_bytes ? rest : r->chunk_bytes, i = 0;
    for (uint64_t at = 0; at < nbytes && !r->result; at += PIECE, i++)
        if (!read_piece(r, h, offset + at, nbytes - at < PIECE ? nbytes - at : PIECE, h->crcs[i], &h->crcs[i + 1])) return;
    if (r->result) return;
    if (h->crcs[i] != r->crcs[index]) return fail(r, FX_MISMATCH, offset, r->crcs[index], h->crcs[i]);
    if (nbytes <= PIECE)
        scatter(r, offset, nbytes, h->buffer);
    else
        take_pieces(r, h, offset, nbytes);
}

/* Several chunks in one read; nothing of any is taken unless all are good. */
static void do_group(struct reader *r, uint64_t index, uint64_t n, struct hands *h) {
    uint64_t offset = index * r->chunk_bytes, rest = r->nbytes - offset;
    uint64_t nbytes = rest < n * r->chunk_bytes ? rest : n * r->chunk_bytes, end = 0;
    size_t got = 0;
    int err = read_chunk(r, offset, nbytes, h->buffer, &got);
    for (uint64_t at = 0; end < nbytes; at = end, index++) {
        end = nbytes - at < r->chunk_bytes ? nbytes : at + r->chunk_bytes;
        if (got < end) return fail(r, err ? err : FX_TRUNCATED, offset + at, 0, 0);
        uint32_t crc = fx_crc32c(0, h->buffer + at, end - at);
        if (crc != r->crcs[index]) return fail(r, FX_MISMATCH, offset + at, r->crcs[index], crc);
    }
    scatter(r, offset, nbytes, h->buffer);
}

/* The next chunks for a thread: from *index on, as many as are returned; 0: there are none left. */
static uint64_t take(struct reader *r, uint64_t *index) {
    uint64_t n = 0;
    pthread_mutex_lock(&r->lock);
    for (; r->range < r->end && r->taken == r->range->n; r->taken = 0) r->range++;
    if (r->range < r->end) {
        n = r->range->n - r->taken < r->group ? r->range->n - r->taken : r->group;
        *index = r->range->first + r->taken;
        r->taken += n;
    }
    pthread_mutex_unlock(&r->lock);
    return n;
}

static void *reader_main(void *argument) {
    struct reader *r = argument;
    struct hands hands = {0};
    int able = hands_new(&hands, r->chunk_bytes, r->group);
    if (!able) fail(r, -ENOMEM, 0, 0, 0);
    while (able && !r->result) {
        uint64_t index, n = take(r, &index);
        if (!n) break;
        if (n > 1) do_group(r, index, n, &hands);
        else do_chunk(r, index, &hands);
    }
    hands_free(&hands);
    return NULL;
}

int fx_read_verified(int fd, const char *path, uint64_t nbytes, uint64_t chunk_bytes, const uint32_t *crcs,
                     const struct fx_range *ranges, uint32_t n_ranges, const struct fx_target *targets, uint32_t n_targets,
                     uint32_t threads, struct fx_error *error) {
    struct reader r = {.fd = fd,
                       .path = path,
                       .nbytes = nbytes,
                       .chunk_bytes = chunk_bytes,
                       .crcs = crcs,
                       .targets = targets,
                       .n_targets = n_targets,
                       .range = ranges,
                       .end = ranges + n_ranges,
                       .error = error};
    if (!chunk_bytes || chunk_bytes % FX_BLOCK)
        return fx_error_set(error, "read: chunk size", path, -1, EINVAL);
    uint64_t n = 0;
    for (uint32_t i = 0; i < n_ranges; i++) n += ranges[i].n;
    uint64_t share = threads > 1 ? n / threads : n;
    r.group = AT_ONCE / chunk_bytes < share ? AT_ONCE / chunk_bytes : share;
    if (!r.group) r.group = 1;
    uint32_t others = threads > 1 ? (threads < n ? threads : (uint32_t)n) : 1;
    pthread_t *helpers = calloc(others, sizeof *helpers);
    if (!helpers) return fx_error_set(error, "read", path, -1, ENOMEM);
    pthread_mutex_init(&r.lock, NULL);
    uint32_t started = 0;
    while (started + 1 < others && fx_thread_start(&helpers[started], reader_main, &r, "fxckpt-read") == 0) started++;
    reader_main(&r); /* the caller is one of the readers; fewer threads than asked for only take longer */
    while (started) pthread_join(helpers[--started], NULL);
    pthread_mutex_destroy(&r.lock);
    free(helpers);
    return r.result;
}
