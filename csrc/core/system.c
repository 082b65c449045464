/* Memory for buffers, threads and the clock, as this machine gives them. */
#include "core/system.h"

#include <signal.h>
#include <sys/mman.h>
#include <time.h>

/* Not inherited by forked children: they never touch it, and a fork would mark each page copy-on-write. */
void *fx_buffer_new(uint64_t nbytes) {
    void *buffer = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED) return NULL;
    madvise(buffer, nbytes, MADV_DONTFORK);
    madvise(buffer, nbytes, MADV_HUGEPAGE);
    return buffer;
}

void fx_buffer_free(void *buffer, uint64_t nbytes) {
    if (buffer) munmap(buffer, nbytes);
}

/* A new thread inherits the mask of the one that starts it. */
int fx_thread_start(pthread_t *thread, void *(*function)(void *), void *argument, const char *name) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int r = pthread_create(thread, NULL, function, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!r) pthread_setname_np(*thread, name);
    return r;
}

int64_t fx_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND_NS + t.tv_nsec;
}

int64_t fx_deadline(int64_t timeout_ns) {
    int64_t now = fx_now();
    return timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns;
}
