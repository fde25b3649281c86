//! From one engine process to the next without a lost packet.
//!
//! The new process asks over the UAPI socket. The old one lets its threads finish their batch and stand still, sends
//! its descriptors and its state, and waits for one word. That word is the point of no return: who wrote it owns the
//! tunnel, and until then nothing was changed, so the old one just goes on. What arrives meanwhile waits in the kernel.
//!
//! Answer to a request: either `errno=N` and an empty line, as to every refused request, or
//! magic (8), format (4), descriptors (4), length of the state (8), BLAKE2s-256 of the state (32), the state.

use std::io::{self, Read as _, Write as _};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::crypto::{hash, same_key, Key};
use crate::engine::Engine;
use crate::error::{EngineError, Result};
use crate::peer::lock;
use crate::server::socket_path;
use crate::state::{self, Malformed, Reader, Writer};
use crate::sys::exit_now;
use crate::tun::{Offloads, Queue};
use crate::uapi::Errno;
use crate::udp::{Socket, SocketPair, UdpOptions};

/// Version of what is handed over; a process takes its own only.
pub const FORMAT: u32 = 1;
/// First line of a request.
pub const REQUEST: &str = "retinue_take_over=1";
const MAGIC: [u8; 8] = *b"retinue\n";
const HEADER: usize = 56;
const MAX_STATE: u64 = 1 << 30;
/// The kernel's limit for one message.
const MAX_DESCRIPTORS: usize = 253;
const WORD: &[u8] = b"mine\n";
/// Longest wait for one step of a successor, while packets fill the kernel's queues (of 1000 on the TUN).
const PATIENCE: Duration = Duration::from_millis(400);
/// How long a successor waits for the answer: the other side may be busy before it stands still.
const ANSWER: Duration = Duration::from_secs(4);

/// What one process gives the next beside the core.
pub struct Inheritance {
    pub core: crate::device::Core,
    pub queues: Vec<Queue>,
    pub offloads: Offloads,
    pub udp: UdpOptions,
    pub sockets: Vec<SocketPair>,
    pub port: u16,
    pub mark: u32,
    pub listener: OwnedFd,
    stream: UnixStream,
}

// ---- the old side --------------------------------------------------------------------------

/// Whether the process at the other end is of our user.
fn same_user(stream: &UnixStream) -> bool {
    // SAFETY: an all-zero ucred is valid.
    let mut who: libc::ucred = unsafe { zeroed() };
    let mut len = size_of::<libc::ucred>() as u32;
    // SAFETY: the kernel writes at most `len` bytes into the live `who`; geteuid has no arguments.
    unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &mut len,
        ) == 0
            && who.uid == libc::geteuid()
    }
}

/// Hands everything over and ends the process; returns only when this engine is to go on.
pub fn give(engine: &Arc<Engine>, listener: RawFd, format: u32, stream: &UnixStream) -> Errno {
    if !same_user(stream) {
        return Errno(libc::EACCES);
    }
    if format != FORMAT {
        return Errno(libc::EPROTONOSUPPORT);
    }
    // No configuration changes from here on.
    let _one = lock(&engine.configuring);
    engine.pause();
    let outcome = if engine.gate.gathered(engine.wakes.len() + 1, PATIENCE) {
        transfer(engine, listener, stream)
    } else {
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    };
    if let Ok(true) = outcome {
        // Everything is another process's now, down to the file of the socket: nothing is tidied up.
        exit_now(0);
    }
    engine.gate.open();
    let _ = stream.shutdown(std::net::Shutdown::Both);
    match outcome {
        Err(e) => Errno(e.raw_os_error().unwrap_or(libc::EIO)),
        Ok(_) => Errno(libc::ECANCELED),
    }
}

/// Sends it all; true when the other side has taken it.
fn transfer(engine: &Engine, listener: RawFd, stream: &UnixStream) -> io::Result<bool> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut w = Writer::default();
    let mut fds: Vec<RawFd> = engine.queues.iter().map(AsRawFd::as_raw_fd).collect();
    fds.push(listener);
    w.u32(engine.queues.len() as u32);
    for v in [engine.offloads.tcp, engine.offloads.udp, engine.udp.gso, engine.udp.gro] {
        w.flag(v);
    }
    w.u32(engine.port.load(Relaxed).into());
    w.u32(engine.mark.load(Relaxed));
    let sockets = engine.sockets.load_full();
    w.u32(sockets.len() as u32);
    for pair in sockets.iter() {
        for s in [&pair.v4, &pair.v6] {
            w.flag(s.is_some());
            if let Some(s) = s {
                w.flag(s.segments());
                fds.push(s.as_raw_fd());
            }
        }
    }
    state::save(&engine.core, &mut w);
    let body = w.finish();
    if fds.len() > MAX_DESCRIPTORS || body.len() as u64 > MAX_STATE {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let mut header = [0u8; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
    header[12..16].copy_from_slice(&(fds.len() as u32).to_le_bytes());
    header[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[24..].copy_from_slice(&hash(&[&body]));
    send_descriptors(stream.as_raw_fd(), &header, &fds)?;
    let mut out = stream;
    let sent = out.write_all(&body);
    drop(body);
    let mut word = [0u8; WORD.len()];
    if sent.is_ok() && out.read_exact(&mut word).is_ok() && word == *WORD {
        return Ok(true);
    }
    // Late or silent. After this it can write nothing more; what it wrote before counts.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let mut rest = Vec::new();
    let _ = out.read_to_end(&mut rest);
    Ok(rest.starts_with(WORD))
}

const fn space(bytes: usize) -> usize {
    size_of::<libc::cmsghdr>() + bytes.next_multiple_of(size_of::<usize>())
}

#[repr(C, align(8))]
struct Ancillary([u8; space(MAX_DESCRIPTORS * 4)]);

fn message(iov: &mut libc::iovec, control: &mut Ancillary, room: usize) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr (null pointers, zero lengths).
    let mut m: libc::msghdr = unsafe { zeroed() };
    m.msg_iov = iov;
    m.msg_iovlen = 1;
    m.msg_control = control.0.as_mut_ptr().cast();
    m.msg_controllen = room as _;
    m
}

fn send_descriptors(socket: RawFd, data: &[u8; HEADER], fds: &[RawFd]) -> io::Result<()> {
    let mut control = Ancillary([0; space(MAX_DESCRIPTORS * 4)]);
    let len = size_of::<libc::cmsghdr>() + 4 * fds.len();
    control.0[..8].copy_from_slice(&len.to_ne_bytes());
    control.0[8..12].copy_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    control.0[12..16].copy_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
    for (to, fd) in control.0[16..].chunks_exact_mut(4).zip(fds) {
        to.copy_from_slice(&fd.to_ne_bytes());
    }
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: HEADER };
    let m = message(&mut iov, &mut control, space(4 * fds.len()));
    // SAFETY: iovec and control buffer are live with the lengths given; sendmsg only reads.
    match unsafe { libc::sendmsg(socket, &m, libc::MSG_NOSIGNAL) } {
        n if n == HEADER as isize => Ok(()),
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Err(io::Error::from_raw_os_error(libc::EPROTO)),
    }
}

// ---- the new side --------------------------------------------------------------------------

fn refused(name: &str, why: impl std::fmt::Display) -> EngineError {
    EngineError::failure(format!("take-over of {name}"), why, "the running engine goes on")
}

/// Receives the header and the descriptors.
fn receive(stream: &UnixStream, header: &mut [u8; HEADER]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = Ancillary([0; space(MAX_DESCRIPTORS * 4)]);
    let mut iov = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER };
    let mut m = message(&mut iov, &mut control, space(MAX_DESCRIPTORS * 4));
    // SAFETY: iovec and control buffer are live and writable with the lengths given.
    let n = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut m, libc::MSG_CMSG_CLOEXEC | libc::MSG_WAITALL) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut fds = Vec::new();
    let used = m.msg_controllen;
    if used >= size_of::<libc::cmsghdr>() {
        let len = usize::from_ne_bytes(control.0[..8].try_into().expect("8 bytes")).min(used);
        let field = |o: usize| i32::from_ne_bytes(control.0[o..o + 4].try_into().expect("4 bytes"));
        if (field(8), field(12)) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            for at in (16..len).step_by(4).filter(|at| at + 4 <= len) {
                // SAFETY: the kernel just made this descriptor for us.
                fds.push(unsafe { OwnedFd::from_raw_fd(field(at)) });
            }
        }
    }
    Ok((n as usize, fds))
}

/// Asks the running engine of `name` for everything. Until [`Inheritance::own`] it goes on when we end.
pub fn ask(name: &str, now: u64, wake: Box<dyn Fn() + Send + Sync>) -> Result<Inheritance> {
    let io_failure = |e: io::Error| refused(name, e);
    let mut stream = UnixStream::connect(socket_path(name)).map_err(io_failure)?;
    stream.set_read_timeout(Some(ANSWER)).map_err(io_failure)?;
    stream.set_write_timeout(Some(ANSWER)).map_err(io_failure)?;
    write!(stream, "{REQUEST}\nformat={FORMAT}\n\n").map_err(io_failure)?;
    let mut header = [0u8; HEADER];
    let (n, fds) = receive(&stream, &mut header).map_err(io_failure)?;
    if header.starts_with(b"errno=") || n < HEADER || header[..8] != MAGIC {
        let said = String::from_utf8_lossy(&header[..n]);
        let code = said.trim().strip_prefix("errno=-").and_then(|c| c.parse::<i32>().ok());
        return Err(match code {
            Some(libc::EINVAL) => refused(name, "the running engine is too old to hand over"),
            Some(libc::EPROTONOSUPPORT) => refused(name, "the running engine hands over another format"),
            Some(c) => refused(name, io::Error::from_raw_os_error(c)),
            None => refused(name, "no answer that is one"),
        });
    }
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    let length = u64::from_le_bytes(header[16..24].try_into().expect("8 bytes"));
    if number(8) != FORMAT || number(12) as usize != fds.len() || length > MAX_STATE {
        return Err(refused(name, "no answer that is one"));
    }
    let mut body = Zeroizing::new(vec![0u8; length as usize]);
    stream.read_exact(&mut body).map_err(io_failure)?;
    let sum: Key = header[24..].try_into().expect("32 bytes");
    if !same_key(&sum, &hash(&[&body])) {
        return Err(refused(name, "the state was damaged on its way"));
    }
    parse(&body, fds, now, wake, stream).map_err(|Malformed| refused(name, "the state is malformed"))
}

fn parse(
    body: &[u8],
    fds: Vec<OwnedFd>,
    now: u64,
    wake: Box<dyn Fn() + Send + Sync>,
    stream: UnixStream,
) -> std::result::Result<Inheritance, Malformed> {
    let mut r = Reader::new(body);
    let mut fds = fds.into_iter();
    let count = r.u32()? as usize;
    let queues: Vec<Queue> = fds.by_ref().take(count).map(Queue::from).collect();
    let listener = fds.next().ok_or(Malformed)?;
    if count == 0 || queues.len() != count {
        return Err(Malformed);
    }
    let offloads = Offloads { tcp: r.flag()?, udp: r.flag()? };
    let udp = UdpOptions { gso: r.flag()?, gro: r.flag()? };
    let port = u16::try_from(r.u32()?).map_err(|_| Malformed)?;
    let mark = r.u32()?;
    let pairs = r.u32()? as usize;
    if pairs != 0 && pairs != count {
        return Err(Malformed);
    }
    let mut sockets = Vec::with_capacity(pairs);
    for _ in 0..pairs {
        let mut one = |v6: bool| -> std::result::Result<Option<Socket>, Malformed> {
            if !r.flag()? {
                return Ok(None);
            }
            let gso = r.flag()?;
            Ok(Some(Socket::inherited(fds.next().ok_or(Malformed)?, v6, gso)))
        };
        sockets.push(SocketPair { v4: one(false)?, v6: one(true)? });
    }
    let core = state::load(&mut r, now, crate::events::Queue::new(wake))?;
    r.end()?;
    if fds.next().is_some() {
        return Err(Malformed);
    }
    Ok(Inheritance { core, queues, offloads, udp, sockets, port, mark, listener, stream })
}

/// The word by which a process takes possession.
pub struct Claim(UnixStream);

impl Claim {
    /// Takes possession: from here on the old process is gone. On an error it goes on, and we must not.
    pub fn own(mut self, name: &str) -> Result<()> {
        self.0.write_all(WORD).map_err(|e| refused(name, e))
    }
}

impl Inheritance {
    /// Splits off what has to be said at the end.
    pub fn claim(&self) -> io::Result<Claim> {
        self.stream.try_clone().map(Claim)
    }
}
