// Hides AVX512, AVX-VNNI and AMX from one process, so that a library takes its AVX2 kernels.
//
//   gcc -O2 -shared -fPIC -o hide_vnni.so hide_vnni.c && LD_PRELOAD=./hide_vnni.so program
//
// Linux on x86-64 with CPUID faulting (flag cpuid_fault of /proc/cpuinfo): each CPUID instruction
// raises SIGSEGV, and the handler answers in its place with some feature bits cleared. The
// instructions themselves keep working. Exits with 77 where the kernel refuses.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif
#define BIT(n) (1u << (n))

static struct sigaction previous;

static void answer_cpuid(int signal_number, siginfo_t *info, void *context) {
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *instruction = (const uint8_t *)r[REG_RIP];
  (void)signal_number, (void)info;
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) {
    sigaction(SIGSEGV, &previous, 0);  // a real fault: happens again, as without this library
    return;
  }
  uint32_t leaf = r[REG_RAX], part = r[REG_RCX], a, b, c, d;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(part));
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 7 && part == 0) {
    // AVX512: F, DQ, IFMA, PF, ER, CD, BW, VL
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    // AVX512: VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
    // AVX512: 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX: BF16, TILE, INT8
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
  }
  if (leaf == 7 && part == 1) {
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));  // AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA
    d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10));   // AVX-VNNI-INT8, NE-CONVERT, AMX, VNNI-INT16
  }
  r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer_cpuid;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &previous);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) _exit(77);
}
