/* NVML as far as the tests' code asks it. What it says is in the file that FAKE_NVML names, read at
 * every call:
 *   gpu UUID PCI_ADDRESS USED_BYTES MIG_MODE
 *   process UUID PID BYTES     (as compute; BYTES of 2^64-1 is "not available")
 *   mps UUID PID BYTES         (under MPS)
 *   fail FUNCTION CODE
 * With -DWITHOUT_... a group of functions is missing, as in an old driver. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define UNINITIALIZED 1
#define INVALID_ARGUMENT 2
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define DRIVER_NOT_LOADED 9

typedef unsigned long long u64;
typedef struct {
    char uuid[80], pci[32];
    u64 used;
    unsigned mig;
} Gpu;
typedef struct {
    unsigned pid;
    u64 used;
    unsigned gpu_instance, compute_instance;
} Process;
typedef struct {
    u64 total, free, used;
} Memory;
typedef struct {
    unsigned version;
    u64 total, reserved, free, used;
} MemoryV2;

static int opened;

/* Calls `take` with each line of the script; returns the code that a function is to fail with. */
static int each_line(const char *function, void (*take)(const char *line, void *to), void *to) {
    FILE *script = getenv("FAKE_NVML") ? fopen(getenv("FAKE_NVML"), "r") : NULL;
    char line[256], name[80];
    int code, failure = SUCCESS;
    if (!script)
        return DRIVER_NOT_LOADED;
    if (!opened)
        failure = UNINITIALIZED;
    while (fgets(line, sizeof line, script)) {
        if (sscanf(line, "fail %79s %d", name, &code) == 2 && !strcmp(name, function))
            failure = code;
        if (take)
            take(line, to);
    }
    fclose(script);
    return failure;
}

typedef struct {
    const char *wanted;
    int by_uuid, count;
    Gpu found;
    int handle;
} Search;

static void search(const char *line, void *to) {
    Search *in = to;
    Gpu gpu;
    if (sscanf(line, "gpu %79s %31s %llu %u", gpu.uuid, gpu.pci, &gpu.used, &gpu.mig) != 4)
        return;
    in->count++;
    const char *name = in->by_uuid ? gpu.uuid : gpu.pci;
    if (in->wanted ? !strcmp(name, in->wanted) : in->count == in->handle)
        in->found = gpu, in->handle = in->count;
}

static int handle_of(const char *function, const char *wanted, int by_uuid, void **handle) {
    Search in = {.wanted = wanted, .by_uuid = by_uuid};
    int failure = each_line(function, search, &in);
    *handle = (void *)(long)in.handle;
    return failure ? failure : in.handle ? SUCCESS : NOT_FOUND;
}

static Gpu gpu_of(void *handle) {
    Search in = {.handle = (int)(long)handle};
    each_line("", search, &in);
    return in.found;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    opened++;
    return each_line("nvmlInitWithFlags", NULL, NULL);
}

int nvmlShutdown(void) {
    if (!opened)
        return UNINITIALIZED;
    opened--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    static char text[40];
    snprintf(text, sizeof text, "fake error %d", code);
    return text;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    return handle_of("nvmlDeviceGetHandleByUUID", uuid, 1, handle);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *pci, void **handle) {
    return handle_of("nvmlDeviceGetHandleByPciBusId_v2", pci, 0, handle);
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    memory->used = gpu_of(handle).used + (512 << 20); /* with what the driver reserves */
    return each_line("nvmlDeviceGetMemoryInfo", NULL, NULL);
}

#ifndef WITHOUT_NEWER
int nvmlDeviceGetMemoryInfo_v2(void *handle, MemoryV2 *memory) {
    if (memory->version != (sizeof *memory | 2 << 24))
        return INVALID_ARGUMENT;
    memory->reserved = 512 << 20, memory->used = gpu_of(handle).used;
    return each_line("nvmlDeviceGetMemoryInfo_v2", NULL, NULL);
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    *current = *pending = gpu_of(handle).mig;
    return each_line("nvmlDeviceGetMigMode", NULL, NULL);
}
#endif

typedef struct {
    const char *kind, *uuid;
    Process *into;
    unsigned room, count;
} Listing;

static void collect(const char *line, void *to) {
    Listing *in = to;
    char kind[16], uuid[80];
    Process process = {0};
    if (sscanf(line, "%15s %79s %u %llu", kind, uuid, &process.pid, &process.used) != 4 ||
        strcmp(kind, in->kind) || strcmp(uuid, in->uuid))
        return;
    if (in->count++ < in->room)
        in->into[in->count - 1] = process;
}

static int list(const char *function, const char *kind, void *handle, unsigned *count, Process *into) {
    Gpu gpu = gpu_of(handle);
    Listing in = {.kind = kind, .uuid = gpu.uuid, .into = into, .room = into ? *count : 0};
    int failure = each_line(function, collect, &in);
    *count = in.count;
    return failure ? failure : in.count > in.room ? INSUFFICIENT_SIZE : SUCCESS;
}

#ifndef WITHOUT_PROCESSES
#ifdef WITHOUT_NEWER
int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, Process *into) {
#else
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *into) {
#endif
    return list("nvmlDeviceGetComputeRunningProcesses", "process", handle, count, into);
}
#endif

#ifndef WITHOUT_NEWER
int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *handle, unsigned *count, Process *into) {
    return list("nvmlDeviceGetMPSComputeRunningProcesses", "mps", handle, count, into);
}
#endif
