/* The chunks that devices copy into. */
#include "core/system.h"
#include "cuda/cuda.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PREFER_NODE 1 /* MPOL_PREFERRED */

/* The NUMA node of a PCI device; -1 where the machine does not tell. */
static int node_of(const char *pci) {
    char path[128], name[32] = "";
    int node = -1;
    for (size_t i = 0; i + 1 < sizeof name && pci[i]; i++) name[i] = (char)tolower((unsigned char)pci[i]);
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/numa_node", name);
    FILE *file = fopen(path, "re");
    if (!file) return -1;
    if (fscanf(file, "%d", &node) != 1) node = -1;
    fclose(file);
    return node;
}

/* Memory of another node than the device's costs bandwidth on machines with two sockets. A preference only:
 * where it is refused, the memory is as good as any. */
void *fx_pinned_new(uint64_t nbytes, const char *pci) {
    void *memory = fx_buffer_new(nbytes);
    int node = memory ? node_of(pci) : -1;
    if (node >= 0 && node < 63) {
        unsigned long mask = 1ul << node;
        (void)syscall(SYS_mbind, memory, nbytes, PREFER_NODE, &mask, 64ul, 0u);
    }
    return memory;
}
