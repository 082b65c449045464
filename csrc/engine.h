/* fxckpt engine: copies tensors out of live memory, checksums them and writes them to disk, in its own
 * threads.
 *
 * This header is the manual. The engine knows nothing of Python, of tensors' owners or of what a checkpoint
 * means.
 *
 *     plan        where each tensor lies in the files: fixed, immutable, shared by many checkpoints
 *     sources     where one layer's tensors lie in memory
 *     checkpoint  one pass over a plan: begin, emit every layer, wait until durable
 *     fence       wait until the memory of a layer may change again
 *
 *         plan = fx_plan_new(...);
 *         fx_begin(engine, plan, at, paths, ..., &ck, &error);       opens the files
 *         for each layer:  update it;  fx_emit(ck, layer, sources);  memory must now stay as it is
 *         for each layer:  fx_fence(engine, layer, timeout);         until it may change
 *         fx_durable(ck, timeout, &error);                           every byte written, every file synced
 *         fx_checkpoint_release(ck);
 *
 * The files are cut into a fixed grid of chunks. A *piece* is what one layer has in one chunk: pieces are
 * what is copied, and what fences wait for; chunks are what is checksummed and written. A chunk is ready when
 * every layer that overlaps it was emitted. Writers take the oldest checkpoint first, its chunks in the order
 * of becoming ready.
 *
 * Returns: 0 or a positive answer, else a negative errno. Waits return 1 (done), 0 (timed out), or the
 * negative errno of the checkpoint's failure with *error filled in; -ECANCELED after fx_cancel. Timeouts are
 * nanoseconds from now. Every function may be called from any thread, apart from *_free and _release, which
 * end the life of their argument. No function may be called in a forked child: see core/fork.c.
 */
#ifndef FX_ENGINE_H
#define FX_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#define FX_ABI 9      /* bumped when this header changes, so that a stale build is noticed */
#define FX_BLOCK 4096 /* alignment of O_DIRECT: of memory, file offsets and lengths */
#define FX_PATH 4096
#define FX_MAX_DIMS 64

/* ---- errors (core/error.c) ---- */

struct fx_error {
    const char *operation; /* static text: "pwrite", "open", "fence", ... */
    int err;               /* positive errno */
    int64_t offset;        /* in the file, or -1 */
    uint32_t expected;     /* read verification: the CRC on record and the CRC found */
    uint32_t found;
    char path[FX_PATH];
};

/* Fills *error (which may be NULL) and returns -err. */
int fx_error_set(struct fx_error *error, const char *operation, const char *path, int64_t offset, int err);

/* ---- checksums (core/crc32c.c) ---- */

/* CRC-32C (Castagnoli) of n bytes, continuing from `crc` (0 to start), in hardware where there is some. */
uint32_t fx_crc32c(uint32_t crc, const void *data, size_t n);
uint32_t fx_crc32c_portable(uint32_t crc, const void *data, size_t n); /* what runs where there is none */
/* memcpy and checksum in one pass over memory. */
uint32_t fx_copy_crc32c(uint32_t crc, void *to, const void *from, size_t n);
const char *fx_crc32c_name(void);

/* Tables of them (core/sums.c). Each `block` bytes of a file have one: continues them over n bytes, at `offset` of the file. */
void fx_crc32c_blocks(uint32_t *crcs, uint64_t block, uint64_t offset, const void *data, size_t n);
/* A table as decimal numbers with commas between them, into 11 bytes for each at most. Returns the bytes. */
size_t fx_sums_text(const uint32_t *crcs, size_t n, char *out);
/* What that wrote, n bytes, back into a table (NULL: only counted). Returns how many there are; -1: it did not write that. */
int64_t fx_sums_parse(const char *text, size_t n, uint32_t *crcs);

/* ---- strided memory (core/view.c) ---- */

/* A tensor in memory: strides in bytes. ndim < 0 says contiguous. Normalised by fx_view_normalise. */
struct fx_view {
    char *address;
    int32_t ndim;
    int64_t *sizes;
    int64_t *strides;
    uint32_t device; /* 0: host memory. 1 + i: memory of CUDA device i, contiguous (only where sources are emitted) */
};

/* Drops dimensions of size 1 and merges those that follow each other in memory, in place. */
void fx_view_normalise(struct fx_view *view);
/* Copies bytes [from, from + n) of the tensor in row-major order into `to` (gather), or back (scatter). */
void fx_view_gather(const struct fx_view *view, uint64_t itemsize, uint64_t from, uint64_t n, void *to);
void fx_view_scatter(const struct fx_view *view, uint64_t itemsize, uint64_t from, uint64_t n,
                     const void *in);

/* ---- geometry (core/chunks.c, core/sources.c) ---- */

struct fx_file {
    uint64_t nbytes;    /* a multiple of FX_BLOCK */
    const void *header; /* bytes that lie at offset 0; copied */
    uint64_t header_nbytes;
};

struct fx_tensor {
    uint32_t layer;
    uint32_t file;
    uint64_t offset; /* absolute, in the file */
    uint64_t nbytes;
    uint64_t itemsize;
};

struct fx_plan;

/* Tensors of one layer come in the order in which its sources have them. Bytes that nothing covers are zeros. Files are
 * copied and written in chunks; each `sum_bytes` of a file have a checksum of their own, a whole number of them a chunk:
 * whoever reads a part of a file need not read all of a chunk to know that it is good.
 * -EINVAL: sizes that are no multiple of FX_BLOCK, tensors that overlap or lie outside, a layer out of range.
 */
int fx_plan_new(const struct fx_file *files, uint32_t n_files, const struct fx_tensor *tensors,
                uint32_t n_tensors, uint32_t n_layers, uint64_t chunk_bytes, uint64_t sum_bytes,
                struct fx_plan **out, struct fx_error *error);
void fx_plan_free(struct fx_plan *plan);
uint32_t fx_plan_chunks(const struct fx_plan *plan); /* of all files together */
uint32_t fx_plan_sums(const struct fx_plan *plan);
/* Checksums of one file are numbered from *first in the plan's numbering. */
void fx_plan_file_sums(const struct fx_plan *plan, uint32_t file, uint32_t *first, uint32_t *count);

struct fx_sources;

/* Copies the views (and their sizes and strides), not the memory they point to. NULL: no memory. */
struct fx_sources *fx_sources_new(const struct fx_view *views, uint32_t n);
void fx_sources_free(struct fx_sources *sources);

/* ---- engine (core/engine.c) ---- */

struct fx_options {
    uint32_t threads;
    uint64_t chunk_bytes;   /* a multiple of FX_BLOCK */
    uint64_t staging_bytes; /* rounded down to whole chunks; 0: fences only wait */
    int mock;               /* do everything but open, write and sync */
    int direct;             /* try O_DIRECT */
};

struct fx_statistics {
    uint64_t bytes_written;
    uint64_t copy_ns;  /* in writers and in fences */
    uint64_t write_ns; /* pwrite and fdatasync */
    uint64_t stall_ns; /* callers of fx_fence: waiting or helping */
    uint64_t staging_bytes;
    uint64_t staging_peak_bytes;
    uint64_t buffered_files;    /* files whose O_DIRECT open was refused */
    uint64_t unbatched_devices; /* CUDA devices whose driver refused a batch of copies: one by one since */
};

struct fx_engine;

int fx_engine_new(const struct fx_options *options, struct fx_engine **out, struct fx_error *error);
/* Cancels what is in flight and waits for the threads to end. 1: they did, and the buffers are freed. 0: one
 * is still stuck in the disk. May be called again. */
int fx_engine_close(struct fx_engine *engine, int64_t timeout_ns);
/* Ends the caller's hold; closes first, without waiting for the disk. Memory goes when the last checkpoint
 * and the last thread are gone: a thread stuck in the disk is left behind, and cleans up if the disk ever
 * answers. */
void fx_engine_free(struct fx_engine *engine);
void fx_engine_statistics(struct fx_engine *engine, struct fx_statistics *out);
/* Emitted pieces not copied yet, over all checkpoints. May be read directly at any time: it is an atomic. */
const int64_t *fx_engine_pending(const struct fx_engine *engine);

/* ---- checkpoints (core/checkpoint.c) ---- */

struct fx_checkpoint;

/* A CUDA stream of the caller, by the device's number and the driver's handle (0: the legacy default stream). */
struct fx_stream {
    uint32_t device;
    uint64_t handle;
};

/* A file as fstat shows it; inode 0: no file is meant. Times in nanoseconds since 1970. */
struct fx_file_id {
    uint64_t device, inode, nbytes;
    int64_t modified_ns, changed_ns;
};

/* What the disk holds already: for each chunk of the plan has[i] and the CRC of its checksums, as they lie in memory; and for
 * each file what it was when that was true, NULL: it is true now. Of a file that is another one by now, or was touched, nothing
 * is held. */
struct fx_held {
    const uint8_t *has;
    const uint32_t *crcs;
    const struct fx_file_id *files;
};

/* Opens or creates the plan's files, sets their sizes. `at`: the directory they lie in, whose entries the last names of the
 * paths are; AT_FDCWD: the paths count. A file whose path is empty is opened by nobody: its chunks are copied and checksummed,
 * and not written. A link or anything else that is no file is refused. A chunk that is `held` (may be
 * NULL) with these checksums is not written again. A CRC has 32 bits: give only chunks that are expected not to have changed.
 * -EBUSY: another checkpoint that is not settled has one of these files. */
int fx_begin(struct fx_engine *engine, struct fx_plan *plan, int at, const char *const *paths,
             const struct fx_held *held, struct fx_checkpoint **out, struct fx_error *error);
/* The inode of the file that the checkpoint opened; 0: it opened none. */
uint64_t fx_file_inode(const struct fx_checkpoint *ck, uint32_t file);
/* The layer's memory must stay valid and unchanged until a fence on it returned 1. -EINVAL: sources that do
 * not fit the plan; -EALREADY: emitted before. On a failed or cancelled checkpoint it only counts. */
int fx_emit(struct fx_checkpoint *ck, uint32_t layer, struct fx_sources *sources);
/* For a layer with memory on devices: what is copied is its content after the work that is in `streams` now, one
 * for each of its devices. -EINVAL also: a device without a stream, or that was not opened. */
int fx_emit_from(struct fx_checkpoint *ck, uint32_t layer, struct fx_sources *sources,
                 const struct fx_stream *streams, uint32_t n_streams);
uint32_t fx_emitted(struct fx_checkpoint *ck);
int fx_copied(struct fx_checkpoint *ck, int64_t timeout_ns, struct fx_error *error);
int fx_durable(struct fx_checkpoint *ck, int64_t timeout_ns, struct fx_error *error);
/* Gives the checkpoint up. Returns when no thread reads the emitted memory any more; never waits for the
 * disk. */
void fx_cancel(struct fx_checkpoint *ck);
/* 1 when it is over and no thread will touch its files again: only then may others write to them. */
int fx_settled(struct fx_checkpoint *ck, int64_t timeout_ns);
/* All of the plan's CRC-32C; valid once durable. Lives as long as the checkpoint. */
const uint32_t *fx_crcs(const struct fx_checkpoint *ck);
void fx_checkpoint_release(struct fx_checkpoint *ck);

/* ---- fences (core/fence.c) ---- */

/* 1 when all emitted pieces of the layer (-1: of all layers), in every checkpoint, are copied out or dropped.
 * The caller helps: it copies pieces that no writer has taken into staging while there is room. It never
 * waits for another layer's emit: if a piece's chunk waits for one and no staging room can come, that
 * checkpoint fails. */
int fx_fence(struct fx_engine *engine, int64_t layer, int64_t timeout_ns);
/* For work that is put into `streams` afterwards. The host waits only until the layer's copies were issued on
 * those streams' devices; the streams then wait for the copies themselves. */
int fx_fence_for(struct fx_engine *engine, int64_t layer, int64_t timeout_ns, const struct fx_stream *streams,
                 uint32_t n_streams);

/* ---- CUDA devices (cuda/device.c, cuda/fetch.c) ---- */

/* Loads the driver from `path` (NULL: libcuda.so.1). */
int fx_cuda_open(struct fx_engine *engine, const char *path, struct fx_error *error);
/* Makes ready to copy from a device: retains its primary context, makes a stream, and with the first device
 * turns the staging buffers into pinned memory. Not from two threads at once. Errors: err is EREMOTEIO and path the
 * driver's name and text for what went wrong. */
int fx_cuda_device(struct fx_engine *engine, uint32_t ordinal, struct fx_error *error);

struct fx_fetch;

/* Starts to copy `nbytes` of a device's memory, as they are after the work that is in its `stream` now, and puts the copy into
 * that stream: the memory may change in what is put there afterwards. Waits for nothing. -ECANCELED: the engine is closed. */
int fx_fetch_new(struct fx_engine *engine, const struct fx_stream *stream, const void *from, uint64_t nbytes,
                 struct fx_fetch **out, struct fx_error *error);
/* Waits until they have come, also after the engine was closed, and copies them to `to`. */
int fx_fetch_wait(struct fx_fetch *fetch, void *to, struct fx_error *error);
void fx_fetch_free(struct fx_fetch *fetch);

/* ---- a monitor in another process (monitor/ring.c, monitor/relay.c) ----
 *
 * Shared memory of `slots` chunks. The trainer's engine (mock = 1, staging_bytes = slots * chunk) fills slots and posts
 * them, but for files without a path; for it a checkpoint is durable when all of it was posted, and bytes_written counts
 * what the monitor wrote. The monitor's engine writes what fx_ring_next finds. Descriptors are duplicated; the ring must
 * live until fx_engine_close returned 1.
 */

struct fx_ring;

struct fx_posted {
    uint64_t checkpoint; /* fx_id() of the trainer's checkpoint */
    uint32_t chunk;      /* in the plan's numbering */
    uint32_t slot;
    uint32_t same; /* the disk holds these bytes already */
};

/* -EINVAL, -ENOMEM (also: not as much shared memory), or what memfd_create says. A ring owns its descriptor, also the
 * one that fx_ring_open was given. */
int fx_ring_new(uint32_t slots, uint64_t slot_bytes, struct fx_ring **out, struct fx_error *error);
int fx_ring_open(int fd, struct fx_ring **out, struct fx_error *error);
int fx_ring_fd(const struct fx_ring *ring);
void fx_ring_free(struct fx_ring *ring);
/* The next posted slot from number *from on, which is moved behind it: 1, or 0 if there is none. */
int fx_ring_next(struct fx_ring *ring, uint32_t *from, struct fx_posted *out);
void fx_ring_return(struct fx_ring *ring, uint32_t slot, int freed); /* of the monitor, unread */
/* `posted` and `freed` are non-blocking eventfds, `peer` the monitor's pidfd. When it ends, every checkpoint that was not
 * posted in full fails with EPIPE, and none can begin. */
int fx_relay_trainer(struct fx_engine *engine, struct fx_ring *ring, int posted, int freed, int peer,
                     struct fx_error *error);
/* Another monitor took over after the one that ended. -EBUSY: it has not ended, as far as the engine knows. */
int fx_relay_revive(struct fx_engine *engine, int peer, struct fx_error *error);
int fx_relay_monitor(struct fx_engine *engine, struct fx_ring *ring, int freed, struct fx_error *error);
uint64_t fx_id(const struct fx_checkpoint *ck); /* unique in its engine, ascending */
/* Gives a posted slot to the monitor's checkpoint of it, whose plan has one layer for each chunk. The slot goes back when
 * it is written or not wanted. -EINVAL, -EALREADY: the slot is still the caller's. */
int fx_emit_posted(struct fx_checkpoint *ck, const struct fx_posted *posted);

/* ---- verified reading (io/read.c) ---- */

struct fx_target {
    uint64_t offset; /* absolute, in the file */
    uint64_t nbytes;
    uint64_t itemsize;
    struct fx_view view;
};

#define FX_MISMATCH 1 /* error: offset of the chunk, expected, found */
#define FX_TRUNCATED 2

struct fx_range {
    uint64_t first, n;
};

/* Reads ranges of chunks of an open file in `threads` threads, checks each chunk against crcs[] (indexed from the file's
 * first chunk) and only then copies it into the targets that overlap it. A thread takes 64 MiB at most, however large the
 * chunks are: larger ones are read twice where a target wants them; of small ones it reads several together. 0, FX_MISMATCH
 * or FX_TRUNCATED with *error filled in, or a negative errno. */
int fx_read_verified(int fd, const char *path, uint64_t nbytes, uint64_t chunk_bytes, const uint32_t *crcs,
                     const struct fx_range *ranges, uint32_t n_ranges, const struct fx_target *targets, uint32_t n_targets,
                     uint32_t threads, struct fx_error *error);

/* ---- a picture of what went on (core/trace.c) ---- */

enum fx_span_kind {
    FX_SPAN_COPY,   /* a writer: copy and checksum of a chunk; track: the writer */
    FX_SPAN_WRITE,  /* a writer: a chunk to the disk, or to a monitor */
    FX_SPAN_SYNC,   /* a writer: sync of a file */
    FX_SPAN_FENCE,  /* a caller of fx_fence that had to wait or help */
    FX_SPAN_HELP,   /* within a fence: a piece that the caller copied */
    FX_SPAN_ISSUE,  /* the copier: calls of the driver for a piece */
    FX_SPAN_DEVICE, /* a piece's copy on a device, from its issue or the end of the one before; track: the device */
};

struct fx_span {
    uint32_t kind, track;
    uint64_t checkpoint;   /* fx_id; 0: of none */
    int64_t layer, chunk;  /* -1: of none, or all */
    uint64_t nbytes;
    int64_t begin_ns, end_ns; /* CLOCK_MONOTONIC */
};

/* Starts to record, `capacity` spans at most until they are taken; 0: stops. -ENOMEM. */
int fx_trace(struct fx_engine *engine, uint32_t capacity);
/* Moves up to n spans out, in the order of their ends; *dropped: how many found no room since fx_trace. */
uint32_t fx_trace_take(struct fx_engine *engine, struct fx_span *out, uint32_t n, uint64_t *dropped);

/* ---- files (io/io.c) ---- */

/* Every file operation of the engine and of its users. Results: >= 0, or a negative errno. Tests use another table
 * (testing/). `at`, `into`: the descriptor of a directory in which the last name of the path is looked up, whatever the rest
 * of the path leads to by now; AT_FDCWD: the path counts. */
struct fx_io_ops {
    int (*open)(int at, const char *path, int flags, int mode);
    int (*close)(int fd);
    int64_t (*pwrite)(int fd, const void *data, size_t n, int64_t offset);
    int64_t (*pread)(int fd, void *data, size_t n, int64_t offset);
    int (*ftruncate)(int fd, int64_t nbytes);
    int (*fdatasync)(int fd);
    int (*fsync)(int fd);
    int (*rename)(int at, const char *from, int into, const char *to);
    int (*exchange)(int at, const char *one, int into, const char *other);
    int (*unlink)(int at, const char *path);
    int (*mkdir)(int at, const char *path, int mode);
    int (*rmdir)(int at, const char *path);
    int (*fallocate)(int fd, int64_t nbytes);
};

extern const struct fx_io_ops fx_io_real;
const struct fx_io_ops *fx_io(void); /* the table in use */
void fx_io_use(const struct fx_io_ops *table);

/* The table's operations with EINTR and short transfers looped. pwrite and pread return 0 or a negative
 * errno; *done (may be NULL) counts bytes: pread stops short of n only at the end of the file. */
int fx_open(int at, const char *path, int flags, int mode);
int fx_close(int fd);
int fx_pwrite(int fd, const void *data, size_t n, int64_t offset, size_t *done);
int fx_pread(int fd, void *data, size_t n, int64_t offset, size_t *done);
int fx_ftruncate(int fd, int64_t nbytes);
/* Reserves blocks for the first nbytes, and makes the file at least that long. -EOPNOTSUPP: cannot be done here. */
int fx_fallocate(int fd, int64_t nbytes);
int fx_fdatasync(int fd);
int fx_fsync(int fd);
int fx_rename(int at, const char *from, int into, const char *to);
/* Each of two gets the other's name, at once. -EINVAL, -ENOSYS: this file system or kernel cannot. */
int fx_exchange(int at, const char *one, int into, const char *other);
int fx_unlink(int at, const char *path);
int fx_mkdir(int at, const char *path, int mode);
int fx_rmdir(int at, const char *path);
/* Drops O_DIRECT from an open file whose file system refused a transfer with it. */
int fx_make_buffered(int fd);

/* ---- forked children (core/fork.c) ---- */

/* Has a child that is forked from now on, by whatever library, close the descriptor first thing: a lock on it would outlive
 * this process with the child. -EMFILE: there are too many. `keep` takes that back. */
int fx_fork_close(int fd);
void fx_fork_keep(int fd);

/* ---- the training thread (core/host.c) ---- */

/* Puts the nbytes at `value` to each of n addresses. */
void fx_spread(const void *value, uint32_t nbytes, const uint64_t *addresses, uint64_t n);

/* How the calling thread rounds and treats denormal numbers (a fenv_t, opaque); `mode` is aligned to 16 bytes. */
#define FX_FLOAT_MODE 64
void fx_float_mode(char *mode);
void fx_float_mode_use(const char *mode);

#endif
