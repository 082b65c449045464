/* Forks (data loader workers, mostly) while the engine works.
 *
 * The child has none of the engine's threads, so nothing there may call the engine. It does inherit the
 * descriptors of files being written, and would hold them for its whole life: the store could never again get
 * a write lease on a recycled file, nor the disk the space of a removed one. So the child closes them, first
 * thing.
 *
 * The handlers hold every engine's lock across the fork, so that the child sees the lists whole. That wait is
 * short: the lock is never held while copying or in the disk.
 */
#include "core/sink.h"

#include <errno.h>
#include <unistd.h>

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct fx_engine *engines;

/* Descriptors of the caller's that a child must not keep either. */
enum { MOST = 256 };
static int closed_in_child[MOST];
static uint32_t n_closed_in_child;

static void before_fork(void) {
    pthread_mutex_lock(&list_lock);
    for (struct fx_engine *e = engines; e; e = e->next) fx_lock(e);
}

static void unlock_all(void) {
    for (struct fx_engine *e = engines; e; e = e->next) fx_unlock(e);
    pthread_mutex_unlock(&list_lock);
}

/* Straight to the kernel: the table of operations may have its own locks held by a thread that is gone. */
static void in_child(void) {
    for (struct fx_engine *e = engines; e; e = e->next) e->sink->close_in_child(e);
    while (n_closed_in_child) close(closed_in_child[--n_closed_in_child]);
    unlock_all();
    engines = NULL;
}

static void install(void) { pthread_atfork(before_fork, unlock_all, in_child); }

int fx_fork_close(int fd) {
    pthread_once(&once, install);
    pthread_mutex_lock(&list_lock);
    bool room = n_closed_in_child < MOST;
    if (room) closed_in_child[n_closed_in_child++] = fd;
    pthread_mutex_unlock(&list_lock);
    return room ? 0 : -EMFILE;
}

void fx_fork_keep(int fd) {
    pthread_mutex_lock(&list_lock);
    for (uint32_t i = 0; i < n_closed_in_child; i++)
        if (closed_in_child[i] == fd) closed_in_child[i--] = closed_in_child[--n_closed_in_child];
    pthread_mutex_unlock(&list_lock);
}

void fx_fork_add(struct fx_engine *engine) {
    pthread_once(&once, install);
    pthread_mutex_lock(&list_lock);
    engine->next = engines;
    engines = engine;
    pthread_mutex_unlock(&list_lock);
}

void fx_fork_remove(struct fx_engine *engine) {
    pthread_mutex_lock(&list_lock);
    struct fx_engine **at = &engines;
    while (*at && *at != engine) at = &(*at)->next;
    if (*at) *at = engine->next;
    pthread_mutex_unlock(&list_lock);
}
