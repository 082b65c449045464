/* Making, mapping and reading the memory that trainer and monitor share; see ring.h. */
#include "monitor/ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x31676e69722d7866ull /* "fx-ring1" */

static uint64_t round_up(uint64_t n) { return (n + FX_BLOCK - 1) / FX_BLOCK * FX_BLOCK; }

static uint64_t head_bytes(uint32_t slots) {
    return round_up(sizeof(struct ring_head) + slots * sizeof(struct slot));
}

/* Not inherited by forked children: a data loader's worker must not keep the memory alive. */
static int map(int fd, uint64_t nbytes, struct fx_ring **out, struct fx_error *error) {
    struct fx_ring *ring = calloc(1, sizeof *ring);
    if (!ring) return fx_error_set(error, "shared memory", "", -1, ENOMEM);
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        free(ring);
        return fx_error_set(error, "mmap of shared memory", "", (int64_t)nbytes, errno);
    }
    madvise(memory, nbytes, MADV_DONTFORK);
    ring->fd = fd;
    ring->head = memory;
    ring->nbytes = nbytes;
    *out = ring;
    return 0;
}

/* The memory is taken now, so that too little of it is an error here and not a SIGBUS in a copy; sealed, so that no
 * process can shrink it under the other. */
static int reserve(int fd, uint64_t nbytes, struct fx_error *error) {
    if (ftruncate(fd, (off_t)nbytes))
        return fx_error_set(error, "ftruncate of shared memory", "", (int64_t)nbytes, errno);
    int r;
    do r = fallocate(fd, 0, 0, (off_t)nbytes) ? errno : 0;
    while (r == EINTR);
    if (r) return fx_error_set(error, "allocation of shared memory", "", (int64_t)nbytes, r);
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        return fx_error_set(error, "sealing of shared memory", "", -1, errno);
    return 0;
}

int fx_ring_new(uint32_t slots, uint64_t slot_bytes, struct fx_ring **out, struct fx_error *error) {
    if (slots < 2 || !slot_bytes || slot_bytes % FX_BLOCK)
        return fx_error_set(error, "shared memory: it takes two slots of whole blocks", "", -1, EINVAL);
    uint64_t nbytes = head_bytes(slots) + slots * slot_bytes;
    int fd = memfd_create("fxckpt-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return fx_error_set(error, "memfd_create", "", -1, errno);
    int r = reserve(fd, nbytes, error);
    if (!r) r = map(fd, nbytes, out, error);
    if (r) {
        close(fd);
        return r;
    }
    struct ring_head *head = (*out)->head; /* all else is zeros: every slot is OWNED */
    head->magic = MAGIC;
    head->slot_bytes = slot_bytes;
    head->slots = slots;
    head->data_at = (uint32_t)head_bytes(slots);
    return 0;
}

int fx_ring_open(int fd, struct fx_ring **out, struct fx_error *error) {
    struct stat st;
    if (fstat(fd, &st)) return fx_error_set(error, "fstat of shared memory", "", -1, errno);
    uint64_t nbytes = (uint64_t)st.st_size;
    if (nbytes < sizeof(struct ring_head)) return fx_error_set(error, "shared memory: too small", "", -1, EINVAL);
    int r = map(fd, nbytes, out, error);
    if (r) return r;
    const struct ring_head *head = (*out)->head;
    bool good = head->magic == MAGIC && head->data_at == head_bytes(head->slots) &&
                nbytes == head->data_at + head->slots * head->slot_bytes;
    if (good) return 0;
    (*out)->fd = -1; /* still the caller's */
    fx_ring_free(*out);
    return fx_error_set(error, "shared memory: not of this version", "", -1, EINVAL);
}

void fx_ring_free(struct fx_ring *ring) {
    if (!ring) return;
    munmap(ring->head, ring->nbytes);
    if (ring->fd >= 0) close(ring->fd);
    free(ring);
}

int fx_ring_fd(const struct fx_ring *ring) { return ring->fd; }

int fx_ring_next(struct fx_ring *ring, uint32_t *from, struct fx_posted *out) {
    for (; *from < ring->head->slots; ++*from) {
        struct slot *slot = &ring->head->table[*from];
        if (atomic_load_explicit(&slot->state, memory_order_acquire) != POSTED) continue;
        *out = (struct fx_posted){.checkpoint = slot->checkpoint, .chunk = slot->chunk, .slot = *from, .same = slot->same};
        ++*from;
        return 1;
    }
    return 0;
}
