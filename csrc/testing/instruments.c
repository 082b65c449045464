/* The instruments, as a second table of operations around the real one. */
#include "testing/instruments.h"

#include "core/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

static const char *const names[FX_OPS] = {"open",  "close",  "pwrite", "pread", "ftruncate", "fdatasync",
                                          "fsync", "rename", "unlink", "mkdir", "rmdir",     "fallocate", "exchange", "copy"};

const char *fx_op_name(int op) { return op >= 0 && op < FX_OPS ? names[op] : NULL; }

/* One call, whatever its operation. */
struct call {
    int op, fd, flags, mode, at, target_at;
    const char *path, *target;
    int64_t offset;
    size_t length;
    const void *data;
    void *into;
};

static atomic_int_fast64_t delays[FX_OPS], calls[FX_OPS];

/* ---- faults ---- */

static pthread_mutex_t fault_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int op, err;
    int64_t left;
} fault;

/* Whether this call is the one to fail; *err is how (0: short). */
static bool is_faulty(int op, int *err) {
    pthread_mutex_lock(&fault_lock);
    bool hit = fault.left > 0 && (fault.op < 0 || fault.op == op) && --fault.left == 0;
    *err = fault.err;
    pthread_mutex_unlock(&fault_lock);
    return hit;
}

/* Sleeps in short turns, so that a test which sets the delay back frees a "hung" thread at once. */
static void delay(int op) {
    if (!atomic_load(&delays[op])) return;
    int64_t start = fx_now();
    for (;;) {
        int64_t left = start + atomic_load(&delays[op]) - fx_now();
        if (left <= 0) return;
        struct timespec turn = {0, left < 1000000 ? left : 1000000};
        nanosleep(&turn, NULL);
    }
}

void fx_copy_delay(void) { delay(FX_COPY); }

/* ---- the log ---- */

/* Followed by the path, the target (rename, exchange) and the data (pwrite). Native byte order: it is read on this
 * machine. */
struct log_entry {
    int64_t result, offset;
    uint64_t length, data_nbytes;
    int32_t op, flags, mode, created;
    uint32_t path_nbytes, target_nbytes;
};

static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_bool recording;
static FILE *log_file;
static pid_t log_owner; /* a forked child shares the file: it must not write to it */

/* The absolute path without symbolic links in its directories; the last component may not exist. */
static void resolve(const char *path, char *out, size_t n) {
    char directory[PATH_MAX], real[PATH_MAX];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    snprintf(directory, sizeof directory, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    if (!*name || !realpath(directory, real)) snprintf(out, n, "%s", path);
    else snprintf(out, n, "%.4095s/%.255s", strcmp(real, "/") ? real : "", name);
}

/* The path a descriptor has now, renames included; "... (deleted)" if it has none. */
static void path_of(int fd, char *out, size_t n) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t got = readlink(link, out, n - 1);
    out[got > 0 ? got : 0] = 0;
}

/* Of a call: the path itself, or its last name in the directory `at`. */
static void locate(int at, const char *path, char *out, size_t n) {
    const char *slash = strrchr(path, '/');
    char directory[PATH_MAX];
    if (at == AT_FDCWD) {
        resolve(path, out, n);
        return;
    }
    path_of(at, directory, sizeof directory);
    snprintf(out, n, "%.4095s/%.255s", directory, slash ? slash + 1 : path);
}

static int is_logged(int op) { return op != FX_PREAD && op != FX_CLOSE; }

static void append(const struct call *c, int64_t result, int created, const char *path, const char *target) {
    struct log_entry entry = {
        .result = result,
        .offset = c->offset,
        .length = c->length,
        .op = c->op,
        .flags = c->flags,
        .mode = c->mode,
        .created = created,
        .path_nbytes = (uint32_t)strlen(path),
        .target_nbytes = (uint32_t)strlen(target),
        .data_nbytes = c->op == FX_PWRITE && result > 0 ? (uint64_t)result : 0,
    };
    fwrite(&entry, sizeof entry, 1, log_file);
    fwrite(path, 1, entry.path_nbytes, log_file);
    fwrite(target, 1, entry.target_nbytes, log_file);
    if (entry.data_nbytes) fwrite(c->data, 1, entry.data_nbytes, log_file);
    fflush(log_file);
}

/* ---- carrying out a call ---- */

static int64_t perform(const struct call *c) {
    switch (c->op) {
    case FX_OPEN: return fx_io_real.open(c->at, c->path, c->flags, c->mode);
    case FX_CLOSE: return fx_io_real.close(c->fd);
    case FX_PWRITE: return fx_io_real.pwrite(c->fd, c->data, c->length, c->offset);
    case FX_PREAD: return fx_io_real.pread(c->fd, c->into, c->length, c->offset);
    case FX_FTRUNCATE: return fx_io_real.ftruncate(c->fd, (int64_t)c->length);
    case FX_FDATASYNC: return fx_io_real.fdatasync(c->fd);
    case FX_FSYNC: return fx_io_real.fsync(c->fd);
    case FX_RENAME: return fx_io_real.rename(c->at, c->path, c->target_at, c->target);
    case FX_UNLINK: return fx_io_real.unlink(c->at, c->path);
    case FX_MKDIR: return fx_io_real.mkdir(c->at, c->path, c->mode);
    case FX_RMDIR: return fx_io_real.rmdir(c->at, c->path);
    case FX_FALLOCATE: return fx_io_real.fallocate(c->fd, (int64_t)c->length);
    case FX_EXCHANGE: return fx_io_real.exchange(c->at, c->path, c->target_at, c->target);
    }
    return -ENOSYS;
}

/* As Linux does: a close that fails has closed all the same. */
static int64_t fail_call(const struct call *c, int64_t result) {
    if (c->op == FX_CLOSE) perform(c);
    return result;
}

/* One at a time, in all processes that record to this file, so that the log has the order in which the kernel saw the
 * calls. */
static int64_t perform_logged(const struct call *c, bool failing, int64_t result) {
    char path[PATH_MAX + 256], target[PATH_MAX + 256] = "";
    pthread_mutex_lock(&log_lock);
    int wanted = log_file && is_logged(c->op) && log_owner == getpid(), created = 0;
    if (wanted) {
        while (flock(fileno(log_file), LOCK_EX) && errno == EINTR) continue;
        if (c->path) locate(c->at, c->path, path, sizeof path);
        else path_of(c->fd, path, sizeof path);
        if (c->target) locate(c->target_at, c->target, target, sizeof target);
        if (c->op == FX_OPEN && c->flags & O_CREAT)
            created = faccessat(AT_FDCWD, path, F_OK, AT_SYMLINK_NOFOLLOW) != 0;
    }
    result = failing ? fail_call(c, result) : perform(c);
    if (wanted) {
        append(c, result, created && result >= 0, path, target);
        flock(fileno(log_file), LOCK_UN);
    }
    pthread_mutex_unlock(&log_lock);
    return result;
}

static int64_t run(struct call c) {
    int err = 0;
    atomic_fetch_add(&calls[c.op], 1);
    delay(c.op);
    bool faulty = is_faulty(c.op, &err), failing = faulty && err;
    if (faulty && !err && c.length > 1 && (c.op == FX_PWRITE || c.op == FX_PREAD)) {
        c.length /= 2;
        if (c.length > FX_BLOCK) c.length -= c.length % FX_BLOCK;
    }
    if (atomic_load(&recording)) return perform_logged(&c, failing, -err);
    return failing ? fail_call(&c, -err) : perform(&c);
}

static int test_open(int at, const char *path, int flags, int mode) {
    return (int)run((struct call){.op = FX_OPEN, .fd = -1, .at = at, .path = path, .flags = flags, .mode = mode});
}
static int test_close(int fd) { return (int)run((struct call){.op = FX_CLOSE, .fd = fd}); }
static int64_t test_pwrite(int fd, const void *data, size_t n, int64_t offset) {
    return run((struct call){.op = FX_PWRITE, .fd = fd, .data = data, .length = n, .offset = offset});
}
static int64_t test_pread(int fd, void *data, size_t n, int64_t offset) {
    return run((struct call){.op = FX_PREAD, .fd = fd, .into = data, .length = n, .offset = offset});
}
static int test_ftruncate(int fd, int64_t n) {
    return (int)run((struct call){.op = FX_FTRUNCATE, .fd = fd, .length = (size_t)n});
}
static int test_fallocate(int fd, int64_t n) {
    return (int)run((struct call){.op = FX_FALLOCATE, .fd = fd, .length = (size_t)n});
}
static int test_fdatasync(int fd) { return (int)run((struct call){.op = FX_FDATASYNC, .fd = fd}); }
static int test_fsync(int fd) { return (int)run((struct call){.op = FX_FSYNC, .fd = fd}); }
static int test_rename(int at, const char *from, int into, const char *to) {
    return (int)run((struct call){.op = FX_RENAME, .fd = -1, .at = at, .path = from, .target_at = into, .target = to});
}
static int test_exchange(int at, const char *one, int into, const char *other) {
    return (int)run(
        (struct call){.op = FX_EXCHANGE, .fd = -1, .at = at, .path = one, .target_at = into, .target = other});
}
static int test_unlink(int at, const char *path) {
    return (int)run((struct call){.op = FX_UNLINK, .fd = -1, .at = at, .path = path});
}
static int test_mkdir(int at, const char *path, int mode) {
    return (int)run((struct call){.op = FX_MKDIR, .fd = -1, .at = at, .path = path, .mode = mode});
}
static int test_rmdir(int at, const char *path) {
    return (int)run((struct call){.op = FX_RMDIR, .fd = -1, .at = at, .path = path});
}

static const struct fx_io_ops instruments = {
    .open = test_open,
    .close = test_close,
    .pwrite = test_pwrite,
    .pread = test_pread,
    .ftruncate = test_ftruncate,
    .fdatasync = test_fdatasync,
    .fsync = test_fsync,
    .rename = test_rename,
    .exchange = test_exchange,
    .unlink = test_unlink,
    .mkdir = test_mkdir,
    .rmdir = test_rmdir,
    .fallocate = test_fallocate,
};

/* ---- switches ---- */

int fx_io_record(const char *path, int append) {
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (append ? 0 : O_TRUNC), 0644);
    if (fd < 0) return -errno;
    FILE *file = fdopen(fd, "ab");
    if (!file) {
        close(fd);
        return -ENOMEM;
    }
    fx_io_use(&instruments);
    pthread_mutex_lock(&log_lock);
    if (log_file) fclose(log_file);
    log_file = file;
    log_owner = getpid();
    atomic_store(&recording, true);
    pthread_mutex_unlock(&log_lock);
    return 0;
}

int fx_io_stop_recording(void) {
    pthread_mutex_lock(&log_lock);
    atomic_store(&recording, false);
    int r = log_file && fclose(log_file) ? -errno : 0;
    log_file = NULL;
    pthread_mutex_unlock(&log_lock);
    return r;
}

void fx_io_fail(int op, int64_t nth, int err) {
    fx_io_use(&instruments);
    pthread_mutex_lock(&fault_lock);
    fault.op = op;
    fault.left = nth;
    fault.err = err;
    pthread_mutex_unlock(&fault_lock);
}

void fx_io_delay(int op, int64_t ns) {
    if (op < 0 || op >= FX_OPS) return;
    fx_io_use(&instruments);
    atomic_store(&delays[op], ns);
}

int64_t fx_io_calls(int op) {
    fx_io_use(&instruments);
    if (op >= 0) return op < FX_OPS ? atomic_load(&calls[op]) : 0;
    int64_t sum = 0;
    for (int i = 0; i < FX_COPY; i++) sum += atomic_load(&calls[i]);
    return sum;
}
