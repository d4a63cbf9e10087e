/* A CUDA runtime on malloc, or with -DSTUB one that another package ships: as much of it as the tests
 * of the real code call, and counters that they read. */
#include <stdio.h>
#include <stdlib.h>

int fake_device = 0, fake_mallocs = 0, fake_frees = 0, fake_errors_taken = 0, fake_last_device = -1;
size_t fake_limit = 1 << 20;

int cudaMalloc(void **memory, size_t nbytes) {
    if (nbytes > fake_limit)
        return 2;
    fake_mallocs++, fake_last_device = fake_device;
    *memory = malloc(nbytes);
    return 0;
}

int cudaFree(void *memory) {
    fake_frees++;
    free(memory);
    return 0;
}

#ifndef STUB
int cudaGetDevice(int *device) {
    *device = fake_device;
    return 0;
}

int cudaSetDevice(int device) {
    if (device > 1)
        return 101;
    fake_device = device;
    return 0;
}

int cudaGetLastError(void) {
    fake_errors_taken++;
    return 0;
}

int cudaDeviceGetPCIBusId(char *text, int length, int device) {
    if (device > 1)
        return 101;
    snprintf(text, length, "00000000:%dA:00.0", device + 1);
    return 0;
}
#endif
