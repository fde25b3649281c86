//! The engine's control thread gives up every system call it does not make (seccomp(2)).
//!
//! An allow list: what is not on it fails with EPERM, so an attacker who runs code in here can still use the
//! descriptors it has, but neither open files, start programs, nor look into other processes.

use std::io;

// linux/filter.h, linux/seccomp.h, linux/audit.h
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const REFUSE: u32 = 0x0005_0000 | libc::EPERM as u32;
const KILL: u32 = 0x8000_0000;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_003e);
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: Option<u32> = Some(0xc000_00b7);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURE: Option<u32> = None;

/// What the engine does after its set-up: packets, waiting, clocks, memory, threads, sockets, its link, its end.
const NEEDED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_clock_getres,
    libc::SYS_getrandom,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_set_tid_address,
    libc::SYS_prctl,
    libc::SYS_sched_getattr,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_setns,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_unlinkat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_getcwd,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_uname,
    libc::SYS_getuid,
    libc::SYS_geteuid,
];
/// The same under older names, which only x86-64 has.
#[cfg(target_arch = "x86_64")]
const OLD: &[libc::c_long] =
    &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_unlink, libc::SYS_stat, libc::SYS_arch_prctl];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[libc::c_long] = &[];

fn step(code: u16, yes: u8, no: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: yes, jf: no, k }
}

fn program(architecture: u32) -> Vec<libc::sock_filter> {
    let mut p = vec![
        step(LOAD, 0, 0, 4), // seccomp_data.arch
        step(EQUAL, 1, 0, architecture),
        step(RETURN, 0, 0, KILL),
        step(LOAD, 0, 0, 0), // seccomp_data.nr
    ];
    for n in NEEDED.iter().chain(OLD) {
        p.push(step(EQUAL, 0, 1, *n as u32));
        p.push(step(RETURN, 0, 0, ALLOW));
    }
    p.push(step(RETURN, 0, 0, REFUSE));
    p
}

/// Confines the calling thread and all it starts; false where the kernel or the architecture has no filter.
pub fn enter() -> io::Result<bool> {
    let Some(architecture) = ARCHITECTURE else { return Ok(false) };
    let mut steps = program(architecture);
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: prctl takes constants; the kernel copies the program during the second call, and `steps` outlives it.
    let failed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            // prctl, since a service manager's own filter may leave seccomp(2) out.
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) != 0
    };
    if !failed {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) => Ok(false),
        e => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_ends_in_refusal_and_checks_the_architecture_first() {
        let p = program(7);
        assert_eq!((p[0].k, p[1].k, p[2].k), (4, 7, KILL));
        assert_eq!(p.last().map(|s| s.k), Some(REFUSE));
        assert!(p.len() < 4096, "the kernel's limit");
        for n in [libc::SYS_execve, libc::SYS_openat, libc::SYS_ptrace, libc::SYS_bpf, libc::SYS_mount] {
            assert!(!p.iter().any(|s| s.code == EQUAL && s.k == n as u32), "{n}");
        }
    }
}
