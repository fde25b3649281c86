//! Thin, owned wrappers of the Linux calls the engine's threads wait on.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::device::Now;

/// Turns a negative return into the current errno.
pub fn check(r: libc::c_int) -> io::Result<libc::c_int> {
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

fn owned(r: libc::c_int) -> io::Result<OwnedFd> {
    let fd = check(r)?;
    // SAFETY: the call just returned this descriptor to us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn clock(id: libc::clockid_t) -> libc::timespec {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec to fill.
    unsafe { libc::clock_gettime(id, &mut t) };
    t
}

/// Milliseconds since boot, suspended time included; never 0.
pub fn now_ms() -> u64 {
    let t = clock(libc::CLOCK_BOOTTIME);
    (t.tv_sec as u64 * 1000 + t.tv_nsec as u64 / 1_000_000).max(1)
}

/// Both clocks.
pub fn now() -> Now {
    let w = clock(libc::CLOCK_REALTIME);
    Now { ms: now_ms(), wall_secs: w.tv_sec as u64, wall_nanos: w.tv_nsec as u32 }
}

/// Microseconds of a monotonic clock, for what is paced.
pub fn micros() -> u64 {
    let t = clock(libc::CLOCK_MONOTONIC);
    t.tv_sec as u64 * 1_000_000 + t.tv_nsec as u64 / 1000
}

/// A descriptor other threads can make readable.
pub struct EventFd(OwnedFd);

impl EventFd {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }).map(Self)
    }

    pub fn signal(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes from a live u64. A full counter is already readable.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    pub fn clear(&self) {
        let mut n = 0u64;
        // SAFETY: reads 8 bytes into a live u64; the descriptor does not block.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut n).cast(), 8) };
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Level-triggered epoll set; `token` comes back with each ready descriptor.
pub struct Epoll(OwnedFd);

#[derive(Debug, Clone, Copy)]
pub struct Ready {
    pub token: u64,
    pub failed: bool,
}

impl Epoll {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }).map(Self)
    }

    pub fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let mut e = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        // SAFETY: `e` is a valid event; the kernel copies it.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &mut e) }).map(|_| ())
    }

    pub fn remove(&self, fd: RawFd) {
        // SAFETY: a null event is allowed for DEL.
        unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// Waits up to `timeout_ms` (-1 = for ever, 0 = poll); an interruption counts as nothing ready.
    pub fn wait(&self, timeout_ms: i32, ready: &mut [Ready; 8]) -> usize {
        let mut ev = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: `ev` has room for the 8 events announced.
        let n = unsafe { libc::epoll_wait(self.0.as_raw_fd(), ev.as_mut_ptr(), 8, timeout_ms) };
        let n = n.max(0) as usize;
        for (r, e) in ready.iter_mut().zip(&ev[..n]) {
            let bits = e.events;
            *r = Ready { token: e.u64, failed: bits & (libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0 };
        }
        n
    }
}

/// Blocks SIGTERM, SIGINT and SIGHUP for the calling and all later threads, to read them as a descriptor.
pub fn termination_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; all pointers are to locals.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for s in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut set, s);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        owned(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))
    }
}

/// A pipe: its reading and its writing end.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: pipe2 just returned both descriptors to us.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Forks before any thread was started; true in the child.
pub fn fork() -> io::Result<bool> {
    // SAFETY: only the calling thread exists in the child; the caller has started no other, so no
    // lock is left held by one that is gone.
    check(unsafe { libc::fork() }).map(|pid| pid == 0)
}

/// Ends a forked child without running the parent's exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process; nothing runs afterwards.
    unsafe { libc::_exit(code) }
}

/// Leaves the session and closes everything inherited but `keep`: a caller that waits for the end
/// of a pipe must not wait for the daemon.
pub fn detach(keep: RawFd) {
    // SAFETY: plain calls with constant arguments; /dev/null replaces the standard streams; no
    // descriptor above 2 other than `keep` belongs to a live value of this process yet.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3u32, (keep - 1) as u32, 0u32);
        libc::syscall(libc::SYS_close_range, (keep + 1) as u32, u32::MAX, 0u32);
        libc::setsid();
        libc::chdir(c"/".as_ptr());
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        if null >= 0 {
            for fd in 0..3 {
                libc::dup2(null, fd);
            }
            if null > 2 {
                libc::close(null);
            }
        }
    }
}

/// Runs `make` under this umask; other threads that create files meanwhile share it.
pub fn with_umask<T>(mask: libc::mode_t, make: impl FnOnce() -> T) -> T {
    // SAFETY: umask takes and returns plain integers.
    let old = unsafe { libc::umask(mask) };
    let made = make();
    // SAFETY: as above.
    unsafe { libc::umask(old) };
    made
}

/// Keeps keys out of core dumps and away from ptrace by the same user.
pub fn harden_process() {
    // SAFETY: plain calls with constant arguments and a valid rlimit.
    unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &none);
    }
}

/// Lets another runnable thread have this CPU.
pub fn yield_now() {
    // SAFETY: no arguments.
    unsafe { libc::sched_yield() };
}

/// Leaves the CPU for `us` microseconds.
pub fn nap(us: u64) {
    std::thread::sleep(std::time::Duration::from_micros(us));
}

/// Lets naps of the calling thread end when they should, instead of up to 50 us later.
pub fn exact_naps() {
    // SAFETY: constant arguments; a kernel that refuses leaves longer naps.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
}

/// struct sched_attr, first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for short time slices for the calling thread: the same share of the CPU in smaller pieces,
/// in exchange for being run promptly when a packet comes in on a busy machine. With `batch` it does
/// not interrupt who is running when it is woken.
/// Kernels before 6.12 ignore or refuse the first, which is as good as not asking.
pub fn schedule(slice_ns: u64, batch: bool) {
    let size = size_of::<SchedAttr>() as u32;
    let mut a = SchedAttr { size, ..SchedAttr::default() };
    // SAFETY: the kernel fills at most `size` bytes of the live structure.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut a, size, 0) };
    let ordinary = [libc::SCHED_OTHER, libc::SCHED_BATCH].iter().any(|p| a.policy == *p as u32);
    if got == 0 && ordinary {
        a.policy = if batch { libc::SCHED_BATCH } else { libc::SCHED_OTHER } as u32;
        a.runtime = slice_ns;
        // SAFETY: the kernel reads `size` bytes of the live structure.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const a, 0) };
    }
}

/// An O_CLOEXEC socket.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    owned(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })
}

/// setsockopt with an int.
pub fn set_option(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: passes the address and size of a live c_int.
    let r = unsafe {
        libc::setsockopt(fd, level, name, (&raw const value).cast(), size_of::<libc::c_int>() as u32)
    };
    check(r).map(|_| ())
}

/// Opens a path read-write, close-on-exec and non-blocking.
pub fn open_nonblocking(path: &std::ffi::CStr) -> io::Result<OwnedFd> {
    // SAFETY: `path` is NUL-terminated.
    owned(unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) })
}
