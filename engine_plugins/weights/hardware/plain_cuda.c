/* Device memory straight from cudaMalloc, for torch's CUDAPluggableAllocator.
 *
 * The CUDA functions come by address (plain_cuda_bind), so that no symbol look-up can end in a stub,
 * and no CUDA header, no libc and no libcudart is needed to compile or to link this. */
#include <stddef.h>

static int (*cuda_malloc)(void **, size_t);
static int (*cuda_free)(void *);
static int (*cuda_get_device)(int *);
static int (*cuda_set_device)(int);
static int (*cuda_get_last_error)(void);

void plain_cuda_bind(void *malloc_, void *free_, void *get_device, void *set_device,
                     void *get_last_error) {
    cuda_malloc = (int (*)(void **, size_t))malloc_;
    cuda_free = (int (*)(void *))free_;
    cuda_get_device = (int (*)(int *))get_device;
    cuda_set_device = (int (*)(int))set_device;
    cuda_get_last_error = (int (*)(void))get_last_error;
}

/* NULL where there is no memory; the error is taken out of CUDA's hands, and torch raises its own. */
void *plain_cuda_alloc(size_t nbytes, int device, void *stream) {
    void *memory = NULL;
    int before;
    (void)stream;
    if (cuda_get_device(&before) || cuda_set_device(device)) {
        cuda_get_last_error();
        return NULL;
    }
    if (cuda_malloc(&memory, nbytes)) {
        cuda_get_last_error();
        memory = NULL;
    }
    cuda_set_device(before);
    return memory;
}

void plain_cuda_free(void *memory, size_t nbytes, int device, void *stream) {
    (void)nbytes, (void)device, (void)stream;
    if (memory && cuda_free(memory))
        cuda_get_last_error();
}
