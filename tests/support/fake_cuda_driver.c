/* The part of CUDA's driver and runtime that torch_memory_saver calls, on host memory.
 *
 * A physical allocation is a memfd, so what is unmapped and released leaves this process's RssShmem
 * as it would leave a GPU. Compiled once as libcuda.so.1 and, with -DRUNTIME, as libcudart. The
 * device has FAKE_CUDA_BYTES bytes. Results are CUDA's: 0 is success, 1 a wrong value, 2 no memory.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

uint64_t fake_cuda_free(void);

#ifndef RUNTIME
typedef struct {
    int file;
    size_t size;
} allocation;

static uint64_t used;

static uint64_t total(void) {
    const char *text = getenv("FAKE_CUDA_BYTES");
    return text ? strtoull(text, NULL, 10) : UINT64_MAX / 2;
}

uint64_t fake_cuda_free(void) { return total() - used; }

int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }

int cuCtxGetDevice(int *device) { return *device = 0, 0; }

int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 0, 0; }

int cuGetErrorString(int result, const char **text) { return *text = "fake", 0; }

int cuMemGetAllocationGranularity(size_t *size, const void *kind, int option) {
    return *size = 2 << 20, 0;
}

int cuMemAddressReserve(uint64_t *address, size_t size, size_t align, uint64_t at, uint64_t flags) {
    int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *address = (uint64_t)mmap(NULL, size, PROT_NONE, how, -1, 0);
    return (void *)*address == MAP_FAILED ? 2 : 0;
}

int cuMemAddressFree(uint64_t address, size_t size) { return munmap((void *)address, size) ? 1 : 0; }

int cuMemCreate(allocation **handle, size_t size, const void *kind, uint64_t flags) {
    if (size > fake_cuda_free())
        return 2;
    allocation *made = malloc(sizeof *made);
    *made = (allocation){memfd_create("fake-cuda", 0), size};
    if (made->file < 0 || ftruncate(made->file, size))
        return 2;
    used += size;
    *handle = made;
    return 0;
}

int cuMemRelease(allocation *handle) {
    used -= handle->size;
    close(handle->file);
    free(handle);
    return 0;
}

int cuMemMap(uint64_t address, size_t size, size_t offset, allocation *handle, uint64_t flags) {
    int access = PROT_READ | PROT_WRITE, how = MAP_SHARED | MAP_FIXED;
    void *mapped = mmap((void *)address, size, access, how, handle->file, offset);
    return mapped == MAP_FAILED ? 1 : 0;
}

int cuMemUnmap(uint64_t address, size_t size) {
    int how = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap((void *)address, size, PROT_NONE, how, -1, 0) == MAP_FAILED ? 1 : 0;
}

int cuMemSetAccess(uint64_t address, size_t size, const void *access, size_t count) { return 0; }
#else
int cudaDeviceSynchronize(void) { return 0; }

int cudaGetDevice(int *device) { return *device = 0, 0; }

int cudaSetDevice(int device) { return 0; }

const char *cudaGetErrorString(int result) { return "fake"; }

int cudaMemGetInfo(size_t *free, size_t *total) { return *free = *total = fake_cuda_free(), 0; }

int cudaMalloc(void **memory, size_t size) { return *memory = malloc(size), 0; }

int cudaFree(void *memory) { return free(memory), 0; }

int cudaMallocHost(void **memory, size_t size) { return *memory = malloc(size), 0; }

int cudaFreeHost(void *memory) { return free(memory), 0; }

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    return memcpy(to, from, size), 0;
}
#endif
