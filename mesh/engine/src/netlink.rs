//! rtnetlink: what the engine sets on its TUN link, and what it watches there (MTU, deletion).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::sys::{check, socket};

const IFLA_MTU: u16 = 4;
const IFLA_TXQLEN: u16 = 13;
const IFLA_GSO_MAX_SIZE: u16 = 41;
const IFLA_GSO_IPV4_MAX_SIZE: u16 = 63;
const HEADER: usize = 16;
const IFINFO: usize = 16;

/// Settings for a fresh link; 0 leaves one alone.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkSettings {
    pub mtu: u32,
    pub txqlen: u32,
    pub gso_max: u32,
}

/// The kernel's index of an interface in this network namespace.
pub fn index_of(name: &str) -> io::Result<u32> {
    let c = CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: `c` is NUL-terminated.
    match unsafe { libc::if_nametoindex(c.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        i => Ok(i),
    }
}

fn open(groups: u32, kind: i32) -> io::Result<OwnedFd> {
    let fd = socket(libc::AF_NETLINK, libc::SOCK_RAW | kind, libc::NETLINK_ROUTE)?;
    // SAFETY: an all-zero sockaddr_nl is valid.
    let mut addr: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    addr.nl_family = libc::AF_NETLINK as u16;
    addr.nl_groups = groups;
    // SAFETY: passes the address and size of a live sockaddr_nl.
    check(unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const addr).cast(), size_of::<libc::sockaddr_nl>() as u32)
    })?;
    Ok(fd)
}

fn message(kind: u16, flags: i32, index: u32, attributes: &[(u16, u32)]) -> Vec<u8> {
    let mut m = vec![0u8; HEADER + IFINFO];
    m[4..6].copy_from_slice(&kind.to_ne_bytes());
    m[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
    m[8..12].copy_from_slice(&1u32.to_ne_bytes());
    m[HEADER + 4..HEADER + 8].copy_from_slice(&index.to_ne_bytes());
    for (attribute, value) in attributes {
        m.extend_from_slice(&8u16.to_ne_bytes());
        m.extend_from_slice(&attribute.to_ne_bytes());
        m.extend_from_slice(&value.to_ne_bytes());
    }
    let len = m.len() as u32;
    m[..4].copy_from_slice(&len.to_ne_bytes());
    m
}

fn send(fd: RawFd, m: &[u8]) -> io::Result<()> {
    // SAFETY: sends from a live slice.
    check(unsafe { libc::send(fd, m.as_ptr().cast(), m.len(), 0) } as i32).map(|_| ())
}

fn receive(fd: RawFd, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: receives into a live slice.
    check(unsafe { libc::recv(fd, buf.as_mut_ptr().cast(), buf.len(), 0) } as i32).map(|n| n as usize)
}

fn change(fd: RawFd, index: u32, attributes: &[(u16, u32)]) -> io::Result<()> {
    send(fd, &message(libc::RTM_NEWLINK, libc::NLM_F_REQUEST | libc::NLM_F_ACK, index, attributes))?;
    let mut buf = [0u8; 4096];
    let n = receive(fd, &mut buf)?;
    if n < HEADER + 4 {
        return Err(io::Error::from_raw_os_error(libc::EBADMSG));
    }
    match i32::from_ne_bytes(buf[HEADER..HEADER + 4].try_into().expect("4 bytes")) {
        0 => Ok(()),
        e => Err(io::Error::from_raw_os_error(-e)),
    }
}

/// Applies `s` to link `index`. The GSO limit is an optimisation: a kernel without it is fine.
pub fn configure(index: u32, s: LinkSettings) -> io::Result<()> {
    let fd = open(0, 0)?;
    let mut basic = Vec::new();
    if s.mtu > 0 {
        basic.push((IFLA_MTU, s.mtu));
    }
    if s.txqlen > 0 {
        basic.push((IFLA_TXQLEN, s.txqlen));
    }
    if !basic.is_empty() {
        change(fd.as_raw_fd(), index, &basic)?;
    }
    if s.gso_max > 0 {
        for attribute in [IFLA_GSO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE] {
            let _ = change(fd.as_raw_fd(), index, &[(attribute, s.gso_max)]);
        }
    }
    Ok(())
}

/// News about one link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// Exists with this MTU.
    Mtu(u32),
    /// Left this namespace: deleted or moved.
    Left,
}

/// Watches one link of the namespace it was opened in.
pub struct LinkWatch {
    fd: OwnedFd,
    index: u32,
}

impl LinkWatch {
    /// Subscribes and asks for the present state.
    pub fn open(name: &str) -> io::Result<Self> {
        let fd = open(libc::RTMGRP_LINK as u32, libc::SOCK_NONBLOCK)?;
        let index = index_of(name)?;
        send(fd.as_raw_fd(), &message(libc::RTM_GETLINK, libc::NLM_F_REQUEST, index, &[]))?;
        Ok(Self { fd, index })
    }

    /// The same, in the network namespace that `namespace` refers to.
    pub fn open_in(namespace: OwnedFd, name: String) -> io::Result<Self> {
        // A namespace belongs to a thread: enter it on one that ends right after.
        let entered = std::thread::spawn(move || {
            // SAFETY: a plain call on a live descriptor.
            check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
            Self::open(&name)
        });
        entered.join().unwrap_or_else(|_| Err(io::Error::from_raw_os_error(libc::EIO)))
    }

    /// Takes all pending news.
    pub fn read(&self, out: &mut Vec<LinkEvent>) {
        let mut buf = vec![0u8; 16 * 1024];
        while let Ok(n) = receive(self.fd.as_raw_fd(), &mut buf) {
            parse(&buf[..n], self.index, out);
        }
    }
}

impl AsRawFd for LinkWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Reads link messages about `index` out of a netlink datagram.
fn parse(mut b: &[u8], index: u32, out: &mut Vec<LinkEvent>) {
    let u16_at = |b: &[u8], at: usize| usize::from(u16::from_ne_bytes([b[at], b[at + 1]]));
    while b.len() >= HEADER {
        let len = u32::from_ne_bytes(b[..4].try_into().expect("4 bytes")) as usize;
        if len < HEADER || len > b.len() {
            return;
        }
        let kind = u16_at(b, 4) as u16;
        let body = &b[HEADER..len];
        if (kind == libc::RTM_NEWLINK || kind == libc::RTM_DELLINK) && body.len() >= IFINFO {
            let named = u32::from_ne_bytes(body[4..8].try_into().expect("4 bytes")) == index;
            let mut mtu = None;
            let mut at = &body[IFINFO..];
            while at.len() >= 4 {
                let alen = u16_at(at, 0);
                if alen < 4 || alen > at.len() {
                    break;
                }
                let value = &at[4..alen];
                match u16_at(at, 2) as u16 {
                    IFLA_MTU if value.len() == 4 => {
                        mtu = Some(u32::from_ne_bytes(value.try_into().expect("4 bytes")));
                    }
                    _ => {}
                }
                at = &at[alen.next_multiple_of(4).min(at.len())..];
            }
            match (named, kind, mtu) {
                (true, libc::RTM_DELLINK, _) => out.push(LinkEvent::Left),
                (true, _, Some(m)) => out.push(LinkEvent::Mtu(m)),
                _ => {}
            }
        }
        b = &b[len.next_multiple_of(4).min(b.len())..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_reports_its_mtu_and_garbage_is_skipped() {
        let w = LinkWatch::open("lo").unwrap();
        let mut out = Vec::new();
        for _ in 0..200 {
            w.read(&mut out);
            if !out.is_empty() {
                break;
            }
            std::thread::yield_now();
        }
        assert!(matches!(out[0], LinkEvent::Mtu(m) if m >= 1280), "{out:?}");
        assert!(index_of("no-such-link0").is_err());
        for seed in 0..2000u32 {
            let junk: Vec<u8> =
                (0..64u32).map(|i| (seed.wrapping_mul(i + 7).wrapping_mul(2654435761) >> 24) as u8).collect();
            parse(&junk, 1, &mut Vec::new());
            let mut m = message(libc::RTM_NEWLINK, 0, 1, &[(IFLA_MTU, 1)]);
            let at = seed as usize % m.len();
            m[at] ^= (seed >> 3) as u8;
            parse(&m, 1, &mut Vec::new());
        }
    }
}
