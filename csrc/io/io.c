/* The table of file operations, and loops over it for interrupted and short transfers. */
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EXCHANGE = 1 << 1 }; /* RENAME_EXCHANGE, which older headers lack */

static int result(int r) { return r < 0 ? -errno : r; }

/* What is looked up in `at`: the last name of the path, so that no link on the way can lead elsewhere. */
static const char *name_in(int at, const char *path) {
    const char *slash = strrchr(path, '/');
    return at == AT_FDCWD || !slash ? path : slash + 1;
}

static int real_open(int at, const char *path, int flags, int mode) {
    return result(openat(at, name_in(at, path), flags | O_CLOEXEC, mode));
}
static int real_close(int fd) { return result(close(fd)); }
static int real_ftruncate(int fd, int64_t nbytes) { return result(ftruncate(fd, nbytes)); }
/* Without glibc's emulation, which writes: EOPNOTSUPP where the file system cannot reserve. */
static int real_fallocate(int fd, int64_t nbytes) { return result(fallocate(fd, 0, 0, nbytes)); }
static int real_fdatasync(int fd) { return result(fdatasync(fd)); }
static int real_fsync(int fd) { return result(fsync(fd)); }
static int real_rename(int at, const char *from, int into, const char *to) {
    return result(renameat(at, name_in(at, from), into, name_in(into, to)));
}
static int real_exchange(int at, const char *one, int into, const char *other) {
    return result((int)syscall(SYS_renameat2, at, name_in(at, one), into, name_in(into, other), EXCHANGE));
}
static int real_unlink(int at, const char *path) { return result(unlinkat(at, name_in(at, path), 0)); }
static int real_mkdir(int at, const char *path, int mode) {
    return result(mkdirat(at, name_in(at, path), (mode_t)mode));
}
static int real_rmdir(int at, const char *path) { return result(unlinkat(at, name_in(at, path), AT_REMOVEDIR)); }

static int64_t real_pwrite(int fd, const void *data, size_t n, int64_t offset) {
    ssize_t r = pwrite(fd, data, n, offset);
    return r < 0 ? -errno : r;
}

static int64_t real_pread(int fd, void *data, size_t n, int64_t offset) {
    ssize_t r = pread(fd, data, n, offset);
    return r < 0 ? -errno : r;
}

const struct fx_io_ops fx_io_real = {
    .open = real_open,
    .close = real_close,
    .pwrite = real_pwrite,
    .pread = real_pread,
    .ftruncate = real_ftruncate,
    .fdatasync = real_fdatasync,
    .fsync = real_fsync,
    .rename = real_rename,
    .exchange = real_exchange,
    .unlink = real_unlink,
    .mkdir = real_mkdir,
    .rmdir = real_rmdir,
    .fallocate = real_fallocate,
};

static _Atomic(const struct fx_io_ops *) table = &fx_io_real;

const struct fx_io_ops *fx_io(void) { return atomic_load_explicit(&table, memory_order_acquire); }
void fx_io_use(const struct fx_io_ops *other) { atomic_store_explicit(&table, other, memory_order_release); }

/* EINTR means "not done, try again" for all of these. */
#define RETRY(call)                                                                                          \
    int r;                                                                                                   \
    do r = (call);                                                                                           \
    while (r == -EINTR);                                                                                     \
    return r

int fx_open(int at, const char *path, int flags, int mode) { RETRY(fx_io()->open(at, path, flags, mode)); }
int fx_ftruncate(int fd, int64_t nbytes) { RETRY(fx_io()->ftruncate(fd, nbytes)); }
int fx_fallocate(int fd, int64_t nbytes) { RETRY(fx_io()->fallocate(fd, nbytes)); }
int fx_fdatasync(int fd) { RETRY(fx_io()->fdatasync(fd)); }
int fx_fsync(int fd) { RETRY(fx_io()->fsync(fd)); }
int fx_rename(int at, const char *from, int into, const char *to) {
    RETRY(fx_io()->rename(at, from, into, to));
}
int fx_exchange(int at, const char *one, int into, const char *other) {
    RETRY(fx_io()->exchange(at, one, into, other));
}
int fx_unlink(int at, const char *path) { RETRY(fx_io()->unlink(at, path)); }
int fx_mkdir(int at, const char *path, int mode) { RETRY(fx_io()->mkdir(at, path, mode)); }
int fx_rmdir(int at, const char *path) { RETRY(fx_io()->rmdir(at, path)); }

/* Linux has closed the descriptor when close says EINTR: a second try could close somebody else's. */
int fx_close(int fd) {
    int r = fx_io()->close(fd);
    return r == -EINTR ? 0 : r;
}

/* How far a short transfer counts. One that was aligned goes on at an aligned offset, as O_DIRECT demands. */
static size_t progress(size_t got, size_t n, int64_t offset) {
    if (got == n || (n | (size_t)offset) % FX_BLOCK || got < FX_BLOCK) return got;
    return got - got % FX_BLOCK;
}

int fx_pwrite(int fd, const void *data, size_t n, int64_t offset, size_t *done) {
    size_t at = 0;
    int err = 0;
    while (at < n && !err) {
        int64_t r = fx_io()->pwrite(fd, (const char *)data + at, n - at, offset + (int64_t)at);
        if (r > 0) at += progress((size_t)r, n - at, offset + (int64_t)at);
        else if (r != -EINTR) err = r ? (int)r : -EIO; /* 0 bytes and no error: no progress will ever come */
    }
    if (done) *done = at;
    return err;
}

int fx_pread(int fd, void *data, size_t n, int64_t offset, size_t *done) {
    size_t at = 0;
    int err = 0;
    while (at < n && !err) {
        int64_t r = fx_io()->pread(fd, (char *)data + at, n - at, offset + (int64_t)at);
        if (r == 0) break;
        if (r > 0) at += (size_t)r;
        else if (r != -EINTR) err = (int)r;
        if (r > 0 && at < n && at % FX_BLOCK && n % FX_BLOCK == 0)
            break; /* an aligned read stops askew at the end only */
    }
    if (done) *done = at;
    return err;
}

int fx_make_buffered(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 ? -errno : result(fcntl(fd, F_SETFL, flags & ~O_DIRECT));
}
