//! TUN device: creation, offloads, one-superpacket reads and gathered writes.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::error::{EngineError, Result};
use crate::offload::{Coalescer, Group, Span, VnetHdr, VNET_LEN};
use crate::sys::{check, open_nonblocking};
use crate::tx::TAIL_ROOM;
use crate::udp::RecvBuffers;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETDEVNETNS: libc::c_ulong = 0x54e3;
const IFF_TUN: i16 = 0x0001;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;
const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;

/// Largest packet a read can return, plus virtio header and room for padding.
pub const READ_LEN: usize = VNET_LEN + 65_535 + TAIL_ROOM + 1;

/// Offloads the kernel granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    pub tcp: bool,
    pub udp: bool,
}

impl Offloads {
    pub fn coalescer(self) -> Coalescer {
        Coalescer::new(self.tcp, self.udp)
    }
}

/// One queue of the device.
pub struct Queue {
    fd: OwnedFd,
}

#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: i16,
    pad: [u8; 22],
}

/// Whether `name` is acceptable to the kernel as an interface name.
pub fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 16
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%')
}

/// What a non-blocking read gave.
pub enum Read {
    Packet(VnetHdr, usize),
    Empty,
    /// The device is gone.
    Gone,
    /// A passing error (interface down, bad packet): try again later.
    Retry,
}

impl From<OwnedFd> for Queue {
    /// A queue that another process opened.
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl Queue {
    fn open(name: &str, multi: bool) -> Result<Self> {
        let device = |e: io::Error| {
            let hint = match e.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => "run as root or with CAP_NET_ADMIN",
                Some(libc::EBUSY) => "another process holds this interface: choose another name or stop it",
                Some(libc::ENOENT | libc::ENODEV) => "load the tun module or give the container /dev/net/tun",
                _ => "the name may belong to an interface of another kind",
            };
            EngineError::device(format!("TUN {name}"), e, hint)
        };
        let fd = open_nonblocking(c"/dev/net/tun").map_err(device)?;
        let mut flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
        if multi {
            flags |= IFF_MULTI_QUEUE;
        }
        let mut req = IfReq { name: [0; 16], flags, pad: [0; 22] };
        req.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: `req` is a live ifreq-sized structure that the kernel reads and writes.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF as _, &raw mut req) }).map_err(device)?;
        let size: libc::c_int = VNET_LEN as libc::c_int;
        // SAFETY: the kernel reads one int.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const size) })
            .map_err(device)?;
        Ok(Self { fd })
    }

    /// Opens `count` queues of interface `name` and enables what offloads it has.
    pub fn create(name: &str, count: usize, offload: bool) -> Result<(Vec<Self>, Offloads)> {
        let queues: Vec<Self> = (0..count).map(|_| Self::open(name, count > 1)).collect::<Result<_>>()?;
        let mut granted = Offloads { tcp: false, udp: false };
        for q in &queues {
            granted = q.enable_offloads(offload);
        }
        Ok((queues, granted))
    }

    fn enable_offloads(&self, wanted: bool) -> Offloads {
        let tso = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
        let tries = [
            (tso | TUN_F_USO4 | TUN_F_USO6, Offloads { tcp: true, udp: true }),
            (tso, Offloads { tcp: true, udp: false }),
            (0, Offloads { tcp: false, udp: false }),
        ];
        for (bits, granted) in tries.into_iter().skip(if wanted { 0 } else { 2 }) {
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            if unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD as _, libc::c_ulong::from(bits)) } == 0
            {
                return granted;
            }
        }
        Offloads { tcp: false, udp: false }
    }

    /// The name the kernel gave (for patterns such as `wg%d`).
    pub fn name(&self) -> io::Result<String> {
        let mut req = IfReq { name: [0; 16], flags: 0, pad: [0; 22] };
        // SAFETY: `req` is a live ifreq-sized structure that the kernel fills.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNGETIFF as _, &raw mut req) })?;
        let end = req.name.iter().position(|b| *b == 0).unwrap_or(16);
        Ok(String::from_utf8_lossy(&req.name[..end]).into_owned())
    }

    /// The network namespace the interface is in now.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        // SAFETY: the call takes no argument and returns a new descriptor.
        let fd = check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNGETDEVNETNS as _, 0) })?;
        // SAFETY: the descriptor was just returned to us.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Reads one packet into `buf` (READ_LEN bytes); it starts at VNET_LEN.
    #[inline]
    pub fn read(&self, buf: &mut [u8]) -> Read {
        let room = buf.len() - TAIL_ROOM;
        // SAFETY: `room` bytes are inside `buf`.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), buf.as_mut_ptr().cast(), room) };
        if n > VNET_LEN as isize {
            return Read::Packet(VnetHdr::read(buf), n as usize - VNET_LEN);
        }
        if n >= 0 {
            return Read::Retry;
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN) => Read::Empty,
            Some(libc::EBADFD | libc::EBADF) => Read::Gone,
            _ => Read::Retry,
        }
    }

    /// Writes one group gathered from the receive buffers.
    #[inline]
    pub fn write(&self, bufs: &RecvBuffers, group: &Group, iov: &mut Vec<libc::iovec>) -> io::Result<()> {
        let mut vnet = group.vnet.bytes();
        iov.clear();
        iov.push(libc::iovec { iov_base: vnet.as_mut_ptr().cast(), iov_len: VNET_LEN });
        for s in &group.spans {
            let b = crate::offload::Buffers::bytes(bufs, *s);
            iov.push(libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: b.len() });
        }
        // SAFETY: every entry points into a live slice of the given length; writev only reads them.
        let n = unsafe { libc::writev(self.fd.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) };
        iov.clear();
        if n < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Writes one packet that needs no offload.
    pub fn write_plain(&self, packet: &[u8]) -> io::Result<()> {
        let mut vnet = VnetHdr::default().bytes();
        let iov = [
            libc::iovec { iov_base: vnet.as_mut_ptr().cast(), iov_len: VNET_LEN },
            libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() },
        ];
        // SAFETY: both entries point into live buffers of the given length; writev only reads them.
        let n = unsafe { libc::writev(self.fd.as_raw_fd(), iov.as_ptr(), 2) };
        if n < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Total bytes of a group.
pub fn group_len(spans: &[Span]) -> usize {
    spans.iter().map(|s| s.len).sum()
}

#[cfg(test)]
mod tests {
    use super::valid_name;

    #[test]
    fn interface_names() {
        for good in ["wg0", "a", "ret-inue_0.1", "abcdefghijklmno"] {
            assert!(valid_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "abcdefghijklmnop", "wg%d", "a:b", "w\u{e9}"] {
            assert!(!valid_name(bad), "{bad}");
        }
    }
}
