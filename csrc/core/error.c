/* Errors travel as values: what was tried, on which file, where in it, and the errno. */
#include "engine.h"

#include <stdio.h>

int fx_error_set(struct fx_error *error, const char *operation, const char *path, int64_t offset, int err) {
    if (error) {
        error->operation = operation;
        error->err = err;
        error->offset = offset;
        error->expected = error->found = 0;
        snprintf(error->path, sizeof error->path, "%s", path ? path : "");
    }
    return -err;
}
