// A kernel may start before the one before it in the stream has ended, where it was launched so: it reads nothing
// that others write, and writes nothing, before it has waited. (One that works along with the kernel before, and
// takes what that tells it of, waits at its end: what was before both is there, as the first may not start early.
// Before Hopper, and launched in any other way, neither says anything.)

// The next kernel of the stream may start: best said when what this one reads has come, or the next one's reads
// stand in its way.
__device__ inline void let_next_start()
{
#if 900 <= __CUDA_ARCH__
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What the kernels before wrote is there.
__device__ inline void wait_for_previous()
{
#if 900 <= __CUDA_ARCH__
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
