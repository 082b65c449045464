/* The sink that writes files: opened when a checkpoint begins, synced and closed by the writer of their last chunk. */
#include "core/sink.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- open ---- */

static int64_t nanoseconds(struct timespec t) { return t.tv_sec * SECOND_NS + t.tv_nsec; }

/* A file that was removed, cut, replaced or written to while it waited has another inode, size or time. */
static bool is_touched(const struct fx_file_id *waited, const struct stat *now) {
    if (!waited->inode) return false;
    return waited->device != now->st_dev || waited->inode != now->st_ino || waited->nbytes != (uint64_t)now->st_size ||
           waited->modified_ns != nanoseconds(now->st_mtim) || waited->changed_ns != nanoseconds(now->st_ctim);
}

/* Only the checksums of such a file are wanted. */
static bool is_nowhere(const struct ck_file *file) { return !*file->path; }

/* O_DIRECT if wanted and accepted: a file system that cannot do it says EINVAL. Never through a link, and nothing but a file:
 * what lies there instead is not ours to write to. */
static int open_file(struct fx_engine *engine, int at, struct ck_file *file, struct fx_error *error) {
    if (is_nowhere(file)) return 0;
    int flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, r = -EINVAL;
    if (engine->options.direct) r = fx_open(at, file->path, flags | O_DIRECT, 0666);
    file->direct = r >= 0;
    if (r == -EINVAL) {
        r = fx_open(at, file->path, flags, 0666);
        if (r >= 0 && engine->options.direct) engine->buffered_files++;
    }
    if (r < 0) return fx_error_set(error, "open", file->path, -1, -r);
    file->fd = r;
    struct stat st;
    if (fstat(r, &st)) return fx_error_set(error, "fstat", file->path, -1, errno);
    if (!S_ISREG(st.st_mode)) return fx_error_set(error, "open", file->path, -1, ENXIO);
    file->device = st.st_dev;
    file->inode = st.st_ino;
    file->touched = is_touched(&file->waited, &st);
    return 0;
}

/* A recycled file has its size already, and then nothing is done: a new size is a change of metadata to be
 * synced. */
static int resize_file(struct ck_file *file, uint64_t nbytes, struct fx_error *error) {
    if (is_nowhere(file)) return 0;
    struct stat st;
    if (fstat(file->fd, &st)) return fx_error_set(error, "fstat", file->path, -1, errno);
    if ((uint64_t)st.st_size == nbytes) return 0;
    int r = fx_ftruncate(file->fd, (int64_t)nbytes);
    return r ? fx_error_set(error, "ftruncate", file->path, (int64_t)nbytes, -r) : 0;
}

/* Lock held. A write of an older checkpoint that hangs in the disk may land after those of a newer one. */
static const char *busy_path(const struct fx_engine *engine, const struct fx_checkpoint *ck) {
    for (const struct fx_checkpoint *other = engine->oldest; other; other = other->next)
        for (uint32_t i = 0; i < other->plan->n_files; i++)
            for (uint32_t k = 0; k < ck->plan->n_files; k++)
                if (other->files[i].fd >= 0 && other->files[i].inode == ck->files[k].inode &&
                    other->files[i].device == ck->files[k].device)
                    return ck->files[k].path;
    return NULL;
}

int fx_disk_open(struct fx_checkpoint *ck, struct fx_error *error) {
    int r = 0;
    for (uint32_t i = 0; i < ck->plan->n_files && !r; i++) r = open_file(ck->engine, ck->at, &ck->files[i], error);
    if (r) return r;
    fx_lock(ck->engine);
    const char *busy = busy_path(ck->engine, ck);
    fx_unlock(ck->engine);
    if (busy) return fx_error_set(error, "begin", busy, -1, EBUSY);
    for (uint32_t i = 0; i < ck->plan->n_files && !r; i++)
        r = resize_file(&ck->files[i], ck->plan->files[i].nbytes, error);
    return r;
}

/* ---- write, sync, close ---- */

/* Some file systems accept O_DIRECT at open and refuse it at the first write. */
static int write_chunk(struct fx_checkpoint *ck, const struct chunk *chunk, const void *data) {
    struct ck_file *file = &ck->files[chunk->file];
    int r = fx_pwrite(file->fd, data, chunk->nbytes, (int64_t)chunk->offset, NULL);
    if (r == -EINVAL && file->direct && fx_make_buffered(file->fd) == 0) {
        file->direct = false;
        ck->engine->buffered_files++;
        r = fx_pwrite(file->fd, data, chunk->nbytes, (int64_t)chunk->offset, NULL);
    }
    if (!r) ck->engine->written->bytes += chunk->nbytes;
    return r;
}

/* What the disk holds already is not written again. */
int fx_disk_store(struct writer *writer, struct fx_checkpoint *ck, uint32_t index, void *data, struct fx_error *error) {
    struct fx_engine *engine = ck->engine;
    const struct chunk *chunk = &ck->plan->chunks[index];
    fx_unlock(engine);
    int64_t start = fx_now();
    int r = 0;
    if (!fx_is_known(ck, index) && !is_nowhere(&ck->files[chunk->file])) {
        r = write_chunk(ck, chunk, data);
        engine->written->ns += (uint64_t)(fx_now() - start);
    }
    fx_span_add(engine, FX_SPAN_WRITE, fx_track(writer), start, fx_chunk_span(ck, index));
    fx_lock(engine);
    return r ? fx_error_set(error, "pwrite", ck->files[chunk->file].path, (int64_t)chunk->offset, -r) : 0;
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
int fx_disk_sync(struct writer *writer, struct fx_checkpoint *ck, struct ck_file *file, struct fx_error *error) {
    if (is_nowhere(file)) return 0;
    struct fx_engine *engine = ck->engine;
    int64_t start = fx_now();
    int r = fx_fdatasync(file->fd), closed = close_file(engine, file);
    engine->written->ns += (uint64_t)(fx_now() - start);
    fx_span_add(engine, FX_SPAN_SYNC, fx_track(writer), start,
                (struct fx_span){.checkpoint = ck->id, .layer = -1, .chunk = -1});
    if (r) return fx_error_set(error, "fdatasync", file->path, -1, -r);
    return closed ? fx_error_set(error, "close", file->path, -1, -closed) : 0;
}

void fx_disk_close(struct fx_checkpoint *ck) {
    for (uint32_t i = 0; i < ck->plan->n_files; i++) close_file(ck->engine, &ck->files[i]);
}

static void close_in_child(struct fx_engine *engine) {
    for (struct fx_checkpoint *ck = engine->oldest; ck; ck = ck->next)
        for (uint32_t i = 0; i < ck->plan->n_files; i++)
            if (ck->files[i].fd >= 0) close(ck->files[i].fd);
}

static void end(struct fx_engine *engine) { (void)engine; }

const struct fx_sink_ops fx_disk = {
    .admit = fx_always_admit,
    .open = fx_disk_open,
    .store = fx_disk_store,
    .sync = fx_disk_sync,
    .close = fx_disk_close,
    .give = fx_staging_keep,
    .close_in_child = close_in_child,
    .end = end,
};
