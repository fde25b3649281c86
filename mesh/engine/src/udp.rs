//! UDP sockets with GSO and GRO: one send for a whole superpacket, batched receives.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::offload::{Buffers, Span};
use crate::peer::Endpoint;
use crate::rx::Received;
use crate::sys::{check, set_option, socket};
use crate::tx::{Sent, Transmit};

const UDP_SEGMENT: i32 = 103;
const UDP_GRO: i32 = 104;
const SOCKET_BUFFER: i32 = 7 << 20;
const SEND_TIMEOUT_US: i64 = 20_000;

/// Kill switches.
#[derive(Debug, Clone, Copy)]
pub struct UdpOptions {
    pub gso: bool,
    pub gro: bool,
}

/// One bound socket of one family.
pub struct Socket {
    fd: OwnedFd,
    v6: bool,
    gso: AtomicBool,
}

impl Socket {
    /// Binds `port` (0 = any) of one family; `share` allows one socket per worker.
    pub fn bind(v6: bool, port: u16, share: bool, mark: u32, opt: UdpOptions) -> io::Result<Self> {
        let fd = socket(if v6 { libc::AF_INET6 } else { libc::AF_INET }, libc::SOCK_DGRAM, 0)?;
        let raw = fd.as_raw_fd();
        if share {
            set_option(raw, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        for (force, plain) in
            [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            // Without CAP_NET_ADMIN the system's limit applies: smaller, not fatal.
            let _ = set_option(raw, libc::SOL_SOCKET, force, SOCKET_BUFFER)
                .or_else(|_| set_option(raw, libc::SOL_SOCKET, plain, SOCKET_BUFFER));
        }
        let timeout = libc::timeval { tv_sec: 0, tv_usec: SEND_TIMEOUT_US };
        // SAFETY: passes the address and size of a live timeval.
        check(unsafe {
            libc::setsockopt(
                raw,
                libc::SOL_SOCKET,
                libc::SO_SNDTIMEO,
                (&raw const timeout).cast(),
                size_of::<libc::timeval>() as u32,
            )
        })?;
        if v6 {
            set_option(raw, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
            set_option(raw, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
        } else {
            set_option(raw, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
        }
        if opt.gro {
            // Before 5.0 there is none: datagrams then come one by one.
            let _ = set_option(raw, libc::IPPROTO_UDP, UDP_GRO, 1);
        }
        let gso = opt.gso && set_option(raw, libc::IPPROTO_UDP, UDP_SEGMENT, 0).is_ok();
        let s = Self { fd, v6, gso: AtomicBool::new(gso) };
        if mark != 0 {
            s.set_mark(mark)?;
        }
        let any = if v6 {
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))
        } else {
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))
        };
        let (name, len) = to_sockaddr(&any);
        // SAFETY: `name` is a live sockaddr_storage of which `len` bytes are initialised.
        check(unsafe { libc::bind(raw, (&raw const name).cast(), len) })?;
        Ok(s)
    }

    /// A socket that another process bound; `gso`: may the kernel cut what it sends?
    pub fn inherited(fd: OwnedFd, v6: bool, gso: bool) -> Self {
        Self { fd, v6, gso: AtomicBool::new(gso) }
    }

    pub fn segments(&self) -> bool {
        self.gso.load(Relaxed)
    }

    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        set_option(self.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MARK, mark as i32)
    }

    pub fn port(&self) -> io::Result<u16> {
        // SAFETY: an all-zero sockaddr_storage is valid.
        let mut name: libc::sockaddr_storage = unsafe { zeroed() };
        let mut len = size_of::<libc::sockaddr_storage>() as u32;
        // SAFETY: the kernel writes at most `len` bytes of the live `name`.
        let r = unsafe { libc::getsockname(self.as_raw_fd(), (&raw mut name).cast(), &mut len) };
        check(r)?;
        from_sockaddr(&name).map(|a| a.port()).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Sends once; the kernel cuts at `segment` when there is more than one.
    fn send_once(&self, to: &Endpoint, data: &[u8], segment: usize) -> io::Result<()> {
        let (mut name, name_len) = to_sockaddr(&to.addr);
        let mut control = Control::default();
        let mut used = 0;
        if data.len() > segment {
            used += control.put(used, libc::IPPROTO_UDP, UDP_SEGMENT, &(segment as u16).to_ne_bytes());
        }
        match to.src {
            Some(IpAddr::V4(a)) if !self.v6 => {
                let mut info = [0u8; size_of::<libc::in_pktinfo>()];
                info[4..8].copy_from_slice(&a.octets());
                used += control.put(used, libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
            }
            Some(IpAddr::V6(a)) if self.v6 => {
                let mut info = [0u8; size_of::<libc::in6_pktinfo>()];
                info[..16].copy_from_slice(&a.octets());
                used += control.put(used, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
            }
            _ => {}
        }
        let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        // SAFETY: all-zero is a valid msghdr (null pointers, zero lengths).
        let mut msg: libc::msghdr = unsafe { zeroed() };
        msg.msg_name = (&raw mut name).cast();
        msg.msg_namelen = name_len;
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        if used > 0 {
            msg.msg_control = control.0.as_mut_ptr().cast();
            msg.msg_controllen = used as _;
        }
        // SAFETY: name, iovec and control buffer are live locals with the lengths given; sendmsg only reads.
        let n = unsafe { libc::sendmsg(self.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) };
        if n < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    fn send(&self, to: &Endpoint, data: &[u8], segment: usize) -> Sent {
        if data.len() <= segment || self.gso.load(Relaxed) {
            match self.send_once(to, data, segment) {
                Ok(()) => return Sent::Done,
                Err(e) if data.len() > segment => match e.raw_os_error() {
                    // The route's device cannot checksum what GSO cuts: never again.
                    Some(libc::EIO) => self.gso.store(false, Relaxed),
                    // A segment is larger than this path's MTU (or the source is gone, which the
                    // plain sends will tell): cut here, let IP fragment.
                    Some(libc::EMSGSIZE | libc::EINVAL) => {}
                    _ if source_gone(&e, to) => return Sent::SourceGone,
                    _ => return Sent::Done,
                },
                Err(e) if source_gone(&e, to) => return Sent::SourceGone,
                Err(_) => return Sent::Done,
            }
        }
        for part in data.chunks(segment) {
            match self.send_once(to, part, segment) {
                Err(e) if source_gone(&e, to) => return Sent::SourceGone,
                _ => {}
            }
        }
        Sent::Done
    }
}

fn source_gone(e: &io::Error, to: &Endpoint) -> bool {
    to.src.is_some()
        && matches!(
            e.raw_os_error(),
            Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENODEV)
        )
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The sockets of one worker; either family may be missing on this host.
pub struct SocketPair {
    pub v4: Option<Socket>,
    pub v6: Option<Socket>,
}

impl SocketPair {
    pub fn each(&self) -> impl Iterator<Item = &Socket> {
        self.v4.iter().chain(&self.v6)
    }
}

impl Transmit for &SocketPair {
    #[inline]
    fn transmit(&mut self, to: &Endpoint, data: &[u8], segment: usize) -> Sent {
        let socket = if to.addr.is_ipv6() { &self.v6 } else { &self.v4 };
        match socket {
            Some(s) => s.send(to, data, segment),
            None => Sent::Done,
        }
    }
}

/// Binds one pair per worker on one port; IPv6 may be absent, an address in use may not.
pub fn bind_all(workers: usize, port: u16, mark: u32, opt: UdpOptions) -> io::Result<(Vec<SocketPair>, u16)> {
    let mut tries = 0;
    loop {
        match bind_round(workers, port, mark, opt) {
            // With any port asked for, the one IPv4 got may be taken in IPv6: draw again.
            Err(e) if port == 0 && e.raw_os_error() == Some(libc::EADDRINUSE) && tries < 16 => tries += 1,
            done => return done,
        }
    }
}

fn bind_round(workers: usize, port: u16, mark: u32, opt: UdpOptions) -> io::Result<(Vec<SocketPair>, u16)> {
    if port != 0 && workers > 1 {
        // SO_REUSEPORT would silently share the port with another engine of ours: refuse first.
        for v6 in [false, true] {
            optional(Socket::bind(v6, port, false, 0, opt))?;
        }
    }
    let mut chosen = port;
    let mut all = Vec::with_capacity(workers);
    for _ in 0..workers {
        let v4 = optional(Socket::bind(false, chosen, workers > 1, mark, opt))?;
        if let Some(s) = &v4 {
            chosen = s.port()?;
        }
        let v6 = optional(Socket::bind(true, chosen, workers > 1, mark, opt))?;
        if let Some(s) = &v6 {
            chosen = s.port()?;
        }
        if v4.is_none() && v6.is_none() {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        all.push(SocketPair { v4, v6 });
    }
    Ok((all, chosen))
}

/// Sends and receives a pattern over loopback with the offloads asked for and turns off what
/// damages it. Where loopback is down nothing can be learnt and nothing is turned off.
pub fn self_test(wanted: UdpOptions) -> UdpOptions {
    let tries = [wanted, UdpOptions { gro: false, ..wanted }, UdpOptions { gso: false, ..wanted }];
    for opt in tries {
        match loopback_pattern(opt) {
            Ok(true) => return opt,
            Ok(false) => {}
            Err(_) => return wanted,
        }
    }
    UdpOptions { gso: false, gro: false }
}

/// Whether three datagrams sent at once come back whole and in order.
fn loopback_pattern(opt: UdpOptions) -> io::Result<bool> {
    const SEGMENT: usize = 1200;
    let (a, b) = (Socket::bind(false, 0, false, 0, opt)?, Socket::bind(false, 0, false, 0, opt)?);
    let to = Endpoint { addr: (Ipv4Addr::LOCALHOST, b.port()?).into(), src: None };
    let data: Vec<u8> =
        (0..2 * SEGMENT as u32 + 700).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    if opt.gso {
        a.send_once(&to, &data, SEGMENT)?;
    } else {
        for part in data.chunks(SEGMENT) {
            a.send_once(&to, part, SEGMENT)?;
        }
    }
    let mut r = Receiver::default();
    let mut got = Vec::new();
    let mut wait = libc::pollfd { fd: b.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    while got.len() < data.len() {
        // SAFETY: one live pollfd.
        if unsafe { libc::poll(&mut wait, 1, 100) } <= 0 {
            return Ok(false);
        }
        r.receive(&b, BATCH);
        for m in &r.received {
            if m.len > SEGMENT && m.segment != SEGMENT {
                return Ok(false);
            }
            got.extend_from_slice(r.bufs.bytes(Span { buf: m.buf, off: 0, len: m.len }));
        }
    }
    Ok(got == data)
}

fn optional(r: io::Result<Socket>) -> io::Result<Option<Socket>> {
    match r {
        Ok(s) => Ok(Some(s)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Room for the control messages used here, aligned for cmsghdr.
#[repr(C, align(8))]
struct Control([u8; 128]);

impl Default for Control {
    fn default() -> Self {
        Self([0; 128])
    }
}

const fn cmsg_align(n: usize) -> usize {
    (n + size_of::<usize>() - 1) & !(size_of::<usize>() - 1)
}

const CMSG_HEADER: usize = cmsg_align(size_of::<libc::cmsghdr>());

impl Control {
    /// Writes one control message at `at`; returns the space it takes.
    fn put(&mut self, at: usize, level: i32, kind: i32, data: &[u8]) -> usize {
        let len = CMSG_HEADER + data.len();
        self.0[at..at + 8].copy_from_slice(&len.to_ne_bytes());
        self.0[at + 8..at + 12].copy_from_slice(&level.to_ne_bytes());
        self.0[at + 12..at + 16].copy_from_slice(&kind.to_ne_bytes());
        self.0[at + CMSG_HEADER..at + len].copy_from_slice(data);
        cmsg_align(len)
    }

    /// Segment size and local address among the first `len` bytes.
    fn parse(&self, len: usize) -> (usize, Option<IpAddr>) {
        let (mut at, mut segment, mut local) = (0, 0, None);
        while at + CMSG_HEADER <= len.min(self.0.len()) {
            let field =
                |o: usize| i32::from_ne_bytes(self.0[at + o..at + o + 4].try_into().expect("4 bytes"));
            let size = usize::from_ne_bytes(self.0[at..at + 8].try_into().expect("8 bytes"));
            if size < CMSG_HEADER || at + size > len.min(self.0.len()) {
                break;
            }
            let data = &self.0[at + CMSG_HEADER..at + size];
            match (field(8), field(12)) {
                (libc::IPPROTO_UDP, UDP_GRO) if data.len() >= 4 => {
                    segment = i32::from_ne_bytes(data[..4].try_into().expect("4 bytes")).max(0) as usize;
                }
                // ipi_spec_dst: the local address to answer from, also for broadcasts.
                (libc::IPPROTO_IP, libc::IP_PKTINFO) if data.len() >= 12 => {
                    local = Some(Ipv4Addr::new(data[4], data[5], data[6], data[7]).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if data.len() >= 16 => {
                    let a: [u8; 16] = data[..16].try_into().expect("16 bytes");
                    local = Some(Ipv6Addr::from(a).into());
                }
                _ => {}
            }
            at += cmsg_align(size);
        }
        (segment, local)
    }
}

fn to_sockaddr(a: &SocketAddr) -> (libc::sockaddr_storage, u32) {
    // SAFETY: an all-zero sockaddr_storage is valid, and it is larger than and aligned for both
    // address types written through it.
    unsafe {
        let mut s: libc::sockaddr_storage = zeroed();
        let len = match a {
            SocketAddr::V4(a) => {
                let p = (&raw mut s).cast::<libc::sockaddr_in>();
                (*p).sin_family = libc::AF_INET as u16;
                (*p).sin_port = a.port().to_be();
                (*p).sin_addr.s_addr = u32::from(*a.ip()).to_be();
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(a) => {
                let p = (&raw mut s).cast::<libc::sockaddr_in6>();
                (*p).sin6_family = libc::AF_INET6 as u16;
                (*p).sin6_port = a.port().to_be();
                (*p).sin6_addr.s6_addr = a.ip().octets();
                (*p).sin6_scope_id = a.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        };
        (s, len as u32)
    }
}

fn from_sockaddr(s: &libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: the storage is aligned for and at least as large as both types; every bit pattern is valid.
    unsafe {
        match i32::from(s.ss_family) {
            libc::AF_INET => {
                let p = &*(&raw const *s).cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(u32::from_be(p.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(p.sin_port)).into())
            }
            libc::AF_INET6 => {
                let p = &*(&raw const *s).cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(p.sin6_addr.s6_addr);
                // Only link-local addresses need their scope to be answered.
                let scope = if ip.is_unicast_link_local() { p.sin6_scope_id } else { 0 };
                Some(SocketAddrV6::new(ip, u16::from_be(p.sin6_port), 0, scope).into())
            }
            _ => None,
        }
    }
}

/// Size of one receive buffer: the largest UDP payload.
const BUFFER: usize = 65_536;
/// Datagram buffers per receive call.
pub const BATCH: usize = 16;

/// The memory received packets stay in until they are written out.
pub struct RecvBuffers(Vec<Box<[u8]>>);

impl Buffers for RecvBuffers {
    #[inline]
    fn bytes(&self, s: Span) -> &[u8] {
        &self.0[s.buf][s.off..s.off + s.len]
    }

    #[inline]
    fn bytes_mut(&mut self, s: Span) -> &mut [u8] {
        &mut self.0[s.buf][s.off..s.off + s.len]
    }
}

/// Buffers and headers for recvmmsg, made once.
pub struct Receiver {
    pub bufs: RecvBuffers,
    names: Box<[libc::sockaddr_storage; BATCH]>,
    control: Box<[Control; BATCH]>,
    iov: Box<[libc::iovec; BATCH]>,
    headers: Box<[libc::mmsghdr; BATCH]>,
    pub received: Vec<Received>,
}

impl Default for Receiver {
    fn default() -> Self {
        // SAFETY: all-zero is a valid value of these C structures (null pointers, zero lengths).
        let (names, iov, headers) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            bufs: RecvBuffers((0..BATCH).map(|_| vec![0; BUFFER].into_boxed_slice()).collect()),
            names: Box::new(names),
            control: Box::new(std::array::from_fn(|_| Control::default())),
            iov: Box::new(iov),
            headers: Box::new(headers),
            received: Vec::with_capacity(BATCH),
        }
    }
}

impl Receiver {
    /// Receives what is there, without waiting, into up to `limit` buffers. False when nothing came.
    pub fn receive(&mut self, s: &Socket, limit: usize) -> bool {
        let limit = limit.clamp(1, BATCH);
        self.received.clear();
        for i in 0..limit {
            let buf = &mut self.bufs.0[i];
            self.iov[i] = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
            let h = &mut self.headers[i].msg_hdr;
            h.msg_name = (&raw mut self.names[i]).cast();
            h.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
            h.msg_iov = &raw mut self.iov[i];
            h.msg_iovlen = 1;
            h.msg_control = self.control[i].0.as_mut_ptr().cast();
            h.msg_controllen = self.control[i].0.len() as _;
            h.msg_flags = 0;
        }
        // SAFETY: the first `limit` headers point to live, distinct buffers owned by self.
        let n = unsafe {
            libc::recvmmsg(
                s.as_raw_fd(),
                self.headers.as_mut_ptr(),
                limit as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        for i in 0..n.max(0) as usize {
            let h = &self.headers[i];
            let len = h.msg_len as usize;
            if h.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
                continue;
            }
            let (segment, src) = self.control[i].parse(h.msg_hdr.msg_controllen);
            if let Some(addr) = from_sockaddr(&self.names[i]) {
                self.received.push(Received { buf: i, len, segment, from: Endpoint { addr, src } });
            }
        }
        n > 0
    }
}

// SAFETY: the raw pointers in the headers only ever point into buffers owned by the same value and
// are rewritten before every use.
unsafe impl Send for Receiver {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_round_trip() {
        for a in ["192.0.2.1:51820", "[2001:db8::1]:9", "[fe80::1%3]:7"] {
            let a: SocketAddr = a.parse().unwrap();
            assert_eq!(from_sockaddr(&to_sockaddr(&a).0), Some(a));
        }
    }

    #[test]
    fn control_messages_parse_back_and_garbage_is_harmless() {
        let mut c = Control::default();
        let mut n = c.put(0, libc::IPPROTO_UDP, UDP_GRO, &1452i32.to_ne_bytes());
        n += c.put(n, libc::IPPROTO_IP, libc::IP_PKTINFO, &[0, 0, 0, 0, 192, 0, 2, 7, 0, 0, 0, 0]);
        assert_eq!(c.parse(n), (1452, Some("192.0.2.7".parse().unwrap())));
        c.0.fill(0xff);
        assert_eq!(c.parse(128), (0, None));
        c.0.fill(0);
        assert_eq!(c.parse(4096), (0, None));
    }

    #[test]
    fn gso_sends_arrive_as_datagrams_over_loopback() {
        let opt = UdpOptions { gso: true, gro: true };
        let (a, _) = bind_all(1, 0, 0, opt).unwrap();
        let (b, port) = bind_all(1, 0, 0, opt).unwrap();
        let to = Endpoint { addr: SocketAddr::from((Ipv4Addr::LOCALHOST, port)), src: None };
        let data: Vec<u8> = (0..3500u32).map(|i| i as u8).collect();
        assert_eq!((&a[0]).transmit(&to, &data, 1000), Sent::Done);
        let mut r = Receiver::default();
        let mut got = Vec::new();
        while got.len() < data.len() {
            if r.receive(b[0].v4.as_ref().unwrap(), BATCH) {
                for m in &r.received {
                    assert!(m.segment == 1000 || m.len <= 1000);
                    assert_eq!(m.from.src, Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
                    got.extend_from_slice(r.bufs.bytes(Span { buf: m.buf, off: 0, len: m.len }));
                }
            }
        }
        assert_eq!(got, data);
        assert!(bind_all(1, port, 0, opt).is_err(), "the port is taken");
        assert!(bind_all(2, port, 0, opt).is_err(), "also for shared sockets");
    }
}
