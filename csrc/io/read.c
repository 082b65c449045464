/* Reading back: chunk by chunk into a bounce buffer, verified, and only then into the targets. */
#include "core/system.h"
#include "engine.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

struct reader {
    int fd;
    const char *path;
    uint64_t nbytes, chunk_bytes, end;
    const uint32_t *crcs;
    const struct fx_target *targets;
    uint32_t n_targets;
    _Atomic uint64_t next; /* chunk to read */
    pthread_mutex_t lock;  /* over result and *error */
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

static void do_chunk(struct reader *r, uint64_t index, char *buffer) {
    uint64_t offset = index * r->chunk_bytes, rest = r->nbytes - offset;
    uint64_t nbytes = rest < r->chunk_bytes ? rest : r->chunk_bytes;
    size_t got = 0;
    int err = read_chunk(r, offset, nbytes, buffer, &got);
    if (err) return fail(r, err, offset, 0, 0);
    if (got < nbytes) return fail(r, FX_TRUNCATED, offset, 0, 0);
    uint32_t found = fx_crc32c(0, buffer, nbytes);
    if (found != r->crcs[index]) return fail(r, FX_MISMATCH, offset, r->crcs[index], found);
    scatter(r, offset, nbytes, buffer);
}

static void *reader_main(void *argument) {
    struct reader *r = argument;
    char *buffer = fx_buffer_new(r->chunk_bytes);
    if (!buffer) fail(r, -ENOMEM, 0, 0, 0);
    while (buffer && !r->result) {
        uint64_t index = r->next++;
        if (index >= r->end) break;
        do_chunk(r, index, buffer);
    }
    fx_buffer_free(buffer, r->chunk_bytes);
    return NULL;
}

int fx_read_verified(int fd, const char *path, uint64_t nbytes, uint64_t chunk_bytes, const uint32_t *crcs,
                     uint64_t first, uint64_t n, const struct fx_target *targets, uint32_t n_targets,
                     uint32_t threads, struct fx_error *error) {
    struct reader r = {.fd = fd,
                       .path = path,
                       .nbytes = nbytes,
                       .chunk_bytes = chunk_bytes,
                       .end = first + n,
                       .crcs = crcs,
                       .targets = targets,
                       .n_targets = n_targets,
                       .next = first,
                       .error = error};
    if (!chunk_bytes || chunk_bytes % FX_BLOCK)
        return fx_error_set(error, "read: chunk size", path, -1, EINVAL);
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
